"""How do model, settings and logs become a model card?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from lorapro_hf.hub.card import Facts, write_card
from lorapro_hf.hub.curves import PICTURE, draw_curves
from lorapro_hf.hub.describe import (
    adapter_of,
    base_model_name,
    describe_lora_pro,
    describe_optimizer,
    evaluations_by_step,
    final_evaluation,
    split_at_end,
)
from lorapro_hf.hub.failures import write_or_warn
from lorapro_hf.hub.settings import Settings
from lorapro_hf.hub.usage import Source, base_of, class_name, loading_snippet, task_of


@dataclass
class Training:
    """What there is to say about a training besides its model; whatever is missing is not mentioned.

    Args:
        model_name: title of the card.
        repo_id: the adapter's place on the Hub.
        base_model: name of the base model, where the model does not know it.
        datasets: names of the data on the Hub.
        data: the data in words.
        evaluated_on: `type`, `name`, `config` and `split` of the evaluation data.
        metrics: results of the evaluation, where the log does not have them.
        log_history: as in `trainer.state.log_history`.
        best_step: the step whose weights were loaded at the end.
        hyperparameters: names and values.
        processor: tokenizer or other processor, if one lies beside the adapter.
        trained_with: library and method, in Markdown.
        badges, sentences, citations: Markdown for the card.
        metadata: of the card.
        with_picture: whether to draw the losses.
        reported: errors of which a warning told already, see `write_or_warn`.
    """

    model_name: str
    repo_id: str | None = None
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    data: str = ""
    evaluated_on: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None
    hyperparameters: dict[str, str] = field(default_factory=dict)
    processor: Any = None
    trained_with: str = ""
    badges: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    with_picture: bool = True
    reported: set[str] = field(default_factory=set)


def compose_card(model: Any, settings: Settings | None, folder: Path, training: Training) -> ModelCard:
    """Write `README.md` and, where there is something to draw, the picture of the training beside it.

    Args:
        model: the PEFT model.
        settings: of LoRA-Pro; `None` for an adapter of plain LoRA.
        folder: where the adapter lies.
        training: what else the card tells.
    """
    base, task = base_of(model), task_of(model)
    name, _ = adapter_of(model)
    base_model = base_model_name(model, training.base_model)
    source = Source(
        base=base_model,
        adapter=training.repo_id or "path/to/this/folder",
        subfolder="" if name == "default" else name,
        processor=training.processor is not None,
    )
    during, _ = split_at_end(training.log_history)
    facts = Facts(
        model_name=training.model_name,
        task=task,
        snippet=loading_snippet(model, task, source, training.processor),
        base_model=base_model,
        base_class=class_name(base)[0],
        datasets=training.datasets,
        data=training.data,
        trained_with=training.trained_with,
        lora_pro=describe_lora_pro(model, settings) if settings else {},
        hyperparameters={**(describe_optimizer(settings) if settings else {}), **training.hyperparameters},
        metrics=training.metrics or final_evaluation(training.log_history, training.best_step),
        evaluated_on=training.evaluated_on,
        progress=evaluations_by_step(during),
        picture=_picture(during, folder / PICTURE, training.reported) if training.with_picture else "",
        badges=training.badges,
        sentences=training.sentences,
        citations=training.citations,
    )
    tags = [*(training.metadata.get("tags") or []), *(["transformers"] if class_name(base)[1] else [])]
    return write_card(folder, facts, {**training.metadata, "tags": tags})


def _picture(log_history: Sequence[Mapping[str, Any]], file: Path, reported: set[str]) -> str:
    """The name of the picture, "" if there is none; the card does without one that cannot be drawn."""
    drawn: list[bool] = []
    write_or_warn(file, lambda: drawn.append(draw_curves(log_history, file)), reported)
    return file.name if any(drawn) else ""
