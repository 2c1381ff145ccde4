"""Which pairs and steps did the first steps of a training skip? One warning tells, since the training goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from lorapro_hf.distributed.ownership import everyone
from lorapro_hf.factors.pairs import LoRAPair

FIRST_STEPS = 10
_LISTED = 4
_REMEDIES = (
    "Look for batches without a loss (all labels are -100), train in bfloat16 instead of float16, or lower the "
    "learning rate. Trainer logs a loss of NaN as 0."
)

logger = logging.getLogger(__name__)


class FirstSteps:
    """Counts the steps of a training, and records pairs that had no gradient in any of the first ones."""

    def __init__(self, pairs: Sequence[LoRAPair], skipped_before: int = 0) -> None:
        self.steps = 0
        self._number = len(pairs)
        self._without = list(enumerate(pairs))
        self._skipped_before: int | None = skipped_before
        self._norms: list[Tensor] = []  # left on their device: reading them waits for it

    def count(self, has_gradient: Sequence[bool], norm: Tensor) -> bool:
        """Count a step, with the norm of all gradients; return whether it was the last of the first steps."""
        self.steps += 1
        if self.steps <= FIRST_STEPS:
            # factors that have been frozen since are not reported
            self._without = [
                (index, pair)
                for index, pair in self._without
                if not has_gradient[index] and (pair.A.requires_grad or pair.B.requires_grad)
            ]
            self._norms.append(norm)
        return self.steps == FIRST_STEPS

    def warn(self, skipped: int = 0) -> None:
        """Warn once of pairs without gradients, of gradients that are all zero, and if half the steps were skipped."""
        if not self.steps or not _is_first_rank():
            return
        if self._without:
            self._warn_of_pairs([pair.name for _, pair in self._without])
            self._without = []
        if self._norms and not any(self._norms):
            logger.warning(
                "the gradients of all LoRA pairs were zero in the first %d steps, so that nothing was trained. Look "
                "for batches without a loss (all labels are -100, or all rewards are alike).",
                len(self._norms),
            )
        self._norms = []
        if self._skipped_before is not None and 2 * (skipped - self._skipped_before) >= self.steps:
            logger.warning(
                "%d of the first %d steps were left out, because a gradient held NaN or Inf, or was too long to be "
                "squared (1e19 in float32, 1e15 in mode 'factored'). %s",
                skipped - self._skipped_before,
                self.steps,
                _REMEDIES,
            )
            self._skipped_before = None

    def warn_if_none(self, taken: int, before: int = 0) -> None:
        """Warn once if a trainer has taken the first steps since step `before`, but none reached the optimizer."""
        if self.steps or taken - before < FIRST_STEPS or self._skipped_before is None or not _is_first_rank():
            return
        logger.warning(
            "no step has reached LoRA-Pro's optimizer up to step %d: the gradient scaler of fp16, or DeepSpeed, leaves "
            "out each of them, because a gradient held NaN or Inf. %s",
            taken,
            _REMEDIES,
        )
        self._skipped_before = None

    def _warn_of_pairs(self, names: list[str]) -> None:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        logger.warning(
            "%d of %d LoRA pairs had no gradient in the first %d steps and were not trained: %s. Either the loss does "
            "not depend on their layers (a tower without inputs, an embedding beside the one in use), which "
            "exclude_modules leaves out, or gradient checkpointing cuts them off, which "
            'gradient_checkpointing_kwargs={"use_reentrant": False} prevents. Experts without a token so far need no '
            "remedy.",
            len(names),
            self._number,
            min(self.steps, FIRST_STEPS),
            ", ".join(names[:_LISTED]) + more,
        )


def _is_first_rank() -> bool:
    group = everyone()
    return group is None or group.rank() == 0
