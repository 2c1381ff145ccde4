"""What can be benchmarked, against whom, and what goes unsaid?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorapro_hf.config import MODES
from lorapro_hf.optim.rules import RULES
from lorapro_hf.options import UsageError

BASELINE = "adamw"
DTYPES: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16"}
PARTS = ("ratios", "growth", "training")
RANKS = (8, 64, 256)


@dataclass(frozen=True)
class Method:
    """An optimizer to measure.

    Args:
        name: Its name on the command line and in `results.json`.
        title: Its name in the tables.
        mode: The mode of LoRA-Pro; `None` for the others.
        package: The module that it comes from; `None` if it comes with what lorapro_hf needs anyway.
        install: What to install for that module.
        dense: Whether its work or its memory grows with m·n, or with m·m.
    """

    name: str
    title: str
    mode: str | None = None
    package: str | None = None
    install: str | None = None
    dense: bool = False

    @property
    def dense_moments(self) -> bool:
        """Whether it keeps moments of the size of the adapted weights."""
        return self.dense and self.name != "adamw_efficient"


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(BASELINE, "AdamW (fused)"),
        # a mode that is not known to be small is taken for dense
        *(Method(mode, f"LoRA-Pro {mode}", mode, dense=RULES[mode].keeps_dense_moments) for mode in MODES),
        *(
            Method(f"adamw_{mode}", f"lora-pro-adamw {mode}", None, "lora_pro", "lora-pro-adamw==0.2.1", dense=True)
            for mode in ("efficient", "full")
        ),
        Method("riemannian", "PEFT Riemannian"),
        Method("lorafa", "PEFT LoRA-FA"),
        Method("lorarite", "LoRARite", None, "pytorch_optimizer", "pytorch_optimizer>=4.1"),
    )
}


@dataclass(frozen=True)
class ModelShapes:
    """The linear layers of a Llama-like model, all adapted.

    Args:
        name: Its name on the command line.
        title: Its name in the tables.
        hidden: Width of the model.
        kv: Output size of the key and value projections.
        ffn: Width of the feed-forward part.
        layers: Number of transformer blocks.
        vocabulary: Number of tokens, for the training step.
        head_size: Size of an attention head, for the training step.
        trained: Whether the whole training step is measured with it: the base model is built for that.
    """

    name: str
    title: str
    hidden: int
    kv: int
    ffn: int
    layers: int
    vocabulary: int
    head_size: int
    trained: bool = False

    @property
    def block(self) -> tuple[tuple[str, int, int], ...]:
        """Name, output size m and input size n of the linear layers of one block."""
        return (
            ("q_proj", self.hidden, self.hidden),
            ("k_proj", self.kv, self.hidden),
            ("v_proj", self.kv, self.hidden),
            ("o_proj", self.hidden, self.hidden),
            ("gate_proj", self.ffn, self.hidden),
            ("up_proj", self.ffn, self.hidden),
            ("down_proj", self.hidden, self.ffn),
        )


MODELS: Mapping[str, ModelShapes] = {
    model.name: model
    for model in (
        ModelShapes("smollm2-135m", "SmolLM2-135M", 576, 192, 1536, 30, 49152, 64, trained=True),
        ModelShapes("llama-3.2-1b", "Llama-3.2-1B", 2048, 512, 8192, 16, 128256, 64),
        ModelShapes("llama-2-7b", "Llama-2-7B", 4096, 4096, 11008, 32, 32000, 128),
        ModelShapes("tiny", "tiny", 32, 16, 48, 2, 64, 16, trained=True),  # to see whether everything runs
    )
}
DEFAULT_WORKLOADS = ("smollm2-135m", "llama-3.2-1b", "llama-2-7b")


@dataclass(frozen=True)
class BenchSettings:
    """Everything that decides what a benchmark run does.

    Args:
        workloads: Names out of `MODELS`, in the order in which they are measured.
        ranks: Ranks of the factors.
        dtypes: Names out of `DTYPES`: the dtype of the factors.
        methods: Names out of `METHODS`; the baseline is always measured.
        parts: Out of `PARTS`.
        rounds: How often all methods take turns.
        repeats: Timed steps of a method each time it is its turn.
        seconds: Time a method gets in each workload; slow ones take fewer steps.
        minutes: No further workload is begun after this time.
        output_dir: Where table, figures and plots go; `None` for a folder of `benchmarks` named after the device.
        device: `cpu` or `cuda`.
        threads: Threads of torch on the CPU; `None` leaves them as they are.
        autocast: Whether the training step runs under bf16 autocast; `None` does so where the device computes in bf16.
        seed: Decides factors and gradients.

    Raises:
        UsageError: for an unknown or repeated name, or a number that is not positive.
    """

    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    ranks: tuple[int, ...] = RANKS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    methods: tuple[str, ...] = tuple(METHODS)
    parts: tuple[str, ...] = PARTS
    rounds: int = 5
    repeats: int = 3
    seconds: float = 3.0
    minutes: float = 45.0
    output_dir: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    autocast: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = (("workloads", MODELS), ("dtypes", DTYPES), ("methods", METHODS), ("parts", PARTS))
        for name, choices in known:
            unknown = sorted(set(getattr(self, name)) - set(choices))
            if unknown or not getattr(self, name):
                raise UsageError(f"--{name} {unknown} are unknown; choose from {', '.join(choices)}.")
        for name in ("workloads", "ranks", "dtypes", "methods", "parts"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UsageError(f"--{name} names one twice: {getattr(self, name)}.")
        numbers: dict[str, float] = {
            **{f"rank {rank}": rank for rank in self.ranks},
            "rounds": self.rounds,
            "repeats": self.repeats,
        }
        numbers |= {"seconds": self.seconds, "minutes": self.minutes}
        numbers |= {} if self.threads is None else {"threads": self.threads}
        for name, number in numbers.items():
            if not number > 0:
                raise UsageError(f"{name}: {number} must be more than 0.")

    @property
    def measured(self) -> tuple[Method, ...]:
        """The methods to measure in the order of `METHODS`, the baseline among them."""
        return tuple(method for name, method in METHODS.items() if name in self.methods or name == BASELINE)
