"""Are fused LoRA layers right on a GPU, do they leave the host free, and how long do they take beside PEFT's?"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gpu_parts.record import Record, distance
from lorapro_hf import fuse_lora_layers
from lorapro_hf.commands.bench.layers import measure_layers
from lorapro_hf.commands.bench.measure import Bench
from lorapro_hf.commands.bench.probes import waits_for_device
from lorapro_hf.commands.bench.results import Outcome
from lorapro_hf.commands.bench.settings import MODELS, BenchSettings
from lorapro_hf.methods.fused_layers import CRITERIA

HALF, SINGLE = torch.bfloat16, torch.float32
# (title, dtypes of the weight and of the factors, whether autocast runs, limit)
PRECISIONS = [
    ("fp32", SINGLE, SINGLE, False, 1e-5),
    ("bf16", HALF, HALF, False, 2e-2),
    ("bf16 with fp32 factors", HALF, SINGLE, False, 2e-2),
    ("fp32 under bf16 autocast", SINGLE, SINGLE, True, 2e-2),
    ("bf16 with fp32 factors under bf16 autocast", HALF, SINGLE, True, 2e-2),
]
SHAPES = [(256, 192, 16, 64), (192, 256, 64, 300), (64, 256, 64, 1024)]  # m, n, r and tokens
NAMES = ("output", "gradient of x", "gradient of A", "gradient of B")
TIMED = [*product(("smollm2-135m", "llama-2-7b"), (8, 128), ("bf16", "fp32"))]


def check_layers(record: Record) -> None:
    """Compare outputs and gradients of fused layers with dense products in float64."""
    for title, *precision in PRECISIONS:
        for shape in SHAPES[:1] if record.is_tiny else SHAPES:
            for criterion in CRITERIA:
                name = f"fused by {criterion}, {title}, {'×'.join(map(str, shape))}"
                record.attempt(name, partial(_check, record, name, criterion, shape, *precision))


def _check(
    record: Record,
    name: str,
    criterion: str,
    shape: tuple[int, int, int, int],
    of_weight: torch.dtype,
    of_factors: torch.dtype,
    is_cast: bool,
    limit: float,
) -> None:
    m, n, r, tokens = shape
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=r // 2, target_modules=["0"], init_lora_weights=False)
    peft = get_peft_model(nn.Sequential(nn.Linear(n, m)), config).to(record.device)
    layer = peft.base_model.model[0]
    layer.base_layer.to(of_weight)
    A, B = layer.lora_A["default"].to(of_factors).weight, layer.lora_B["default"].to(of_factors).weight
    x = torch.randn(2, tokens // 2, n, device=record.device, dtype=of_weight, requires_grad=True)
    dy = torch.randn(2, tokens // 2, m, device=record.device)
    fused = copy.deepcopy(peft)
    if fuse_lora_layers(fused, criterion) != 1:
        raise RuntimeError("the layer is not fused")
    of_copy = fused.base_model.model[0]

    def pass_() -> list[Tensor]:
        with torch.autocast(record.device.type, dtype=HALF, enabled=is_cast):
            out = of_copy(x)
        wanted = [x, of_copy.lora_A["default"].weight, of_copy.lora_B["default"].weight]
        return [out, *torch.autograd.grad(out, wanted, dy.to(out.dtype))]

    found = pass_()
    sources = [tensor.detach().double().requires_grad_() for tensor in (x, A, B)]
    base = layer.base_layer
    weight = base.weight.detach().double() + layer.scaling["default"] * sources[2] @ sources[1]
    expected = sources[0] @ weight.mT + base.bias.detach().double()
    oracle = [expected, *torch.autograd.grad(expected, sources, dy.to(found[0].dtype).double())]
    for title, one, other in zip(NAMES, found, oracle, strict=True):
        record.check(f"{name}: {title}", distance(one, other), limit)
    if record.on_cuda:
        record.check(f"{name}: waits for the device", float(waits_for_device(pass_) is not None), 0)


def measure_layer_times(record: Record) -> None:
    """Measure forward and backward passes of single layers, as `lorapro bench --parts layers` does."""
    tokens = (64,) if record.is_tiny else (2048,)
    settings = BenchSettings(tokens=tokens, device=record.device.type, rounds=5, repeats=4, seconds=0.2)
    outcome = Outcome({})
    bench = Bench(settings, record.device, outcome)
    for name, rank, dtype in [("tiny", 4, "fp32")] if record.is_tiny else TIMED:
        work = partial(measure_layers, bench, MODELS[name], rank, dtype)
        record.attempt(f"layers of {MODELS[name].title}, r={rank}, {dtype}", work, needs_seconds=5.0)
        record.found.figures["layers"] = [asdict(each) for each in outcome.layers]
        record.save()


def table_of_layers(layers: list[dict[str, Any]]) -> list[str]:
    """One table of all measured layers."""
    lines = ["## Fused layers", "", "| model | layer | r | dtype | tokens | PEFT ms | × by flops | × by time |"]
    lines += ["|---|---|---:|---|---:|---:|---:|---:|"]
    for each in layers:
        cells = [MODELS[each["workload"]].title, *(each[key] for key in ("layer", "rank", "dtype", "tokens"))]
        cells += [f"{each['peft_ms']['median']:.3g}", *(f"{each['gains'][name]:.2f}" for name in CRITERIA)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
