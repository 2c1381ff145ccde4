"""What is there to say of a model, an adapter or a checkpoint? Plain values, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import lorapro_hf


@dataclass(frozen=True)
class Base:
    """The model without its adapters.

    `parameters`, `bytes` and `dtype` are `None` where only the files of an adapter could be read, `quantization` where
    there is none. `bytes` is what the weights take in memory, `None` also for a quantized model that is not loaded.
    """

    model_class: str | None
    name: str | None
    parameters: int | None
    dtype: str | None
    bytes: int | None
    quantization: str | None


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model; `rank` and `alpha` are its defaults, which patterns may override for single layers."""

    name: str
    kind: str
    layers: int
    active: bool
    trainable: bool
    merged: bool
    rank: int | None
    alpha: float | None
    targets: list[str]
    options: list[str]


@dataclass(frozen=True)
class PairGroup:
    """Pairs that are alike; each has `batch` matrices of `m x n` (experts, groups of a convolution), else one."""

    kind: str
    m: int
    n: int
    r: int
    batch: int
    scaling: float
    dtype: str
    pairs: list[str]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.pairs)


@dataclass(frozen=True)
class Ordinary:
    """Trainable parameters of no pair whose names differ in numbers only; plain AdamW steps them."""

    name: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Unsupported:
    """Layers that are refused for the same reason, none where it is the model as a whole."""

    reason: str
    kind: str
    layers: list[str]


@dataclass(frozen=True)
class ModeCost:
    """What a mode costs the process that has most to do.

    Args:
        mode: of LoRA-Pro.
        moments_dtype: of LoRA-Pro.
        state_bytes: optimizer state.
        scratch_bytes: what a step may need beside it.
        total_bytes: both, the gradients, and the weights unless they are in memory already; `None` if those of a
            quantized model are not known.
        fits: whether the memory that is free now would do for that; `None` if that is not known.
        learning_rates: the range to try.
    """

    mode: str
    moments_dtype: str
    state_bytes: int
    scratch_bytes: int
    total_bytes: int | None
    fits: bool | None
    learning_rates: tuple[float, float]


ENGINE = "FSDP or DeepSpeed (not read)"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder of a `Trainer`.

    Args:
        folder: where it lies.
        flaw: why a training cannot go on from it, `None` if it can.
        step: optimizer steps done, `None` where the file with it is missing.
        max_steps: of the whole training.
        epoch: epochs done.
        processes: how many processes wrote it, `None` if it says nothing of that.
        optimizer: what the state is of: `"LoRA-Pro"`, `"another optimizer"`, `ENGINE` or `"none"`.
        settings: mode, dtype of the moments and master factors of LoRA-Pro, and the learning rate.
        stepped_tensors: parameters that have a state.
        has_manifest: the sizes and checksums of its files are known.
    """

    folder: str
    flaw: str | None
    step: int | None = None
    max_steps: int | None = None
    epoch: float | None = None
    processes: int | None = None
    optimizer: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    stepped_tensors: int | None = None
    has_manifest: bool = False


@dataclass(frozen=True)
class Report:
    """All of it.

    Args:
        source: what was inspected, as it was named.
        base: the model without its adapters, `None` if none was found.
        adapters: all there are.
        pairs: grouped by shape.
        pair_parameters: trainable elements in pairs.
        ordinary: other trainable parameters.
        unsupported: what LoRA-Pro refuses.
        costs: for each mode.
        ranks: how many processes share the pairs out.
        memory: bytes that are free by device, `None` where that is not known.
        loaded: whether weights are in memory already.
        settings: `lorapro_config.json` beside the adapter.
        checkpoint: of the folder, if it is one.
        checkpoints: in the folder, if it is the output folder of a training; the newest first.
        notes: what else there is to know.
    """

    source: str
    base: Base | None = None
    adapters: list[Adapter] = field(default_factory=list)
    pairs: list[PairGroup] = field(default_factory=list)
    pair_parameters: int = 0
    ordinary: list[Ordinary] = field(default_factory=list)
    unsupported: list[Unsupported] = field(default_factory=list)
    costs: list[ModeCost] = field(default_factory=list)
    ranks: int = 1
    memory: dict[str, int | None] = field(default_factory=dict)
    loaded: bool = False
    settings: dict[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_trainable(self) -> bool:
        """Whether LoRA-Pro can train it as it is, and go on from it or from the newest complete checkpoint in it."""
        found = self.checkpoints if self.checkpoint is None else [self.checkpoint]
        newest = next((each for each in found if each.flaw is None), None)
        if self.unsupported or (found and newest is None):
            return False
        in_files_of_engine = self.base is None and newest is not None and newest.optimizer == ENGINE
        return bool(self.pairs) or in_files_of_engine

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, with counts and sums; the keys stay as they are from version to version."""
        content = asdict(self)
        for group, own in zip(content["pairs"], self.pairs, strict=True):
            group["count"] = own.count
        content["pair_count"] = sum(group.count for group in self.pairs)
        content["ordinary_parameters"] = sum(each.parameters for each in self.ordinary)
        content["is_trainable"] = self.is_trainable
        content["lorapro_hf"] = lorapro_hf.__version__
        return content
