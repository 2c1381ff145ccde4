"""Which factors and gradients does a measured step work on?

A PEFT model has the layers of a real one, but base weights that take no memory: optimizers read factors and gradients
only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorapro_hf.commands.bench.settings import DTYPES, ModelShapes

_ALPHA = 16
_GRADIENT = 1e-3


@dataclass(frozen=True)
class Workload:
    """Factor pairs of some blocks of a model."""

    name: str  # in tables
    block: tuple[tuple[str, int, int], ...]  # name, m and n of the linear layers of one block
    layers: int  # number of blocks
    rank: int
    dtype: str  # `fp32` or `bf16`
    whole: bool = True  # whether these are all blocks of the model

    @classmethod
    def of(cls, model: ModelShapes, rank: int, dtype: str, layers: int | None = None) -> Workload:
        """All blocks of a model, or the given number of them."""
        count = model.layers if layers is None else layers
        return cls(model.name, model.block, count, rank, dtype, count == model.layers)

    @property
    def elements(self) -> int:
        """Elements of all adapted weights."""
        return self.layers * sum(m * n for _, m, n in self.block)


def _frozen_linear(m: int, n: int) -> nn.Linear:
    layer = nn.Linear(n, m, bias=False, device="meta")
    # one element expanded to the whole matrix; PEFT would leave factors of a meta weight on the meta device
    layer.weight = nn.Parameter(torch.full((1,), 0.02).expand(m, n), requires_grad=False)
    return layer


class SyntheticModel:
    """A model with LoRA whose factors get the same gradients before every step; `seed` decides both."""

    def __init__(self, workload: Workload, device: torch.device, seed: int = 0) -> None:
        blocks = (
            nn.ModuleDict({name: _frozen_linear(m, n) for name, m, n in workload.block}) for _ in range(workload.layers)
        )
        config = LoraConfig(r=workload.rank, lora_alpha=_ALPHA, target_modules=[name for name, _, _ in workload.block])
        self.model: PeftModel = get_peft_model(
            nn.Sequential(*blocks), config, low_cpu_mem_usage=True, autocast_adapter_dtype=False
        )
        generator = torch.Generator().manual_seed(seed)
        dtype: torch.dtype = getattr(torch, DTYPES[workload.dtype])

        def values(m: int, n: int, scale: float) -> Tensor:
            return (torch.randn(m, n, generator=generator) * scale).to(device, dtype)

        # All blocks share the values of one: an optimizer takes as long for them as for others.
        r = workload.rank
        factors = {name: (values(r, n, n**-0.5), values(m, r, 0.02)) for name, m, n in workload.block}
        gradients = {name: (values(r, n, _GRADIENT), values(m, r, _GRADIENT)) for name, m, n in workload.block}
        self.factors: list[nn.Parameter] = []  # in the order A, B, A, B
        self._gradients: list[Tensor] = []
        for path, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                name = path.rsplit(".", 1)[-1]
                for module, value in zip(
                    (layer.lora_A["default"], layer.lora_B["default"]), factors[name], strict=True
                ):
                    module.weight = nn.Parameter(value.clone())
                    self.factors.append(module.weight)
                self._gradients += gradients[name]
        for factor, gradient in zip(self.factors, self._gradients, strict=True):
            factor.grad = gradient.clone()

    def restore_gradients(self) -> None:
        """Write the gradients anew, as a backward would: some optimizers overwrite them."""
        gradients = [factor.grad for factor in self.factors if factor.grad is not None]
        with torch.no_grad():
            torch._foreach_copy_(gradients, self._gradients)
