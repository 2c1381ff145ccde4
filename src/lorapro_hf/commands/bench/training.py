"""What share of a whole training step is the optimizer's?"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorapro_hf.commands.bench.growth import small_model
from lorapro_hf.commands.bench.measure import timed_ms
from lorapro_hf.commands.bench.peers import build_optimizer
from lorapro_hf.commands.bench.results import Outcome, Share
from lorapro_hf.commands.bench.settings import BASELINE, BenchSettings, ModelShapes

BATCH, TOKENS, RANK = 8, 64, 8
_ROUNDS, _STEPS = 2, 3  # the first step of each turn is left out
NO_BF16 = "fp32: this CPU has no bf16 instructions, without which bf16 autocast takes minutes a step"


@dataclass
class _Trained:
    """A model with adapters, as the optimizers want it."""

    model: PeftModel
    factors: list[nn.Parameter]
    rank: int = RANK


def computes_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (False where that cannot be told)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if platform.system() != "Linux" or not cpuinfo.exists():
        return False
    words = set(cpuinfo.read_text(encoding="utf-8").split())
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _model(shapes: ModelShapes, device: torch.device, seed: int) -> _Trained:
    """The model's architecture with random weights, and LoRA on all linear layers; B is not zero."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.ffn,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.hidden // shapes.head_size,
        num_key_value_heads=shapes.kv // shapes.head_size,
        tie_word_embeddings=True,
        use_cache=False,
    )
    names = [name for name, _, _ in shapes.block]
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config).to(device), adapter)
    return _Trained(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def measure_shares(settings: BenchSettings, outcome: Outcome, device: torch.device, say: Callable[[str], None]) -> None:
    """Train a few steps with the baseline and with each mode of LoRA-Pro, in turns, and time the parts of each step."""
    native = computes_bf16(device)
    autocast = native if settings.autocast is None else settings.autocast
    note = NO_BF16 if settings.autocast is None and not native else None
    shapes = small_model(settings)
    trained = _model(shapes, device, settings.seed)
    tokens = torch.randint(trained.model.config.vocab_size, (BATCH, TOKENS), device=device)

    def forward_and_backward() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = trained.model(input_ids=tokens, labels=tokens).loss
        loss.backward()

    optimizers: dict[str, tuple[Any, Share]] = {}
    for method in settings.measured:
        if method.name == BASELINE or method.mode is not None:
            share = Share(method.name, shapes.name, "bf16 autocast" if autocast else "fp32", note=note)
            outcome.shares.append(share)
            optimizers[method.name] = (build_optimizer(method.name, trained), share)
    for turn in range(_ROUNDS):
        for name, (optimizer, share) in optimizers.items():
            for step in range(_STEPS):
                say(f"{name}: training step {step + 1} of {_STEPS}, turn {turn + 1} of {_ROUNDS}")
                trained.model.zero_grad(set_to_none=False)
                model_ms = timed_ms(forward_and_backward, device)
                step_ms = timed_ms(optimizer.step, device)
                if step > 0:
                    share.model_ms.append(model_ms)
                    share.step_ms.append(step_ms)
