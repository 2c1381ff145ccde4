"""Do factors, their state or learning rates hold NaN or Inf, and when does an optimizer look? All ranks raise alike.

Gradients that are not finite are no error: the step is skipped and training goes on. Reading values waits for the
device, so an optimizer reads them before the first step, at saves and after skipped steps only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.distributed.access import Access, local
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.optim.first_steps import FirstSteps
from lorapro_hf.optim.held_pairs import HeldPairs

Named = tuple[str, Tensor]  # the name of a tensor in messages, and the tensor


def require_finite(named: Iterable[Named], group: dist.ProcessGroup | None = None) -> None:
    """Raise a `ValueError` that names the first tensor with NaN or Inf, on all ranks of a group if on any."""
    broken = find_broken(named)
    if group is not None and group.size() > 1:
        of_ranks: list[str] = [""] * group.size()
        dist.all_gather_object(of_ranks, broken, group=group)
        broken = next(filter(None, of_ranks), "")
    if broken:
        raise ValueError(
            f"NaN or Inf in {broken}. No step can mend that: go back to an earlier checkpoint, and lower the learning "
            "rate if the training itself has led there."
        )


def find_broken(named: Iterable[Named]) -> str:
    """The name of the first tensor with NaN or Inf and the number of further ones, empty without any."""
    alike: dict[tuple[torch.device, torch.dtype], list[Named]] = {}
    for name, tensor in named:
        # shards on the meta device are checked once they are loaded
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            alike.setdefault((tensor.device, tensor.dtype), []).append((name, tensor.detach()))
    broken = []
    for some in alike.values():
        # unlike isfinite, aminmax allocates no memory of the size of the tensor
        extremes = torch.stack([extreme for _, tensor in some for extreme in torch.aminmax(tensor)])
        finite = extremes.isfinite().view(-1, 2).all(-1).tolist()
        broken += [name for (name, _), is_finite in zip(some, finite, strict=True) if not is_finite]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return broken[0] + more if broken else ""


def of_factors(pairs: Iterable[LoRAPair], access: Access) -> Iterator[Named]:
    """This rank's parts of all factors."""
    for pair in pairs:
        for factor, parameter in zip("AB", (pair.A, pair.B), strict=True):
            yield _name(pair, factor), access.held(parameter)


def of_states(pairs: Iterable[LoRAPair], state: Mapping[Tensor, Mapping[str, Tensor]]) -> Iterator[Named]:
    """The state of pairs."""
    for pair in pairs:
        for factor, parameter in zip("AB", (pair.A, pair.B), strict=True):
            for name, tensor in state.get(parameter, {}).items():
                yield f"the state {name!r} of {_name(pair, factor)}", tensor


class FiniteChecks(HeldPairs):
    """Checks of factors, moments and learning rates, and the number of skipped steps.

    Attributes:
        first_steps: counts the steps of this training, and warns of the first ones.
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
        """Raise if a parameter, a learning rate or, with `state`, a moment holds NaN or Inf; waits for the device.

        Call it on all ranks that shard parameters or share the state: if one raises, all do.

        Raises:
            ValueError: the message names the parameter.
        """
        ownership = self._current_ownership()
        named = [*of_factors(self.pairs, ownership.access), *_rates(self._whole_groups)]
        if not self.has_engine:
            named += _of_others(self._others(), self.state if state else {})
        if state:
            named += of_states(ownership.owned, self.state)
        # whole factors are the same on all ranks
        alone = ownership.access.in_place and not (state and ownership.group)
        require_finite(named, None if alone else ownership.access.group)

    @contextmanager
    def saving_finite(self) -> Iterator[None]:
        """Call `require_finite` once before the first file of a checkpoint, and not again at the files saved within."""
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
        if self._skipped is not None:
            self._skipped.zero_()  # stays where it is: a recorded CUDA graph adds to it

    def __getstate__(self) -> dict[str, Any]:
        self._settle_skipped()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "pairs" in state:
            self._begin_training()


def _rates(groups: Sequence[dict[str, Any]]) -> Iterator[Named]:
    """Learning rates that are tensors."""
    for index, group in enumerate(groups):
        if isinstance(group["lr"], Tensor):
            yield f"the learning rate of param group {index}", group["lr"]


def _of_others(
    groups: Iterable[tuple[dict[str, Any], list[Tensor]]], state: Mapping[Tensor, Mapping[str, Any]]
) -> Iterator[Named]:
    """This rank's parts of the parameters that belong to no pair, and of their state."""
    for index, (group, parameters) in enumerate(groups):
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        for parameter in parameters:
            name = names.get(id(parameter), f"a parameter of param group {index}")
            yield name, local(parameter)
            for moment, tensor in state.get(parameter, {}).items():
                yield f"the state {moment!r} of {name}", local(tensor)


def _name(pair: LoRAPair, factor: str) -> str:
    return f"lora_{factor} of {unwrapped_name(pair.name)} (adapter {pair.adapter_name!r})"
