"""What are the adjusted gradients of these pairs now? One batched projection for each group of equal shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.pairs import LoRAPair, check_scaling, group_by_shape
from lorapro_hf.projection import compute_dtype, project_lora_gradients


class PairBatch(NamedTuple):
    """Pairs of one shape, stacked in the dtype that moments are kept in (float32 at least)."""

    pairs: list[LoRAPair]
    A: Tensor  # (k, ..., r, n)
    B: Tensor  # (k, ..., m, r)
    scaling: Tensor  # (k, ...)

    def project(self, grad_A: Tensor, grad_B: Tensor, config: LoRAProConfig) -> tuple[Tensor, Tensor]:
        """The adjusted gradients for stacked factor gradients, stacked likewise."""
        return project_lora_gradients(
            self.A, self.B, grad_A, grad_B, self.scaling, x_mode=config.x_mode, rtol=config.rtol
        )


class ProjectedBatch(NamedTuple):
    """A batch of pairs with the adjusted gradients of its factors."""

    batch: PairBatch
    h_A: Tensor
    h_B: Tensor


@torch.no_grad()
def project_pairs(pairs: Sequence[LoRAPair], config: LoRAProConfig) -> list[ProjectedBatch]:
    """Adjusted gradients of all pairs that have gradients, in batches; nothing is changed.

    Raises:
        ValueError: a scaling is 0.
        RuntimeError: a gradient is missing for one factor of a pair, sparse or sharded.
    """
    projected = []
    reached = {pair: gradients for pair in pairs if (gradients := pair.gradients()) is not None}
    for group in group_by_shape(reached):
        dtype = compute_dtype(group[0].A, group[0].B)
        batch = _stack(group, dtype)
        grad_A = torch.stack([reached[pair][0] for pair in group]).to(dtype)
        grad_B = torch.stack([reached[pair][1] for pair in group]).to(dtype)
        projected.append(ProjectedBatch(batch, *batch.project(grad_A, grad_B, config)))
    return projected


def global_norm(projected: Sequence[ProjectedBatch]) -> Tensor:
    """The 2-norm of all adjusted factor gradients together, a float32 or float64 scalar left on its device."""
    if not projected:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm([h for batch in projected for h in (batch.h_A, batch.h_B)])


@torch.no_grad()
def project_pair_gradients_(pairs: Sequence[LoRAPair], config: LoRAProConfig) -> Tensor:
    """Overwrite the `.grad` of every pair's factors with the adjusted gradients, ahead of any optimizer's step.

    Factors that tied layers hold a second time lose their `.grad`: the first layer's carries the sum.

    Args:
        pairs: as `find_lora_pairs` gives them; pairs without gradients are left out.
        config: its `x_mode` and `rtol` are used.

    Returns:
        The global 2-norm of the adjusted gradients, a scalar on their device.

    Raises:
        ValueError: a scaling is 0.
        RuntimeError: a gradient is missing for one factor of a pair, sparse or sharded.
    """
    projected = project_pairs(pairs, config)
    for (group, *_), h_A, h_B in projected:
        for pair, matrix_A, matrix_B in zip(group, h_A, h_B, strict=True):
            for parameter, h in ((pair.A, pair.factor_A(matrix_A)), (pair.B, pair.factor_B(matrix_B))):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(h)
            for parameter in pair.tied_parameters:
                parameter.grad = None
    return global_norm(projected)


def _stack(group: list[LoRAPair], dtype: torch.dtype) -> PairBatch:
    A = torch.stack([pair.matrix_A(pair.A) for pair in group]).to(dtype)
    B = torch.stack([pair.matrix_B(pair.B) for pair in group]).to(dtype)
    scaling = torch.tensor([check_scaling(pair) for pair in group], dtype=dtype, device=A.device)
    return PairBatch(group, A, B, scaling.view(-1, *[1] * (A.dim() - 3)).expand(A.shape[:-2]))
