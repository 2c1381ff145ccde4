"""Which optimizers are measured, on which models, and how?"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorapro_hf.commands.common.arguments import option
from lorapro_hf.config import MODES
from lorapro_hf.options import UsageError, at_least_one, rate

BASELINE = "adamw"
DTYPES: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16"}
PARTS = ("ratios", "growth", "training", "layers")


@dataclass(frozen=True)
class MeasuredOptimizer:
    """An optimizer to measure."""

    name: str  # on the command line and in `results.json`
    title: str  # in tables
    builder: str  # the function in `common.optimizers.BUILDERS` that builds it with `settings`
    settings: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None  # the module that it needs beyond lorapro_hf's own dependencies
    install: str | None = None  # the requirement that installs the module

    @property
    def ours(self) -> bool:
        """Whether it is a mode of LoRA-Pro."""
        return self.builder == "lorapro"

    @property
    def dense_moments(self) -> bool:
        """Whether it keeps moments of the size of the adapted weights."""
        if not self.ours:
            return self.name == "adamw_full"
        from lorapro_hf.optim.rules import RULES  # needs torch, and the command line's help does not

        return RULES[self.name].keeps_dense_moments

    @property
    def dense(self) -> bool:
        """Whether its memory grows with m·n or m·m."""
        return self.dense_moments or self.package == "lora_pro"


def _peer(mode: str) -> MeasuredOptimizer:
    name, title, settings = f"adamw_{mode}", f"lora-pro-adamw {mode}", {"lorapro_mode": mode}
    return MeasuredOptimizer(name, title, "lora_pro_adamw", settings, "lora_pro", "lora-pro-adamw==0.2.1")


_METHODS = (
    MeasuredOptimizer(BASELINE, "AdamW (fused)", "adamw"),
    *(MeasuredOptimizer(mode, f"LoRA-Pro {mode}", "lorapro", {"mode": mode}) for mode in MODES),
    _peer("efficient"),
    _peer("full"),
    MeasuredOptimizer("riemannian", "PEFT Riemannian", "riemannian", {"fused": False}),
    MeasuredOptimizer("lorafa", "PEFT LoRA-FA", "lorafa"),
    MeasuredOptimizer("lorarite", "LoRARite", "lorarite", {}, "pytorch_optimizer", "pytorch_optimizer>=4.1"),
)
METHODS: Mapping[str, MeasuredOptimizer] = {method.name: method for method in _METHODS}


def missing(method: MeasuredOptimizer) -> str | None:
    """How to install the package of a method, or `None` if it is there."""
    if method.package is None or importlib.util.find_spec(method.package) is not None:
        return None
    return f"not installed: pip install '{method.install}'"


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a Llama-like model, whose linear layers are all adapted."""

    name: str  # on the command line
    title: str  # in tables
    hidden: int
    kv: int  # output size of the key and value projections
    ffn: int
    layers: int
    vocabulary: int
    head_size: int
    trained: bool = False  # small enough for whole training steps and for growth

    @property
    def block(self) -> tuple[tuple[str, int, int], ...]:
        """Name, output size m and input size n of the linear layers of one block."""
        h, kv, ffn = self.hidden, self.kv, self.ffn
        attention = (("q_proj", h, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, h))
        return (*attention, ("gate_proj", ffn, h), ("up_proj", ffn, h), ("down_proj", h, ffn))


MODELS: Mapping[str, ModelShapes] = {
    model.name: model
    for model in (
        ModelShapes("smollm2-135m", "SmolLM2-135M", 576, 192, 1536, 30, 49152, 64, trained=True),
        ModelShapes("llama-3.2-1b", "Llama-3.2-1B", 2048, 512, 8192, 16, 128256, 64),
        ModelShapes("llama-2-7b", "Llama-2-7B", 4096, 4096, 11008, 32, 32000, 128),
        ModelShapes("tiny", "tiny", 32, 16, 48, 2, 64, 16, trained=True),  # for a trial run
    )
}
DEFAULT_WORKLOADS = ("smollm2-135m", "llama-3.2-1b", "llama-2-7b")
_WHAT, _HOW = "what to measure", "how to measure"


def _names(default: tuple[str, ...], choices: Mapping[str, Any] | tuple[str, ...], metavar: str, help: str) -> Any:
    known = tuple(choices)
    help += "" if known == default else f"; any of {', '.join(known)}"
    return option(default, help, _WHAT, choices=known, metavar=metavar)


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a benchmark run; each field is an option of `lorapro bench`.

    Raises:
        UsageError: a name is repeated.
    """

    workloads: tuple[str, ...] = _names(DEFAULT_WORKLOADS, MODELS, "WORKLOAD", "models whose linear layers are adapted")
    dtypes: tuple[str, ...] = _names(tuple(DTYPES), DTYPES, "DTYPE", "dtypes of the factors")
    methods: tuple[str, ...] = _names(tuple(METHODS), METHODS, "METHOD", "optimizers; fused AdamW is always among them")
    parts: tuple[str, ...] = _names(
        PARTS[:3],
        PARTS,
        "PART",
        "side by side comparison, growth of a step, share of a training step; fused layers beside PEFT's",
    )
    ranks: tuple[int, ...] = option((8, 64, 256), "ranks", _WHAT, type=at_least_one, metavar="R")
    tokens: tuple[int, ...] = option(
        (512, 2048, 4096), "inputs of the part layers", _WHAT, type=at_least_one, metavar="N"
    )
    device: str = option("cpu", "where", _HOW, choices=("cpu", "cuda"))
    threads: int | None = option(
        None, "threads of torch on the CPU (default: torch's)", _HOW, type=at_least_one, metavar="N"
    )
    rounds: int = option(5, "turns of each method", _HOW, type=at_least_one, metavar="N")
    repeats: int = option(3, "timed steps a turn", _HOW, type=at_least_one, metavar="N")
    seconds: float = option(3.0, "time for a method in each workload", _HOW, type=rate, metavar="S")
    minutes: float = option(45.0, "begin no new workload after this", _HOW, type=rate, metavar="M")
    autocast: bool | None = option(
        None,
        "training step under bf16 autocast (default: if the device has bf16 instructions)",
        _HOW,
        action=argparse.BooleanOptionalAction,
    )
    seed: int = option(0, "decides factors and gradients", _HOW, type=int)
    output_dir: Path | None = option(  # noqa: RUF009
        None,
        "for the tables results.md and results.json (default: benchmarks/ and the name of the device)",
        type=Path,
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        for name in ("workloads", "dtypes", "methods", "parts", "ranks", "tokens"):
            chosen = getattr(self, name)
            if len(set(chosen)) < len(chosen):
                raise UsageError(f"--{name} names one twice: {chosen}.")

    @property
    def measured(self) -> tuple[MeasuredOptimizer, ...]:
        """The methods to measure in the order of `METHODS`, with the baseline."""
        return tuple(method for name, method in METHODS.items() if name in self.methods or name == BASELINE)

    @property
    def compared_modes(self) -> tuple[MeasuredOptimizer, ...]:
        """The baseline and the modes of LoRA-Pro among the methods."""
        return tuple(method for method in self.measured if method.ours or method.name == BASELINE)

    @property
    def small_model(self) -> ModelShapes:
        """The first model that is small enough to be enlarged or trained, else SmolLM2-135M."""
        models = [MODELS[name] for name in self.workloads if MODELS[name].trained]
        return (models or [MODELS["smollm2-135m"]])[0]
