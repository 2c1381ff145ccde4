"""How long do forward and backward pass of a fused LoRA layer take beside PEFT's, and how much do both keep?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorapro_hf.commands.bench.measure import Bench, timed_ms
from lorapro_hf.commands.bench.results import LayerTime, Spread
from lorapro_hf.commands.bench.settings import DTYPES, ModelShapes
from lorapro_hf.methods.fused_layers import CRITERIA, fuse_lora_layers

MEASURED = ("q_proj", "k_proj", "gate_proj", "down_proj")
_PEFT = "PEFT"


def measure_layers(bench: Bench, model: ModelShapes, rank: int, dtype: str) -> None:
    """Measure one layer of each shape of a model in turns, by PEFT and fused by each criterion."""
    for name, m, n in model.block:
        for tokens in bench.settings.tokens if name in MEASURED else ():
            bench.say(f"{model.title} {name}, r={rank} {dtype}, {tokens} tokens")
            bench.outcome.layers.append(_measure(bench, (model.name, name), (m, n, rank, tokens), dtype))


def _measure(bench: Bench, names: tuple[str, str], sizes: tuple[int, int, int, int], dtype: str) -> LayerTime:
    m, n, rank, tokens = sizes
    torch.manual_seed(bench.settings.seed)
    kind: torch.dtype = getattr(torch, DTYPES[dtype])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    peft = get_peft_model(nn.Sequential(nn.Linear(n, m, bias=False)), config).to(bench.device, kind)
    layers = {_PEFT: peft, **{criterion: deepcopy(peft) for criterion in CRITERIA}}
    for criterion in CRITERIA:
        fuse_lora_layers(layers[criterion], criterion)
    x, dy = (torch.randn(1, tokens, size, device=bench.device, dtype=kind) for size in (n, m))
    passes = {name: _pass_of(layer, x, dy) for name, layer in layers.items()}
    kept = {name: kept_bytes(layer, x) for name, layer in layers.items()}
    estimate = max(timed_ms(one) for one in passes.values())  # warms up; by time the order is measured
    count = max(2, min(bench.settings.rounds * bench.settings.repeats, int(bench.settings.seconds * 1e3 / estimate)))
    times = _in_turns([*passes.values()], count)
    (of_peft, _), *fused = ((spread, name) for spread, name in zip(map(Spread.of, times), passes, strict=True))
    return LayerTime(
        *names,
        rank,
        dtype,
        tokens,
        of_peft,
        {name: spread for spread, name in fused},
        {name: of_peft.median / spread.median for spread, name in fused},
        kept,
    )


def _pass_of(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    wanted = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def forward_and_backward() -> None:
        own = x.detach().requires_grad_()
        torch.autograd.grad(layer(own), [own, *wanted], dy)

    return forward_and_backward


def _in_turns(passes: Sequence[Callable[[], object]], count: int) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in passes]
    for turn in range(count):
        for place in range(len(passes)):
            index = (turn + place) % len(passes)
            samples[index].append(timed_ms(passes[index]))
    return samples


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """The memory that a forward pass keeps for the backward pass, beyond its input and the parameters."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x.detach().requires_grad_())
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    return sum(size for address, size in kept.items() if address not in known)
