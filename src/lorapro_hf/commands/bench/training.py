"""Which share of a whole training step is the optimizer's?"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorapro_hf.commands.bench.measure import RATE, Bench, timed_ms
from lorapro_hf.commands.bench.results import Spread, TrainingShare
from lorapro_hf.commands.bench.settings import ModelShapes
from lorapro_hf.commands.common.optimizers import build

BATCH, TOKENS, RANK = 8, 64, 8
_ROUNDS, _STEPS = 2, 3  # the first step of each turn is left out


def computes_bf16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bf16 matrices in hardware (False if it cannot be determined)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    words = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)


def llama_config(shapes: ModelShapes) -> LlamaConfig:
    """The configuration of a Llama of the shapes of a model."""
    return LlamaConfig(
        vocab_size=shapes.vocabulary,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.ffn,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.hidden // shapes.head_size,
        num_key_value_heads=shapes.kv // shapes.head_size,
        tie_word_embeddings=True,
        use_cache=False,
    )


def _model(shapes: ModelShapes, device: torch.device, seed: int) -> PeftModel:
    """The model's architecture with random weights, and LoRA on all linear layers; B is not zero."""
    torch.manual_seed(seed)
    names = [name for name, _, _ in shapes.block]
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(llama_config(shapes)).to(device), adapter)


def measure_shares(bench: Bench) -> None:
    """Train a few steps with the baseline and with each mode of LoRA-Pro, in turns, and time the parts of each step."""
    settings, device, shapes = bench.settings, bench.device, bench.settings.small_model
    native = computes_bf16(device)
    autocast = native if settings.autocast is None else settings.autocast
    if settings.autocast is None and not native:
        bench.outcome.notes.append(
            "Training step in fp32: without bf16 instructions bf16 autocast takes minutes a step."
        )
    model = _model(shapes, device, settings.seed)
    tokens = torch.randint(shapes.vocabulary, (BATCH, TOKENS), device=device)

    def forward_and_backward() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()

    optimizers = {
        method.name: build(method.builder, model, RATE, method.settings) for method in settings.compared_modes
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in optimizers}
    for turn in range(_ROUNDS):
        for name, optimizer in optimizers.items():
            for step in range(_STEPS):
                bench.say(f"{name}: training step {step + 1} of {_STEPS}, turn {turn + 1} of {_ROUNDS}")
                model.zero_grad(set_to_none=False)
                took = timed_ms(forward_and_backward), timed_ms(optimizer.step)
                times[name] += [took] if step > 0 else []
    precision = "bf16 autocast" if autocast else "fp32"
    for name, pairs in times.items():
        of_model, of_step = (Spread.of(each) for each in zip(*pairs, strict=True))
        share = of_step.median / statistics.median(map(sum, pairs))
        bench.outcome.training.append(TrainingShare(name, shapes.name, precision, of_model, of_step, share))
