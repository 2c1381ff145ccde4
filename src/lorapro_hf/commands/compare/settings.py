"""What does a YAML for `lorapro compare` say?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from lorapro_hf.commands.compare.methods import FULL, LORA, ComparedMethod, learning_rates, method_of
from lorapro_hf.commands.compare.tuning import Procedure
from lorapro_hf.commands.compare.values import require_mapping, require_name, typed
from lorapro_hf.options import UsageError
from lorapro_hf.recipes.yaml_files import parse_yaml, read_yaml

# Options that only some kinds of task have.
_OF_GIVEN_MODELS = frozenset({"model", "dataset", "dataset_config", "max_length"})
KINDS: Mapping[str, frozenset[str]] = {
    "questions": _OF_GIVEN_MODELS | {"generate"},
    "text": _OF_GIVEN_MODELS | {"text_column"},
    "classification": _OF_GIVEN_MODELS | {"classes", "text_column", "label_column", "head_learning_rate"},
    "characters": frozenset({"learn", "width", "layers", "pretraining_steps"}),
    "digits": frozenset({"width", "layers", "pretraining_steps"}),
}
# Defaults of a kind where they are not those of `TaskSettings`.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "characters": {"batch_size": 16, "validation_size": 1000, "test_size": 2000},
    "digits": {"batch_size": 16, "validation_size": 400, "test_size": 600, "pretraining_steps": 600},
}
_PRECISIONS = ("fp32", "bf16")
# The schedules of `transformers.get_scheduler` that need no more than steps and warm-up.
_SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)
_NEED_DATASET = {"text_column", "label_column", "dataset_config"}
_COUNTS = (
    *("batch_size", "max_length", "validation_size", "test_size", "classes", "train_size"),
    *("width", "layers", "pretraining_steps"),
)


@dataclass(frozen=True)
class TaskSettings:
    """A task: the model, the data and the length of the training. Options of one kind of task name it in brackets."""

    name: str
    kind: str  # one of `KINDS`
    model: str | None = None  # hub name or folder; None for the packaged one, "tiny-random" for a tiny random one
    width: int = 64  # of the hidden states (characters, digits)
    layers: int = 3  # blocks of the model (characters, digits)
    learn: tuple[str, ...] = ("multiply", "reverse", "sort_set", "sum_three")  # puzzles (characters)
    # Before all runs, once (characters, digits). 3,000 on puzzles, width 64: all of 1,000 copied and of 1,000 sorted
    # words are right, 94 % of the sums and 91 % of the differences. 600 on digits: 96 % of unseen originals.
    pretraining_steps: int = 3000
    dataset: str | None = None  # hub name or file; None for word problems, the standard library or its docstrings
    dataset_config: str | None = None
    text_column: str = "text"  # (text, classification)
    label_column: str = "label"  # (classification)
    classes: int = 20  # packages to tell apart (classification, built-in data)
    target_modules: str | tuple[str, ...] = "all-linear"  # or a list of ends of their names
    ranks: tuple[int, ...] = (8,)  # each a comparison of its own
    steps: int | tuple[int, ...] = 100  # or several numbers, each a comparison of its own
    batch_size: int = 8
    max_length: int = 128  # tokens of an example; longer texts are cut, longer questions left out
    train_size: int | None = None  # None for as many examples as are needed to see each once
    validation_size: int = 128  # held-out examples that decide on the learning rate
    test_size: int = 128  # other held-out examples, for the figures in the tables
    generate: int = 0  # test questions to answer for the exact match (questions)
    head_learning_rate: float = 1e-3  # of the classifier, the same for all methods (classification)
    data_seed: int = 0  # which examples are in which set; the seed of a run decides order and initial values
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # grids for this task alone
    methods: tuple[str, ...] | None = None  # names of those that are compared on this task; None for all

    def __post_init__(self) -> None:
        refusals = [
            (f"{name}={value!r} must be a whole number from 1 on", value is not None and value < 1)
            for name, value in ((name, getattr(self, name)) for name in _COUNTS)
        ]
        rate = self.head_learning_rate
        for name, each in (("ranks", list(self.ranks)), ("steps", list(self.horizons))):
            wrong = not each or min(each) < 1 or _repeats(each)
            refusals.append((f"{name}={each} must be different whole numbers from 1 on", wrong))
        refusals += [
            ("target_modules=[] must be 'all-linear' or a list of ends of names", not self.target_modules),
            (f"head_learning_rate={rate} must be positive", rate <= 0.0),
            (f"generate={self.generate} must be from 0 to test_size", not 0 <= self.generate <= self.test_size),
        ]
        _refuse(f"Task {self.name}: ", refusals)

    @property
    def horizons(self) -> tuple[int, ...]:
        """The numbers of steps. All take their batches from the start of one order."""
        return self.steps if isinstance(self.steps, tuple) else (self.steps,)

    @property
    def longest(self) -> int:
        """The largest number of steps."""
        return max(self.horizons)

    @property
    def examples(self) -> int:
        """The number of training examples."""
        return self.train_size or self.longest * self.batch_size

    def decides(self) -> dict[str, Any]:
        """The settings that decide how a run ends, but for rank and steps."""
        left_out = ("name", "ranks", "steps", "learning_rates", "methods")
        return {key: value for key, value in asdict(self).items() if key not in left_out} | {
            "train_size": self.examples
        }


@dataclass(frozen=True)
class CompareSettings:
    """Everything that a comparison is made of."""

    tasks: tuple[TaskSettings, ...]
    methods: tuple[ComparedMethod, ...]  # see `method_of`
    seeds: tuple[int, ...]  # each decides order and initial values
    output_dir: Path
    tuning_seeds: tuple[int, ...] = (100, 101)  # choose the learning rates; empty to run `seeds` at all given rates
    scaling: float = 2.0  # alpha over r, the same at all ranks (rsLoRA's is larger by √r)
    schedule: str = "linear"
    warmup: float = 0.05  # fraction of the steps in which the rate rises from 0
    max_grad_norm: float = 1.0  # as `Trainer`; 0 for no clipping
    precision: str = "fp32"  # or "bf16" for autocast
    baseline: str = LORA  # the others are tested against it
    reference: str = FULL  # the other end of the gap

    def __post_init__(self) -> None:
        names: dict[str, list[Any]] = {"task": [task.name for task in self.tasks], "seed": list(self.seeds)}
        names["method"] = [method.name for method in self.methods]
        refusals = [
            (f"A comparison needs at least one {noun}, each named once; got {each}", not each or _repeats(each))
            for noun, each in names.items()
        ]
        refusals += [
            (f"{key}={getattr(self, key)!r} is none of {', '.join(known)}", getattr(self, key) not in known)
            for key, known in (("precision", _PRECISIONS), ("schedule", _SCHEDULES))
        ]
        refusals += [
            (f"warmup={self.warmup} must be from 0 to less than 1", not 0.0 <= self.warmup < 1.0),
            (f"max_grad_norm={self.max_grad_norm} must be at least 0", self.max_grad_norm < 0.0),
            (f"scaling={self.scaling} must be positive", self.scaling <= 0.0),
        ]
        shared = sorted(set(self.seeds) & set(self.tuning_seeds))
        message = f"tuning_seeds={list(self.tuning_seeds)} must be different and others than seeds"
        refusals.append((f"{message}, since they choose what is reported", bool(shared) or _repeats(self.tuning_seeds)))
        for task in self.tasks:
            for noun, used in (("learning rates for", task.learning_rates), ("methods", task.methods or ())):
                strangers = sorted(set(used) - set(names["method"]))
                refusals.append((f"Task {task.name} has {noun} {strangers}, not under methods", bool(strangers)))
        _refuse("", refusals)

    @property
    def procedure(self) -> Procedure:
        """The tuning of each method."""
        return Procedure(self.seeds, self.tuning_seeds)

    def methods_of(self, task: TaskSettings) -> list[ComparedMethod]:
        """The methods that are compared on a task."""
        return [method for method in self.methods if task.methods is None or method.name in task.methods]

    def warmup_steps(self, steps: int) -> int:
        """The steps of so many in which the learning rate rises."""
        return round(self.warmup * steps)

    def decides(self) -> dict[str, Any]:
        """The settings that decide how every run ends."""
        return {key: getattr(self, key) for key in ("scaling", "schedule", "warmup", "max_grad_norm", "precision")}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "output_dir": str(self.output_dir)}


def read_settings(path: Path, overrides: Sequence[str] = (), output_dir: Path | None = None) -> CompareSettings:
    """The settings of a YAML file, changed by overrides such as `tasks.docstrings.steps=20`; raises `UsageError`."""
    content = read_yaml(path, "the comparison")
    if not isinstance(content, dict):
        raise UsageError(f"{str(path)!r} must hold a mapping with tasks, methods and seeds.")
    for override in overrides:
        _override(content, override)
    return settings_of(content if output_dir is None else {**content, "output_dir": str(output_dir)})


def settings_of(content: Mapping[str, Any]) -> CompareSettings:
    """`CompareSettings` from the content of a YAML file; raises `UsageError`."""
    hints = {**get_type_hints(CompareSettings), "output_dir": str}
    unknown, missing = sorted(map(str, set(content) - set(hints))), sorted({"tasks", "methods", "seeds"} - set(content))
    if unknown or missing:
        raise UsageError(f"Unknown: {unknown}; missing: {missing}. A comparison says {', '.join(sorted(hints))}.")
    tasks, methods = content["tasks"], content["methods"]
    if isinstance(methods, list):
        for name in methods:
            require_name("method", name)
        _refuse("", [(f"methods={methods} must name each method once", _repeats(methods))])
        methods = dict.fromkeys(methods)
    if not isinstance(tasks, Mapping) or not isinstance(methods, Mapping):
        raise UsageError("`tasks` must be a mapping from names, and `methods` a mapping or a list of names.")
    values = typed("", {key: value for key, value in content.items() if key not in ("tasks", "methods")}, hints)
    for key in ("baseline", "reference"):
        if key in content and content[key] not in methods:
            raise UsageError(f"{key}={content[key]!r} is not under methods.")
    return CompareSettings(
        tasks=tuple(_task(name, entry) for name, entry in tasks.items()),
        methods=tuple(method_of(name, entry) for name, entry in methods.items()),
        **{**values, "output_dir": Path(values.get("output_dir", "runs/compare"))},
    )


def _task(name: str, entry: Any) -> TaskSettings:
    require_name("task", name)
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"Task {name} must be a mapping with a `kind` out of {', '.join(KINDS)}.")
    foreign = frozenset().union(*KINDS.values()) - KINDS[kind]
    known = {each.name for each in fields(TaskSettings)} - {"name"} - foreign
    unknown = sorted(map(str, set(entry) - known))
    built_in = entry.get("dataset") is None
    useless = sorted(set(entry) & (_NEED_DATASET if built_in else {"classes"}))
    which = "without" if built_in else "with"
    refusals = [(f"{unknown} unknown to kind {kind}, which knows {sorted(known)}", bool(unknown))]
    refusals += [(f"{useless} have no use {which} a `dataset`; leave them out", bool(useless))]
    _refuse(f"Task {name}: ", refusals)
    grids = entry.get("learning_rates") or {}
    require_mapping(f"Task {name}", "learning_rates", grids)
    rates = {method: learning_rates(f"{method} in task {name}", grid) for method, grid in grids.items()}
    plain = {key: value for key, value in {**_DEFAULTS.get(kind, {}), **entry}.items() if key != "learning_rates"}
    return TaskSettings(name, **typed(f"Task {name}: ", plain, get_type_hints(TaskSettings)), learning_rates=rates)


def _override(content: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    *keys, last = path.split(".")
    place: Any = content
    for key in keys:
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place.get(key) if isinstance(place, dict) else None
    if not sign or not isinstance(place, dict):
        raise UsageError(f"--set {override!r} must read KEY=VALUE, such as tasks.docstrings.steps=20 or seeds=[0].")
    place[last] = parse_yaml(text, f"--set {override!r}")


def _repeats(values: Sequence[Any]) -> bool:
    return len(set(values)) < len(values)


def _refuse(owner: str, refusals: Sequence[tuple[str, bool]]) -> None:
    """Raise the first message whose condition holds."""
    for message, holds in refusals:
        if holds:
            raise UsageError(f"{owner}{message}.")
