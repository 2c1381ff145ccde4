"""What is asked of `lorapro inspect`, and what does its report hold? Plain values, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lorapro_hf


@dataclass(frozen=True)
class Request:
    """A folder or a name on the Hub, and how to inspect it.

    `lora` holds the given options of a new adapter by the names of `AdapterArguments`. Without a `task`, a key of
    `TASKS`, the model's configuration or the adapter tells it.
    """

    name: str
    lora: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    ranks: int = 1
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Base:
    """The model without its adapters.

    `bytes` is the memory of the weights, `None` for a quantized model that is not loaded.
    """

    model_class: str
    name: str | None
    parameters: int
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
    """Pairs of one shape; each has `batch` matrices of `m x n`: experts, groups of a convolution, or one."""

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
        """The number of pairs."""
        return len(self.pairs)


@dataclass(frozen=True)
class Ordinary:
    """Trainable parameters outside the pairs, grouped by name without numbers; plain AdamW steps them."""

    name: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class Unsupported:
    """Layers that are refused for the same reason; none if the model as a whole is refused."""

    reason: str
    kind: str
    layers: list[str]


@dataclass(frozen=True)
class ModeCost:
    """Memory that a mode needs on the busiest process, and the range of learning rates to try.

    `scratch_bytes` is the memory that a step may need beside the state. `total_bytes` adds gradients, and weights that
    are not loaded. `total_bytes` and `fits`, whether the free memory suffices, are `None` if they are not known.
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
    """A checkpoint folder of a `Trainer`; a value that its files do not tell is `None`.

    Args:
        flaw: why a training cannot go on from it, `None` if it can.
        processes: the number of processes that wrote it.
        optimizer: owner of the state: `"LoRA-Pro"`, `"another optimizer"`, `ENGINE` or `"none"`.
        settings: mode, dtype of the moments and master factors of LoRA-Pro, and the learning rate.
        has_manifest: whether the sizes and checksums of its files are known.
        usable_weights: whether a new training could start from its adapter although it is incomplete; not in the JSON.
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
    usable_weights: bool = False


@dataclass(frozen=True)
class Report:
    """A report on a model, an adapter, a checkpoint or an output folder.

    `memory` holds the free bytes by device, `settings` the content of `lorapro_config.json` beside the adapter, and
    `notes` sentences for the reader. `checkpoint` is the folder itself, `checkpoints` are those in an output folder,
    the newest first.
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
        """Whether LoRA-Pro can train the model and resume from the checkpoint, or from one in the output folder."""
        found = self.checkpoints if self.checkpoint is None else [self.checkpoint]
        newest = next((each for each in found if each.flaw is None), None)
        if self.unsupported or (found and newest is None):
            return False
        in_files_of_engine = self.base is None and newest is not None and newest.optimizer == ENGINE
        return bool(self.pairs) or in_files_of_engine

    @property
    def pair_count(self) -> int:
        """The number of pairs."""
        return sum(group.count for group in self.pairs)

    @property
    def ordinary_parameters(self) -> int:
        """The number of trainable elements outside the pairs."""
        return sum(each.parameters for each in self.ordinary)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, with counts and sums; the keys are the same in each version."""
        content = asdict(self)
        for checkpoint in (content["checkpoint"], *content["checkpoints"]):
            if checkpoint is not None:
                del checkpoint["usable_weights"]
        for group, own in zip(content["pairs"], self.pairs, strict=True):
            group["count"] = own.count
        sums = {name: getattr(self, name) for name in ("pair_count", "ordinary_parameters", "is_trainable")}
        return {**content, **sums, "lorapro_hf": lorapro_hf.__version__}
