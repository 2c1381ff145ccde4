"""Which table, pictures and figures does a demo run show and keep?"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from lorapro_hf.commands.common.plots import as_png, finish_loss_axes, new_figure, smooth
from lorapro_hf.commands.common.records import environment, write_json
from lorapro_hf.commands.compare.significance import Estimate
from lorapro_hf.commands.demo.closeness import Closeness, medians
from lorapro_hf.commands.demo.curves import MethodFigures
from lorapro_hf.commands.demo.settings import CLOSENESS_STEPS, MODEL_RANK, TASK, DemoSettings

_GOAL = ("#4d4d4d", "--")
_STYLES = {"lora": ("#0072B2", "-"), "lora_pro": ("#D55E00", "-"), "best": _GOAL, "full": _GOAL}
_DPI = 160
_DIGITS = 4  # of losses and cosines in the JSON
_WINDOW = 40  # a drawn loss is a mean over one part of so many of the steps


@dataclass
class ModelFigures:
    """How the language model was fine-tuned: its scores on the held-out problems, and the answers of stock PEFT."""

    adapter: str
    before: dict[str, float]
    losses: list[float] = field(default_factory=list)  # of the steps
    after: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)  # "prompt", "answer", "expected" and "right"

    def sentence(self) -> str:
        """The result in plain English, with a problem and its answer."""
        total, (before, after) = len(self.answers), (scores["exact_match"] for scores in (self.before, self.after))
        first = next((each for each in self.answers if each["right"]), self.answers[0])
        which = "the first right one" if first["right"] else "none is right, and this is the first"
        return (
            f"{len(self.losses)} steps of LoRA-Pro: loss on held-out problems {self.before['loss']:.3f} → "
            f"{self.after['loss']:.3f}, right answers {before * total:.0f} → {after * total:.0f} of {total}. The later "
            f"answers are from a fresh process, where PeftModel.from_pretrained has loaded {self.adapter}; {which}:\n"
            f"{first['prompt']} {first['answer']}\n"
            f"(expected: {first['expected'].splitlines()[-1]}; all answers are in results.json)"
        )


@dataclass
class DemoFigures:
    """All figures so far."""

    closeness: list[Closeness] = field(default_factory=list)
    methods: list[MethodFigures] = field(default_factory=list)
    model: ModelFigures | None = None
    times_s: dict[str, float] = field(default_factory=dict)  # of the parts
    stopped: bool = False

    def __bool__(self) -> bool:
        return bool(self.closeness or self.methods or self.model)


def results_table(methods: Sequence[MethodFigures], settings: DemoSettings) -> Table:
    """The methods of the loss curves side by side."""
    title = f"Puzzles in characters, rank {TASK['ranks'][0]}, {settings.steps} steps, {_seeds(settings)}"
    caption = (
        "Loss and exact match on held-out puzzles; early: mean training loss of the first quarter of the steps; state: "
        "the optimizer's. Means ± standard errors over the seeds."
    )
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    table.add_column("method", overflow="fold")
    for name in ("rate", "final\nloss", "exact\nmatch", "early\nloss", "state\nkB", "step\nms"):  # for 60 columns
        table.add_column(name, justify="right", no_wrap=True)
    for each in methods:
        table.add_row(
            each.title,
            f"{each.learning_rate:g}",
            _cell(each.figures.get("loss"), ".3f"),
            _cell(each.figures.get("exact_match"), ".1f", 100.0),
            _cell(each.figures.get("early"), ".2f"),
            "–" if each.state_bytes is None else f"{each.state_bytes / 1e3:.0f}",
            _cell(each.figures.get("step_ms"), ".1f"),
        )
    return table


def _seeds(settings: DemoSettings) -> str:
    return f"{settings.seeds} seed{'' if settings.seeds == 1 else 's'}"


def _cell(found: Estimate | None, form: str, scale: float = 1.0) -> str:
    if found is None:
        return "–"
    error = "" if found.error is None else f"±{scale * found.error:{form}}".replace("±0.", "±.")
    return f"{scale * found.mean:{form}}{error}"


def draw(figures: DemoFigures, settings: DemoSettings) -> dict[str, bytes]:
    """PNGs by name: closeness, loss curves, and both side by side."""
    panels: dict[str, Any] = {}
    if figures.closeness:
        panels["closeness"] = lambda axes: _closeness(axes, figures.closeness)
    if any(method.losses for method in figures.methods):
        panels["loss_curves"] = lambda axes: _curves(axes, figures.methods, settings)
    pictures = {name: _picture([panel]) for name, panel in panels.items()}
    return {**pictures, "demo": _picture(list(panels.values()))} if len(panels) == 2 else pictures


def _picture(panels: Sequence[Any]) -> bytes:
    figure = new_figure(8.0 if len(panels) > 1 else 6.4, 3.7)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        panel(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.2)
        axes.tick_params(labelsize=9)
        axes.title.set_fontsize(10)
    return as_png(figure, dpi=_DPI)


def _closeness(axes: Any, measured: Sequence[Closeness]) -> None:
    """Cosines by transformer block: the median of its layers and their range."""
    blocks: dict[int, list[Closeness]] = {}
    for place, each in enumerate(measured):
        number = re.search(r"\.(\d+)\.", each.layer)
        blocks.setdefault(int(number[1]) if number else place, []).append(each)
    middle = medians(measured)
    titles = {"best": f"best possible at rank {MODEL_RANK}", "lora_pro": "LoRA-Pro", "lora": "LoRA"}
    for name, title in titles.items():
        colour, line = _STYLES[name]
        values = [[getattr(each, name) for each in layers] for layers in blocks.values()]
        label = f"{title}: {middle[name]:.2f}"
        axes.plot(list(blocks), [statistics.median(v) for v in values], line, color=colour, lw=2, label=label)
        axes.fill_between(list(blocks), list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
    axes.set(ylim=(0.0, 1.03), xlabel="transformer block", ylabel="cosine to the full gradient")
    axes.set_title(f"Direction of the update, after {CLOSENESS_STEPS} steps")
    axes.legend(fontsize=8.5, title="median of all layers", title_fontsize=8.5, loc="lower center")  # below the curves


def _curves(axes: Any, methods: Sequence[MethodFigures], settings: DemoSettings) -> None:
    """The smoothed training losses: the mean over the seeds, and each seed."""
    steps = range(1, settings.steps + 1)
    for method in (each for each in methods if each.losses):
        colour, line = _STYLES[method.method]
        runs = [smooth(losses, max(1, settings.steps // (2 * _WINDOW))) for losses in method.losses]
        for losses in runs:
            axes.plot(steps, losses, color=colour, alpha=0.25, lw=0.7)
        mean = [statistics.fmean(each) for each in zip(*runs, strict=True)]
        axes.plot(steps, mean, line, color=colour, lw=2, label=method.title)
    finish_loss_axes(axes, f"Training to the end, {_seeds(settings)}, r = {TASK['ranks'][0]}")


def write(figures: DemoFigures, settings: DemoSettings) -> list[str]:
    """Write `results.json` and the pictures; gives the paths of the pictures."""
    content = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {**asdict(settings), "output_dir": str(settings.output_dir)},
        "environment": environment(),
        **_rounded(asdict(figures)),
        "closeness_medians": _rounded(medians(figures.closeness)) if figures.closeness else None,
    }
    write_json(settings.output_dir / "results.json", content)
    pictures = draw(figures, settings)
    for name, picture in pictures.items():
        (settings.output_dir / f"{name}.png").write_bytes(picture)
    return [str(settings.output_dir / f"{name}.png") for name in pictures]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
