"""How do the ranks of a `Trainer` agree on a result or an error?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class AgreementMixin(_Base):
    """The part of `LoRAProTrainerMixin` by which no rank waits for another that has met an error."""

    def _together(self, check: Callable[[], Any]) -> None:
        """Run a check on all ranks; an error of one rank is raised on each of them."""
        own: Exception | None = None
        try:
            check()
        except Exception as error:  # of any kind: the other ranks must hear of it
            own = error
        message = self._agreed(None if own is None else str(own))
        if own is not None:
            raise own
        if message is not None:
            raise ValueError(message)

    def _agreed(self, message: str | None) -> str | None:
        """The message of the first rank that has one."""
        return next((each for each in self._gathered(message) if each is not None), None)

    def _gathered(self, own: Any) -> list[Any]:
        """The values of all ranks, in the order of the ranks."""
        return list(gather_object([own])) if self.accelerator.num_processes > 1 else [own]
