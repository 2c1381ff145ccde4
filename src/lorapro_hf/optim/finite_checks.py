"""When does an optimizer of factor pairs look for NaN and Inf, and how many steps has it skipped?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.optim.finite import of_factors, of_groups, of_others, of_states, require_finite
from lorapro_hf.optim.first_steps import FirstSteps
from lorapro_hf.optim.held_pairs import HeldPairs


class FiniteChecks(HeldPairs):
    """Checks of factors, moments, learning rates and the number of skipped steps.

    Attributes:
        first_steps: warns of what the first steps of this training have skipped.
    """

    def _forget_run(self) -> None:
        super()._forget_run()
        self._skipped: Tensor | None = None  # steps skipped since the groups were last settled, on the device
        self._starts_finite = False
        self._is_being_saved = False
        self.first_steps = FirstSteps(self.pairs)
        self._seen = (0, 0)  # skipped steps and steps at the last check

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped because a gradient was not finite; reading it waits for the device."""
        recent = 0 if self._skipped is None else int(self._skipped.item())
        return self._whole_groups[0]["skipped_steps"] + recent

    def checked_skipped_steps(self) -> int:
        """`skipped_steps`, after a check that parameters are finite where steps were skipped; call it on all ranks.

        Raises:
            ValueError: a parameter holds NaN or Inf, so that all further steps would be skipped.
        """
        seen = skipped, steps = self.skipped_steps, self.first_steps.steps
        if skipped > self._seen[0] or steps == self._seen[1]:  # gradient scalers and engines skip steps themselves
            self.require_finite(state=False)
        self._seen = seen
        return skipped

    def finish_training(self) -> None:
        """Warn of pairs without gradients and of skipped steps, as the tenth step does; the next step is a first.

        For trainings of fewer than ten steps. `LoRAProTrainer` calls it.
        """
        self.require_finite(state=False)
        self.first_steps.warn(self.skipped_steps)
        self._begin_training()

    def require_finite(self, state: bool = True) -> None:
        """Raise if a parameter, its state or a learning rate holds NaN or Inf; this waits for the device.

        Call it on all ranks that shard parameters or share the state: if one raises, all do.

        Args:
            state: whether to check the moments, too.

        Raises:
            ValueError: the message names the parameter.
        """
        ownership = self._current_ownership()
        named = [*of_factors(self.pairs, ownership.access), *of_groups(self._whole_groups)]
        if not self.has_engine:
            named += of_others(self._others(), self.state if state else None)
        if state:
            named += of_states(ownership.owned, self.state)
        # whole factors are the same on all ranks
        alone = ownership.access.in_place and not (state and ownership.group)
        require_finite(named, None if alone else ownership.access.group)

    @contextmanager
    def saving_finite(self) -> Iterator[None]:
        """Check once before the first file of a checkpoint, and not again at the files saved within.

        Raises:
            ValueError: a parameter or its state holds NaN or Inf.
        """
        self.require_finite()
        self._is_being_saved = True
        try:
            yield
        finally:
            self._is_being_saved = False

    def require_finite_save(self) -> None:
        """`require_finite`, unless `saving_finite` has checked already."""
        if not self._is_being_saved:
            self.require_finite()

    def _require_finite_start(self) -> None:
        if not self._starts_finite:
            self.require_finite()
            self._starts_finite = True

    def _begin_training(self) -> None:
        self._settle_skipped()
        self.first_steps = FirstSteps(self.pairs, self.skipped_steps)
        self._seen = (self.skipped_steps, 0)

    def _settle_skipped(self) -> None:
        """Write the number of skipped steps into the groups, from where checkpoints save it."""
        self._whole_groups[0]["skipped_steps"] = self.skipped_steps
        self._skipped = None

    def _is_being_captured(self) -> bool:
        """Whether a CUDA graph is being recorded, which forbids to wait for the device."""
        return self.pairs[0].A.is_cuda and torch.cuda.is_current_stream_capturing()

    def __getstate__(self) -> dict[str, Any]:
        self._settle_skipped()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pairs" in state:
            self._begin_training()
