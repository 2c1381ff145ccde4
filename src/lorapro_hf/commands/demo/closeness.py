"""How close to the gradient of full fine-tuning do LoRA and LoRA-Pro move each weight?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapro_hf.diagnostics.figures import Factors, distance
from lorapro_hf.factors.pairs import unwrapped_name
from lorapro_hf.factors.weight_gradients import weight_gradients


@dataclass(frozen=True)
class Closeness:
    """Cosines between the gradient of a layer's weight and the directions in which factors move it.

    Attributes:
        layer: its name.
        lora: of plain LoRA's gradients.
        lora_pro: of LoRA-Pro's gradients, the largest that these factors permit.
        best: the largest that any factors of this rank permit.
    """

    layer: str
    lora: float
    lora_pro: float
    best: float


@torch.no_grad()
def measure(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[Closeness]:
    """The closeness of all adapted layers, from the mean gradient over the batches.

    Layers whose weights are no matrices are left out.
    """
    measured = []
    for pair, g in weight_gradients(model, batches):
        if g.dim() == 2 and bool(g.any()):
            A, B, s = pair.A.detach().to(g), pair.B.detach().to(g), pair.scaling
            factors = Factors(A, B, s * (B.mT @ g), s * (g @ A.mT), s)
            directions = factors.own_gradient(), factors.equivalent_gradient()
            lora, lora_pro = (distance(g, direction)[2] for direction in directions)
            measured.append(Closeness(unwrapped_name(pair.name), lora, lora_pro, best_cosine(g, A.shape[0])))
    return measured


def best_cosine(g: Tensor, rank: int) -> float:
    """The largest cosine between g `(m, n)` and any direction `B X + Y A` with factors of a rank.

    The directions have up to twice the rank; A and B can hold the first singular vectors, so that the closest one is
    the truncated singular value decomposition of g.
    """
    unit = g / torch.linalg.vector_norm(g)
    squares = torch.linalg.eigvalsh(unit @ unit.mT if g.shape[0] < g.shape[1] else unit.mT @ unit).clamp(min=0)
    return float((squares[-2 * rank :].sum() / squares.sum()).sqrt())


def medians(measured: Sequence[Closeness]) -> dict[str, float]:
    """The median cosines over the layers."""
    return {name: statistics.median(getattr(each, name) for each in measured) for name in ("lora", "lora_pro", "best")}


def sentence(measured: Sequence[Closeness], rank: int) -> str:
    """The result in plain English."""
    middle, closer = medians(measured), sum(each.lora_pro > each.lora for each in measured)
    return (
        "LoRA-Pro moves the weights more nearly as full fine-tuning would: the cosine between its direction and the "
        f"full gradient is {middle['lora_pro']:.2f}, that of LoRA's {middle['lora']:.2f} (medians over {len(measured)} "
        f"layers; closer in {closer} of them). The best factors of rank {rank} would permit {middle['best']:.2f}."
    )
