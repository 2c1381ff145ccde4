"""How is a model card written without losing the edits of its author, and without ending a training?"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lorapro_hf.utils.text_files import replace_file, shortened, write_text

CARD = "README.md"
_SEAL = "<!-- written by lorapro_hf; sha256 of the text above: {} -->"
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{64})") + r"\s*$")
# A new card replaces these entries of the metadata and keeps all others, such as a license, which are the author's.
_REPLACED = {"base_model", "datasets", "eval_results", "library_name", "licence", "metrics", "model-index"}
_REPLACED |= {"model_name", "pipeline_tag", "tags"}

logger = logging.getLogger(__name__)


class CardKeptError(FileExistsError):
    """The existing card was edited or written by another program, and was left as it is."""


def write_card(file: Path, metadata: ModelCardData, values: Mapping[str, Any]) -> ModelCard:
    """Fill in the template, write the card with a seal, and return it; call `kept_metadata` first."""
    template = files("lorapro_hf.hub").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    card = ModelCard.from_template(metadata, template_str=template, **values)
    card = ModelCard(f"{card.content.rstrip()}\n\n{_SEAL.format(_digest(card.text))}\n")
    write_text(file, str(card))
    return card


def add_to_card(file: Path, lora_pro: Mapping[str, str]) -> None:
    """Add a table of LoRA-Pro's settings, and tags, to a card that another library wrote for its own kind of model."""
    card = ModelCard.load(file, ignore_metadata_errors=True)
    card.data.tags = sorted({*(card.data.tags or []), "lora-pro", "lora", "peft"})
    write_card(file, card.data, {"library_text": card.text.strip(), "lora_pro": lora_pro})


def library_of(file: Path) -> str | None:
    """Return the library that a card names, if that library has its own kind of model and card."""
    if not file.is_file():
        return None
    name = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("library_name")
    return None if name in ("transformers", "peft") else name


def kept_metadata(file: Path) -> dict[str, Any]:
    """Return the metadata of an existing card that a new card keeps, such as the license.

    Raises:
        CardKeptError: The card was edited by hand or written by another program.
    """
    if not file.is_file():
        return {}
    try:
        card = ModelCard.load(file, ignore_metadata_errors=True)
        is_replaceable = _is_generated(card.text)
    except OSError:
        raise
    except Exception:  # no UTF-8, no YAML, or YAML that is no card's metadata
        is_replaceable = False
    if not is_replaceable:
        raise CardKeptError(
            f"{file} was edited by hand or written by another program, so it stays as it is. To get a new card, rename "
            "or delete it and call create_model_card."
        )
    return {name: value for name, value in card.data.to_dict().items() if name not in _REPLACED}


def content_of(file: Path) -> bytes | None:
    """Return the content of a file; `None` if it does not exist or cannot be read."""
    try:
        return file.read_bytes()
    except OSError:
        return None


def write_or_warn(file: Path, write: Callable[[], object], reported: set[str]) -> None:
    """Write a card or a picture; on failure, warn once and leave the file as it was.

    Args:
        file: The file that `write` makes or replaces.
        write: The function that writes it.
        reported: The reasons of earlier warnings, which are not repeated; a new one is added.
    """
    is_known = False
    try:
        before = file.read_bytes() if file.exists() else None
        is_known = True
        write()
        return
    except CardKeptError as error:
        reason = message = str(error)
    except Exception as error:  # of any kind: a training is worth more than its card
        logger.debug("%s could not be written", file, exc_info=True)
        reason = shortened(f"{type(error).__name__}: {error}", 1000)
        message = f"{file} could not be written ({reason}). Mend the cause and call create_model_card."
    if is_known:  # a file that cannot be read is left alone
        restore(file, before)
    if reason not in reported:
        reported.add(reason)
        logger.warning("%s Nothing else is affected.", message)


def restore(file: Path, content: bytes | None) -> None:
    """Give a file its earlier content back; `None` removes the file."""
    with contextlib.suppress(OSError):
        if content is None:
            file.unlink(missing_ok=True)
        elif content_of(file) != content:
            replace_file(file, content)


@contextlib.contextmanager
def without_card_of_peft(model: Any) -> Iterator[None]:
    """Keep `model.save_pretrained` from writing PEFT's card, an empty form with a local path as base model.

    PEFT also reads the existing card before it saves any weights, and a damaged card would end the save.
    """
    attributes = vars(getattr(model, "_orig_mod", model))  # of torch.compile
    attributes["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        del attributes["create_or_update_model_card"]


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(text.strip().splitlines()).encode()).hexdigest()


def _is_generated(text: str) -> bool:
    """Return whether a card's text is unedited, or is the empty form that PEFT writes beside every adapter."""
    sealed = _SEALED.search(text)
    if sealed is not None:
        return sealed[1] == _digest(text[: sealed.start()])
    rest = text.strip().removeprefix(ModelCard.from_template(ModelCardData()).text.strip())
    return rest != text.strip() and re.fullmatch(r"\s*(#+ Framework versions)?\s*(- PEFT \S+\s*)*", rest) is not None
