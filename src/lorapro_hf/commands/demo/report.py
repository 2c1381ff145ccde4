"""Which table, figures and curves does a demo run show and keep?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lorapro_hf.commands.common.plots import as_png, finish_loss_axes, new_figure, smooth
from lorapro_hf.commands.common.records import environment, write_json
from lorapro_hf.commands.common.scoring import Score
from lorapro_hf.commands.demo.settings import DemoSettings
from lorapro_hf.commands.demo.training import MethodResult

COLOURS = {
    "lora": "#0072B2",
    "lora_pro": "#D55E00",
    "lora_pro_8bit": "#56B4E9",
    "lora_pro_factored": "#CC79A7",
    "lora_pro_efficient": "#009E73",
}
_MARKERS = dict(zip(COLOURS, "os>D^", strict=True))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _state(result: MethodResult) -> str:
    if not result.interrupted:
        return result.method.title
    count = len(result.losses)
    return f"{result.method.title} (interrupted after {count} step{'' if count == 1 else 's'})"


def results_table(base: Score | None, results: Sequence[MethodResult]) -> Table:
    """The figures of the base model and of every method side by side."""
    table = Table(
        title="Held-out problems",
        caption="train loss: mean of the last quarter of the steps; step: median of the optimizer's step; state: the "
        "optimizer's; time: of the whole training. A check that training works, not a benchmark: few steps, one seed.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold")
    # narrow enough for 60 columns
    for title in ("lr", "train\nloss", "held-\nout\nloss", "exact\nmatch", "step\nms", "state\nMB", "time\ns"):
        table.add_column(title, justify="right", no_wrap=True)
    if base is not None:
        table.add_row("base model", "–", "–", f"{base.loss:.3f}", f"{base.exact_match:.1%}", "–", "–", "–")
    for result in results:
        score = result.score
        table.add_row(
            _state(result),
            f"{result.learning_rate:.0e}".replace("e-0", "e-"),
            _number(result.train_loss, ".3f"),
            _number(None if score is None else score.loss, ".3f"),
            _number(None if score is None else score.exact_match, ".1%"),
            _number(result.median_optimizer_ms, ".1f"),
            _number(result.optimizer_state_mb, ".1f"),
            _number(result.wall_time_s, ".0f"),
        )
    return table


def _row(result: MethodResult) -> dict[str, Any]:
    return {
        "method": result.method.name,
        "title": result.method.title,
        "lora_pro_mode": result.method.lora_pro_mode,
        "lora_pro_trust_region": result.method.trust_region,
        "learning_rate": result.learning_rate,
        "steps": len(result.losses),
        "interrupted": result.interrupted,
        "train_loss_last_quarter": result.train_loss,
        "heldout": None if result.score is None else asdict(result.score),
        "optimizer_ms_per_step_median": result.median_optimizer_ms,
        "optimizer_state_mb": result.optimizer_state_mb,
        "wall_time_s": result.wall_time_s,
        "adapter": str(result.adapter),
        "train_losses": result.losses,
        "optimizer_ms": result.optimizer_ms,
    }


def write_results(
    path: Path, settings: DemoSettings, base: Score | None, results: Sequence[MethodResult], **more: Any
) -> None:
    """Write settings, environment and all figures as JSON."""
    content = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {**asdict(settings), "output_dir": str(settings.output_dir)},
        "environment": environment(),
        "base_model_heldout": None if base is None else asdict(base),
        "methods": [_row(result) for result in results],
        "interrupted": any(result.interrupted for result in results),
        **more,
    }
    write_json(path, content)


def plot_curves(path: Path, base: Score | None, results: Sequence[MethodResult]) -> None:
    """Draw the training loss of every method, raw and smoothed, with the held-out loss before and after."""
    figure = new_figure(7.5, 4.5)
    axes = figure.add_subplot()
    for result in results:
        colour, marker = COLOURS[result.method.name], _MARKERS[result.method.name]
        steps = range(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, color=colour, alpha=0.25, linewidth=1)
        label = f"{_state(result)}, lr {result.learning_rate:g}"
        axes.plot(steps, smooth(result.losses), color=colour, linewidth=2, label=label)
        if result.score is not None:
            end: dict[str, Any] = {
                "marker": marker,
                "markersize": 9,
                "markeredgecolor": "black",
                "linestyle": "none",
                "zorder": 3,
            }
            label = f"held-out: {result.score.loss:.3f}"
            axes.plot([len(result.losses)], [result.score.loss], label=label, color=colour, **end)
    if base is not None:
        label = f"held-out, base model: {base.loss:.3f}"
        axes.plot([0], [base.loss], color="black", marker="D", linestyle="none", label=label)
    finish_loss_axes(axes, "LoRA and LoRA-Pro")
    path.write_bytes(as_png(figure, dpi=100))
