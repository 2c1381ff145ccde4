"""How do model, settings and logs become a model card?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from lorapro_hf import __version__
from lorapro_hf.hub.card import CARD, write_card, write_or_warn
from lorapro_hf.hub.curves import PICTURE, draw_curves
from lorapro_hf.hub.describe import adapter_of, base_model_name, describe_lora_pro, describe_optimizer, name_on_hub
from lorapro_hf.hub.logs import evaluations_by_step, final_evaluation, number, numbers_of, split_at_end
from lorapro_hf.hub.settings import Settings
from lorapro_hf.hub.usage import Task, base_of, class_name, loading_values

RECIPE = "recipe.yaml"  # the settings of a script, beside the adapter that it trains
_VERSIONS = {"PEFT": "peft", "TRL": "trl", "Transformers": "transformers", "PyTorch": "torch", "Datasets": "datasets"}
_MOST_ROWS = 20


@dataclass
class CardFacts:
    """The facts of a card that the model does not know. The card leaves out what is not given.

    Args:
        repo_id: The adapter's name on the Hub, for the title and the code that loads it.
        model_name: The title, instead of the repository's or the folder's name.
        base_model: The base model's name on the Hub, if the model does not know it.
        datasets: Names of the data on the Hub; others are left out.
        data: The data in words, instead of those names.
        metrics: Results of the final evaluation, by name; by default those of `log_history`.
        log_history: Logged values in `Trainer`'s form: `{"step": 10, "loss": 0.5}`, `{"step": 20, "eval_loss": 0.6}`.
        hyperparameters: Further settings, such as `{"batch size": 8, "epochs": 3}`.
        processing_class: Tokenizer or other processor, if it is saved in the same folder.
        tags: Tags besides `lora-pro`, `lora` and `peft`.
        license: The adapter's license, by the Hub's name for it.
        language: Language of the data.
        evaluated_on: `type`, `name`, `config` and `split` of the evaluation data.
        trained_with: Library and method of the training, in Markdown.
        markdown: Lists of Markdown from other libraries: `badges`, `sentences` and `citations`.
        metadata: Further metadata.
        with_picture: Whether to draw the losses.
        reported: Reasons of earlier warnings, see `write_or_warn`.
    """

    repo_id: str | None = None
    model_name: str = ""
    base_model: str | None = None
    datasets: str | Sequence[str] = ()
    data: str = ""
    metrics: Mapping[str, Any] | None = None
    log_history: Sequence[Mapping[str, Any]] = ()
    hyperparameters: Mapping[str, Any] | None = None
    processing_class: Any = None
    tags: str | Sequence[str] = ()
    license: str | None = None
    language: str | Sequence[str] | None = None
    evaluated_on: dict[str, str] = field(default_factory=dict)
    trained_with: str = ""
    markdown: Mapping[str, list[str]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    with_picture: bool = True
    reported: set[str] = field(default_factory=set)


def compose_card(model: Any, settings: Settings | None, folder: Path, facts: CardFacts) -> ModelCard:
    """Write `README.md` and the picture of the training beside an adapter; call `kept_metadata` first.

    Args:
        model: The PEFT model.
        settings: The settings of LoRA-Pro; `None` for an adapter of plain LoRA.
        folder: The folder of the adapter.
        facts: The facts that the model does not know.
    """
    adapter, _ = adapter_of(model)
    base_model = base_model_name(model, facts.base_model)
    datasets = [name for name in listed(facts.datasets) if name_on_hub(name)]
    loading = loading_values(model, facts.processing_class)
    during, _ = split_at_end(facts.log_history)
    metrics = numbers_of(facts.metrics or {}) or final_evaluation(facts.log_history)
    values = {
        **loading,
        **facts.markdown,
        **_evaluations(evaluations_by_step(during)),
        "title": facts.model_name or (facts.repo_id or folder.resolve().name).split("/")[-1],
        "base_model": base_model,
        "datasets": datasets,
        "data": facts.data,
        "adapter": facts.repo_id or "path/to/this/folder",
        "subfolder": "" if adapter == "default" else adapter,
        "lora_pro": describe_lora_pro(model, settings) if settings else {},
        "hyperparameters": {**(describe_optimizer(settings) if settings else {}), **(facts.hyperparameters or {})},
        "metrics": {name.replace("_", " "): number(value) for name, value in metrics.items()},
        "recipe": RECIPE if (folder / RECIPE).is_file() else "",
        "picture": _picture(during, folder / PICTURE, facts.reported) if facts.with_picture else "",
        "versions": _versions(with_trl=bool(facts.trained_with)),
        "trained_with": facts.trained_with,
    }
    tags = {*listed(facts.metadata.get("tags")), *listed(facts.tags), "lora", "peft"}
    tags = {tag for tag in tags if not tag.startswith("base_model:")}
    tags |= {"lora-pro"} if settings else set()
    tags |= {"transformers"} if class_name(base_of(model))[1] else set()
    tags |= {f"base_model:adapter:{base_model}"} if base_model else set()
    metadata = {**_metadata(facts, loading["task"]), "base_model": base_model, "datasets": datasets or None}
    results = _results(metrics, facts.evaluated_on, loading["task"]) or None
    data = ModelCardData(**metadata, tags=sorted(tags), model_name=values["title"], eval_results=results)
    return write_card(folder / CARD, data, values)


def listed(value: Any) -> list[str]:
    """Return one name, several or none as a list."""
    return [value] if isinstance(value, str) and value else [each for each in value or () if each]


def _metadata(facts: CardFacts, task: Task) -> dict[str, Any]:
    """Return the metadata except names, tags and results."""
    left_out = ("model-index", "eval_results", "licence", "model_name", "tags")
    data = {name: value for name, value in facts.metadata.items() if name not in left_out}
    data |= {k: v for k, v in {"license": facts.license, "language": facts.language}.items() if v is not None}
    if task.tag and task.tag != "text2text-generation":  # which the Hub has given up
        data.setdefault("pipeline_tag", task.tag)
    return {**data, "library_name": "peft"}


def _results(metrics: Mapping[str, float], data: Mapping[str, str], task: Task) -> list[EvalResult]:
    tag = task.tag or "other"
    return [
        EvalResult(
            task_type=tag,
            task_name=tag.replace("-", " ").title(),
            dataset_type=data.get("type", "unknown"),
            dataset_name=data.get("name", "held-out data"),
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in metrics.items()
        if math.isfinite(value)
    ]


def _evaluations(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return the table of evaluations, thinned out if there are many."""
    last = len(rows) - 1
    shown = rows if last < _MOST_ROWS else [rows[round(i * last / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    columns = list(dict.fromkeys(name for row in shown for name in row))
    return {
        "evaluation_count": len(rows),
        "evaluation_columns": ["held-out loss" if name == "loss" else name.replace("_", " ") for name in columns],
        "evaluations": [[number(row[name]) if name in row else "" for name in columns] for row in shown],
    }


def _picture(log_history: Sequence[Mapping[str, Any]], file: Path, reported: set[str]) -> str:
    """Return the name of the picture, "" if there is none; the card does without one that cannot be drawn."""
    drawn: list[bool] = []
    write_or_warn(file, lambda: drawn.append(draw_curves(log_history, file)), reported)
    return file.name if any(drawn) else ""


def _versions(with_trl: bool) -> dict[str, str]:
    """Return versions by name; PEFT writes its own line in the same form, so that it does not add another."""
    with_trl = with_trl and find_spec("trl") is not None  # another library's name of a trainer may look like TRL's
    packages = {name: package for name, package in _VERSIONS.items() if with_trl or name != "TRL"}
    return {**{name: version(package) for name, package in packages.items()}, "lorapro_hf": __version__}
