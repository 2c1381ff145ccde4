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
from lorapro_hf.commands.demo.settings import METHODS, DemoSettings
from lorapro_hf.commands.demo.training import MethodResult

_CAPTION = (
    "train loss: mean of the last quarter of the steps; step: median of the optimizer's step; state: the optimizer's; "
    "time: of the whole training. A check that training works, not a benchmark: few steps, one seed."
)
_COLOURS = dict(zip(METHODS, ("#0072B2", "#D55E00", "#56B4E9", "#CC79A7", "#009E73"), strict=True))
_MARKERS = dict(zip(METHODS, "os>D^", strict=True))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _title(result: MethodResult) -> str:
    if not result.interrupted:
        return result.method.title
    count = len(result.train_losses)
    return f"{result.method.title} (interrupted after {count} step{'' if count == 1 else 's'})"


def results_table(base: Score | None, results: Sequence[MethodResult]) -> Table:
    """The figures of the base model and of every method side by side."""
    table = Table(title="Held-out problems", caption=_CAPTION, caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    table.add_column("method", overflow="fold")
    # narrow enough for 60 columns
    for title in ("lr", "train\nloss", "held-\nout\nloss", "exact\nmatch", "step\nms", "state\nMB", "time\ns"):
        table.add_column(title, justify="right", no_wrap=True)
    if base is not None:
        table.add_row("base model", "–", "–", f"{base.loss:.3f}", f"{base.exact_match:.1%}", "–", "–", "–")
    for result in results:
        score = result.heldout
        table.add_row(
            _title(result),
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
        **asdict(result),
        "method": result.method.name,
        "title": result.method.title,
        "lora_pro_mode": result.method.lora_pro_mode,
        "lora_pro_trust_region": result.method.trust_region,
        "steps": len(result.train_losses),
        "train_loss_last_quarter": result.train_loss,
        "optimizer_ms_per_step_median": result.median_optimizer_ms,
        "adapter": str(result.adapter),
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
        colour, marker = _COLOURS[result.method.name], _MARKERS[result.method.name]
        steps = range(1, len(result.train_losses) + 1)
        axes.plot(steps, result.train_losses, color=colour, alpha=0.25, linewidth=1)
        label = f"{_title(result)}, lr {result.learning_rate:g}"
        axes.plot(steps, smooth(result.train_losses), color=colour, linewidth=2, label=label)
        if result.heldout is not None:
            point, label = ([len(result.train_losses)], [result.heldout.loss]), f"held-out: {result.heldout.loss:.3f}"
            axes.plot(*point, marker, color=colour, label=label, markersize=9, markeredgecolor="black", zorder=3)
    if base is not None:
        axes.plot([0], [base.loss], "D", color="black", label=f"held-out, base model: {base.loss:.3f}")
    finish_loss_axes(axes, "LoRA and LoRA-Pro")
    path.write_bytes(as_png(figure, dpi=100))
