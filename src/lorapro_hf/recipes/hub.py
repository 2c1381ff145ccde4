"""Which model or data set was wanted when the Hub could not be reached?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# how the messages of transformers, PEFT and datasets begin when they find nothing here and nothing on the Hub
NO_HUB = re.compile(r"https://huggingface\.co|on the Hub \(|Can't find 'adapter_config\.json'")


class NotFetchedError(OSError):
    """A model, adapter or data set is neither on this machine nor on the Hub."""


@contextmanager
def sought(kind: str, name: str | None) -> Iterator[None]:
    """Name the model or data set in errors of transformers and datasets that speak of the Hub alone.

    Raises:
        NotFetchedError: in place of such an error, with its first line.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, NotFetchedError) or not NO_HUB.search(str(error)):
            raise
        first_line = str(error).splitlines()[0].rstrip(".")
        raise NotFetchedError(f"cannot load {kind} {name}: {first_line}.") from error
