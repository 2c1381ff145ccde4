"""What happens when a model card or its picture cannot be written?"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from lorapro_hf.utils.text_files import replace_file, shortened

logger = logging.getLogger(__name__)


def write_or_warn(file: Path, write: Callable[[], object], reported: set[str]) -> None:
    """Write a card or a picture; a failure is one warning and leaves the file as it was.

    Args:
        file: the file that `write` makes or replaces.
        write: what writes it.
        reported: the errors of which a warning told already; none is told twice, and a new one is added.
    """
    try:
        before = file.read_bytes() if file.exists() else None
        try:
            write()
        except Exception:
            _restore(file, before)
            raise
    except Exception as error:  # of any kind: a training is worth more than its card
        reason = shortened(f"{type(error).__name__}: {error}", 1000)
        logger.debug("%s could not be written", file, exc_info=True)
        if reason not in reported:
            reported.add(reason)
            logger.warning(
                "%s could not be written (%s). Nothing else is affected. Mend the cause and call create_model_card.",
                file,
                reason,
            )


def _restore(file: Path, before: bytes | None) -> None:
    """Put back the earlier content, which stays under another name if even that fails; see `keep_edited`."""
    with contextlib.suppress(OSError):
        if before is None:
            file.unlink(missing_ok=True)
        elif not file.is_file() or file.read_bytes() != before:
            replace_file(file, before)
