"""When does an optimizer of factor pairs look for NaN and Inf, and how many steps has it left out?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.distributed.ownership import Shares
from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.optim.finite import of_factors, of_groups, of_others, of_states, require_finite
from lorapro_hf.optim.first_steps import FirstSteps


class FiniteChecks(torch.optim.Optimizer):
    """The part of `PairOptimizer` that looks at values; its subclass knows the pairs and who of the ranks steps them.

    Attributes:
        first_steps: what the first steps of this training have left out.
    """

    pairs: list[LoRAPair]
    engine_step: Callable[[], None] | None
    first_steps: FirstSteps
    _skipped: Tensor | None
    _starts_finite: bool
    _seen: tuple[int, int]
    """Steps left out and steps taken, when the number of the former was last checked."""
    _is_being_saved = False

    def _current_shares(self) -> Shares:
        raise NotImplementedError

    def _ordinary(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        raise NotImplementedError

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite; reading it waits for the device."""
        recent = 0 if self._skipped is None else int(self._skipped.item())
        return self.param_groups[0]["skipped_steps"] + recent

    def checked_skipped_steps(self) -> int:
        """`skipped_steps`, once it is clear that it is gradients that were not finite; call it on all ranks.

        Raises:
            ValueError: a parameter holds NaN or Inf, so that every further step would be left out.
        """
        seen = skipped, steps = self.skipped_steps, self.first_steps.steps
        if skipped > self._seen[0] or steps == self._seen[1]:  # a gradient scaler or an engine may leave out steps too
            self.require_finite(state=False)
        self._seen = seen
        return skipped

    def finish_training(self) -> None:
        """Warn of pairs that had no gradient and of steps left out, as the tenth step does; the next step is a first.

        For trainings of fewer steps. `LoRAProTrainer` calls it.
        """
        self.require_finite(state=False)
        self.first_steps.warn(self.skipped_steps)
        self._begin_training()

    def require_finite(self, state: bool = True) -> None:
        """Raise if a parameter, its state or a learning rate holds NaN or Inf; this waits for the device.

        Call it on all ranks that shard parameters or share the state out: all of them raise if one has to.

        Args:
            state: whether to look at moments, too.

        Raises:
            ValueError: the message names the parameter.
        """
        shares = self._current_shares()
        named = [*of_factors(self.pairs, shares.access), *of_groups(self.param_groups)]
        if self.engine_step is None:
            named += of_others(self._ordinary(), self.state if state else None)
        if state:
            named += of_states(shares.own, self.state)
        # whole factors are the same on all ranks
        alone = shares.access.in_place and not (state and shares.group)
        require_finite(named, None if alone else shares.access.group)

    @contextmanager
    def saving_finite(self) -> Iterator[None]:
        """Look before the first file of a checkpoint, and no more at any part of it that is saved within.

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
        """`require_finite`, unless `saving_finite` has seen to it."""
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
        self.param_groups[0]["skipped_steps"] = self.skipped_steps
        self._skipped = None

    def _is_being_captured(self) -> bool:
        """Whether a CUDA graph is being recorded, which forbids to wait for the device."""
        return self.pairs[0].A.is_cuda and torch.cuda.is_current_stream_capturing()
