"""Which model or data set was it, where the Hub cannot be reached?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# what transformers, PEFT and datasets say of what they neither have nor can fetch
NO_HUB = re.compile(r"https://huggingface\.co|on the Hub \(|Can't find 'adapter_config\.json'")


class NotFetchedError(OSError):
    """Something is neither on this machine nor to be had from the Hub."""


@contextmanager
def sought(what: str, name: str | None) -> Iterator[None]:
    """Tell what was looked for where transformers or datasets speak of the Hub alone.

    Args:
        what: such as "the model".
        name: as it was given.

    Raises:
        NotFetchedError: with both, and what the library said first.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, NotFetchedError) or not NO_HUB.search(str(error)):
            raise
        said = str(error).splitlines()[0].rstrip(".")
        raise NotFetchedError(f"cannot load {what} {name}: {said}.") from error
