"""What do the figures of several commands share?"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

_COLORS = 192  # of a picture: a third of the bytes, and no visible difference


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Figure, dpi: int) -> bytes:
    """The figure as a PNG file with few colors."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    Image.open(drawn).convert("RGB").quantize(_COLORS, Image.Quantize.FASTOCTREE).save(
        small, format="png", optimize=True
    )
    return small.getvalue()


def smooth(losses: Sequence[float], reach: int = 2) -> list[float]:
    """The mean of each value and up to `reach` neighbours on either side."""
    around = (losses[max(0, place - reach) : place + reach + 1] for place in range(len(losses)))
    return [math.fsum(values) / len(values) for values in around]


def finish_loss_axes(axes: Any, title: str) -> None:
    """Label the axes of loss against step, with a logarithmic loss in plain numbers."""
    axes.set(xlabel="step", ylabel="loss per answer token (log scale)", yscale="log", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize="x-small")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
