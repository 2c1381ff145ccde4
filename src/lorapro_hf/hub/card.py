"""What does the model card say, and what becomes of one that is there already?"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lorapro_hf import __version__
from lorapro_hf.hub.describe import number
from lorapro_hf.hub.usage import Task
from lorapro_hf.utils.text_files import replace_file, write_text

CARD = "README.md"
_SEAL = "<!-- written by lorapro_hf; sha256 of the text above: {} -->"
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{\}", "([0-9a-f]{64})") + r"\s*$")
# What belongs to the training that the card was written for; everything else is the author's and is kept.
_OF_A_TRAINING = {"base_model", "datasets", "eval_results", "library_name", "licence", "metrics", "model-index"}
_OF_A_TRAINING |= {"model_name", "pipeline_tag", "tags"}
_VERSIONS = {"PEFT": "peft", "TRL": "trl", "Transformers": "transformers", "PyTorch": "torch", "Datasets": "datasets"}
_MOST_ROWS = 20
_PAPER = "https://huggingface.co/papers/2407.18242"
_CITATION = """\
@inproceedings{wang2025lorapro,
  title     = {{LoRA-Pro}: Are Low-Rank Adapters Properly Optimized?},
  author    = {Wang, Zhengbo and Liang, Jian and He, Ran and Wang, Zilei and Tan, Tieniu},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}"""

logger = logging.getLogger(__name__)


@dataclass
class Facts:
    """What a card tells; what is empty is not mentioned.

    Args:
        model_name: the title.
        task: what the model is for.
        snippet: code that loads the adapter.
        base_model: name of the base model, `None` for one that only its maker has.
        base_class: what the base model is.
        datasets: names on the Hub.
        data: the data in words, instead of those names.
        trained_with: the library and method of the training, in Markdown.
        lora_pro: settings of LoRA-Pro and the adapter; none for an adapter of plain LoRA.
        hyperparameters: of the training.
        metrics: of the final evaluation, by name.
        evaluated_on: type, name, config and split of the evaluation data, for the metadata.
        progress: evaluations during the training, a row each.
        picture: name of a picture file beside the card.
        badges, sentences, citations: Markdown that other libraries want to be in the card.
    """

    model_name: str
    task: Task
    snippet: str
    base_model: str | None = None
    base_class: str = ""
    datasets: list[str] = field(default_factory=list)
    data: str = ""
    trained_with: str = ""
    lora_pro: dict[str, str] = field(default_factory=dict)
    hyperparameters: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated_on: dict[str, str] = field(default_factory=dict)
    progress: list[dict[str, float]] = field(default_factory=list)
    picture: str = ""
    badges: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)


def write_card(folder: Path, facts: Facts, metadata: Mapping[str, Any]) -> ModelCard:
    """Write `README.md`; `keep_edited` comes before it.

    Args:
        folder: where the adapter lies.
        facts: what the card tells.
        metadata: of the card besides; what the facts say replaces it.
    """
    text = card_text(facts)
    card = ModelCard(f"---\n{card_metadata(facts, metadata).to_yaml()}\n---\n\n{text}\n{_SEAL.format(_digest(text))}\n")
    write_text(folder / CARD, str(card))
    return card


def add_to_card(folder: Path, lora_pro: Mapping[str, str]) -> None:
    """Add LoRA-Pro's section and tags to the card that another library has written for its own kind of model.

    Args:
        folder: where the card lies; `keep_edited` comes before it is written.
        lora_pro: settings of LoRA-Pro, of the adapter and of the optimizer.
    """
    card = ModelCard.load(folder / CARD, ignore_metadata_errors=True)
    card.data.tags = sorted({*(card.data.tags or []), "lora-pro", "lora", "peft"})
    section = ["## LoRA-Pro", *_section(lora_pro), f"```bibtex\n{_CITATION}\n```"]
    text = "\n\n".join([card.text.strip(), *section]) + "\n"
    write_text(folder / CARD, f"---\n{card.data.to_yaml()}\n---\n\n{text}\n{_SEAL.format(_digest(text))}\n")


def library_of(file: Path) -> str | None:
    """The library that a card names, if this is one with a kind of model and a card of its own."""
    if not file.is_file():
        return None
    name = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict().get("library_name")
    return None if name in ("transformers", "peft") else name


def keep_edited(folder: Path) -> dict[str, Any]:
    """Save a hand-edited `README.md` under another name, which `Trainer` does not push, and say so in a warning.

    Returns:
        What the author put into the metadata of the existing card and no training decides, such as the license.
    """
    file = folder / CARD
    if not file.is_file():
        return {}
    card = _read(file)
    if not _is_generated(card):
        content, number_of = file.read_bytes(), 1
        while (copy := folder / f"_README.edited-{number_of}.md").exists() and copy.read_bytes() != content:
            number_of += 1
        replace_file(copy, content)
        logger.warning(
            "%s was edited by hand or written by something else and is replaced by a new model card. The old one is "
            "kept as %s, which is not pushed; copy from it what you want to keep, and push the card with "
            "huggingface_hub.ModelCard.load(...).push_to_hub(...).",
            file,
            copy,
        )
    if card is None:
        file.unlink()  # the parents read the card that is there
        return {}
    return {name: value for name, value in card.data.to_dict().items() if name not in _OF_A_TRAINING}


def is_ours(file: Path) -> bool:
    """Whether a card has been written here, edited since or not."""
    return _SEAL.partition("{}")[0].encode() in (content_of(file) or b"")


def is_replaceable(file: Path) -> bool:
    """Whether a card can be written without a loss: there is none, or one that no hand has edited."""
    try:
        return not file.is_file() or _is_generated(_read(file))
    except OSError:  # nobody may read it
        return False


def content_of(file: Path) -> bytes | None:
    """The content of a card; `None` if there is none, or none that can be read."""
    try:
        return file.read_bytes()
    except OSError:
        return None


@contextlib.contextmanager
def without_card_of_peft(model: Any) -> Iterator[None]:
    """Keep `model.save_pretrained` from writing PEFT's card, an empty form with a local path as base model.

    PEFT also reads the card that is there, before it saves any weights, and a damaged one would end the save.
    """
    name = "create_or_update_model_card"
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not hasattr(model, name):
        yield
        return
    before = vars(model).get(name)
    setattr(model, name, lambda output_dir: None)
    try:
        yield
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)


def card_metadata(facts: Facts, metadata: Mapping[str, Any]) -> ModelCardData:
    """The metadata of the card: `metadata` with what the facts say."""
    data = {name: value for name, value in metadata.items() if name not in ("model-index", "eval_results", "licence")}
    tags = [*(data.get("tags") or []), *(["lora-pro"] if facts.lora_pro else []), "lora", "peft"]
    tags = [tag for tag in tags if not tag.startswith("base_model:")]
    data["base_model"] = facts.base_model
    if facts.base_model:
        tags.append(f"base_model:adapter:{facts.base_model}")
    data |= {
        "library_name": "peft",
        "tags": sorted(set(tags)),
        "datasets": facts.datasets or None,
        "model_name": facts.model_name,
    }
    if facts.task.tag and facts.task.tag != "text2text-generation":  # which the Hub has given up
        data.setdefault("pipeline_tag", facts.task.tag)
    return ModelCardData(**data, eval_results=_results(facts) or None)


def _results(facts: Facts) -> list[EvalResult]:
    on = facts.evaluated_on
    tag = facts.task.tag or "other"
    return [
        EvalResult(
            task_type=tag,
            task_name=facts.task.name,
            dataset_type=on.get("type", "unknown"),
            dataset_name=on.get("name", "held-out data"),
            dataset_config=on.get("config"),
            dataset_split=on.get("split"),
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in facts.metrics.items()
        if math.isfinite(value)
    ]


def card_text(facts: Facts) -> str:
    """The card in Markdown, without metadata."""
    parts = [f"# {facts.model_name}", _introduction(facts)]
    if facts.metrics:
        rows = {name.replace("_", " "): number(value) for name, value in facts.metrics.items()}
        parts += ["On the evaluation data:", _table(["metric", "value"], rows.items())]
    parts += [
        "## Use it",
        "The adapter is an ordinary PEFT adapter; transformers and PEFT load it.",
        f"```python\n{facts.snippet}\n```",
        "## Training",
        *([" ".join(facts.badges)] if facts.badges else []),
        *facts.sentences,
    ]
    if facts.lora_pro:
        parts += ["### LoRA-Pro", *_section(facts.lora_pro)]
    if facts.hyperparameters:
        parts += ["### Hyperparameters", _table(["hyperparameter", "value"], facts.hyperparameters.items())]
    if facts.picture or facts.progress:
        parts.append("### Course of the training")
    if facts.picture:
        parts.append(f"![Loss against step]({facts.picture})")
    if facts.progress:
        parts += _progress(facts.progress)
    parts += ["### Framework versions", "\n".join(_versions(bool(facts.trained_with)))]
    cited = ["LoRA-Pro:", f"```bibtex\n{_CITATION}\n```"] if facts.lora_pro else []
    cited += facts.citations
    return "\n\n".join([*parts, *(["## Citation", *cited] if cited else [])]) + "\n"


def _section(lora_pro: Mapping[str, str]) -> list[str]:
    return [
        f"[LoRA-Pro]({_PAPER}) adjusts the gradients of the two factors of each adapted weight, so that a step moves "
        "the weight as closely as possible as full fine-tuning would. The settings are in `lorapro_config.json` too.",
        _table(["setting", "value"], lora_pro.items()),
    ]


def _introduction(facts: Facts) -> str:
    base = f"a local {facts.base_class}"
    if facts.base_model:
        base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    data = facts.data
    if not data and facts.datasets:
        data = " and ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
    method = f"[LoRA-Pro]({_PAPER})" if facts.lora_pro else "plain LoRA"
    text = f"A LoRA adapter for {base}, trained with {method}"
    text += f" and {facts.trained_with}" if facts.trained_with else ""
    return f"{text} on {data}." if data else f"{text}."


def _progress(rows: list[dict[str, float]]) -> list[str]:
    """A table of evaluations, thinned out where there are many."""
    shown = rows
    if len(rows) > _MOST_ROWS:
        shown = [rows[round(i * (len(rows) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    columns = list(dict.fromkeys(name for row in shown for name in row))
    cells = [[number(row[name]) if name in row else "" for name in columns] for row in shown]
    header = ["held-out loss" if name == "loss" else name.replace("_", " ") for name in columns]
    note = [] if shown is rows else [f"{len(shown)} of the {len(rows)} evaluations:"]
    return [*note, _table(header, cells)]


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _versions(with_trl: bool) -> list[str]:
    """One line each, PEFT's as PEFT itself would add it, so that it does not add another."""
    lines = []
    for name, package in _VERSIONS.items():
        if package == "trl" and not with_trl:
            continue
        try:
            lines.append(f"- {name} {version(package)}")
        except PackageNotFoundError:  # pragma: no cover - all but TRL are required
            continue
    return [*lines, f"- lorapro_hf {__version__}"]


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(text.strip().splitlines()).encode()).hexdigest()


def _read(file: Path) -> ModelCard | None:
    """The card in a file, or `None` if its text or its metadata cannot be read."""
    try:
        return ModelCard.load(file, ignore_metadata_errors=True)
    except OSError:
        raise
    except Exception:  # no UTF-8, no YAML, or YAML that is no card's metadata
        return None


def _is_generated(card: ModelCard | None) -> bool:
    return card is not None and (_is_untouched(card.text) or _is_template_of_peft(card.text))


def _is_untouched(text: str) -> bool:
    sealed = _SEALED.search(text)
    return sealed is not None and sealed[1] == _digest(text[: sealed.start()])


def _is_template_of_peft(text: str) -> bool:
    """Whether this is what PEFT writes beside every adapter: an empty form and its version."""
    rest = text.strip().removeprefix(ModelCard.from_template(ModelCardData()).text.strip())
    return rest != text.strip() and re.fullmatch(r"\s*(#+ Framework versions)?\s*(- PEFT \S+\s*)*", rest) is not None
