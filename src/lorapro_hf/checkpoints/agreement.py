"""How do the ranks of a training hear of an error that one of them has met?"""

from __future__ import annotations

from collections.abc import Callable

from accelerate.utils import gather_object


def first_of_ranks(message: str | None) -> str | None:
    """The message of the first rank that has one; all ranks must call it."""
    return next(filter(None, gather_object([message])), None)


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise on every rank the error of the first rank that has one; all ranks must call it."""
    message = first_of_ranks(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    if message is not None:
        raise ValueError(message)


def check_together(check: Callable[[], object]) -> None:
    """Run a check on all ranks, and raise an error of one rank on each of them."""
    own: Exception | None = None
    try:
        check()
    except Exception as error:  # of any kind: the other ranks must hear of it
        own = error
    raise_on_all_ranks(own)
