"""Which methods can be compared, and how do they differ?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorapro_hf
from lorapro_hf.commands.common.optimizers import build
from lorapro_hf.commands.compare.tuning import grid_around
from lorapro_hf.commands.compare.values import require_mapping, require_name, typed
from lorapro_hf.config import MODE, MODES, UPDATE, UPDATES, LoRAProConfig
from lorapro_hf.methods.base import LoRAMethod, require_compatible
from lorapro_hf.methods.gelora import gelora_ranks
from lorapro_hf.methods.gradient_starts import GradientStart
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import MEANING, UpdateRule
from lorapro_hf.options import UsageError, require_packages

_LORA_RATES = grid_around(3e-3)
_LOW_RATES = grid_around(1e-3)
_WEIGHT_RATES = grid_around(3e-4)  # each element of a weight moves by about one rate a step
_LIMITED_RATES = grid_around(1e-3)  # the limit of a step permits higher ones
_SET_BY_US = {"r", "lora_alpha", "target_modules", "task_type"}
_GELORA_SET_BY_US = {"model", "batches", "alpha_over_r", "group"}
_MAPPINGS = ("optimizer", "adapter", "callbacks", "gelora")
_KEYS = ("like", "title", "learning_rates", *_MAPPINGS)

LORA, FULL = "lora", "full"


@dataclass(frozen=True)
class ComparedMethod:
    """A way of adapting a model: plain values only, so that it can be hashed, stored and changed from a YAML."""

    name: str  # in YAML and JSON
    title: str  # in tables
    optimizer: str  # a key of `common.optimizers.BUILDERS`
    learning_rates: tuple[float, ...]  # the grid where the YAML gives none
    settings: Mapping[str, Any] = field(default_factory=dict)  # keywords of the optimizer, or of `LoRAProConfig`
    adapter: Mapping[str, Any] | None = field(default_factory=dict)  # of `LoraConfig`; None trains the weights
    clips: bool = True  # whether `max_grad_norm` applies: clipping raw gradients would defeat some methods
    package: str | None = None  # a module of the extra `bench`
    callbacks: Mapping[str, Mapping[str, Any]] | None = None  # each public `LoRAMethod` by its name, and its keywords
    gelora: Mapping[str, Any] | None = None  # keywords of `gelora_ranks`, which chooses the ranks of the adapter

    @property
    def is_lora_pro(self) -> bool:
        """Whether it is one of this package."""
        return self.optimizer == "lorapro"

    @property
    def has_rank(self) -> bool:
        """Whether it takes the ranks of a task."""
        return self.adapter is not None and self.gelora is None

    def decides(self) -> dict[str, Any]:
        """The values that decide how a run ends: neither names nor grid."""
        settings = dict(self.settings)
        if self.is_lora_pro:  # spelled out: a default may change
            config = LoRAProConfig(**settings)
            of_mode = {each.name for each in fields(config) if each.metadata.get("mode", config.mode) == config.mode}
            settings = {name: value for name, value in asdict(config).items() if name in of_mode}
            rule = rule_of(config)
            settings |= {"update": rule.update, "trust_region": rule.trust_region}
            settings |= MEANING if rule.trust_region else {}
        adapter = None if self.adapter is None else dict(self.adapter)
        decided = {"optimizer": self.optimizer, "settings": settings, "adapter": adapter, "clips": self.clips}
        more = {"callbacks": self.callbacks, "gelora": self.gelora}
        return {**decided, **{name: value for name, value in more.items() if value is not None}}

    def make_callbacks(self) -> list[LoRAMethod]:
        """The callbacks of a run."""
        known = _lora_methods()
        made = [known[name](**keywords) for name, keywords in (self.callbacks or {}).items()]
        for each in made:
            if isinstance(each, GradientStart):
                each.progress = False  # its bar would run through ours
        return made


def _lora_methods() -> dict[str, type[LoRAMethod]]:
    """The public subclasses of `LoRAMethod` by name."""
    names = [name for name, home in lorapro_hf._HOMES.items() if home.startswith("methods.")]
    public: dict[str, Any] = {name: getattr(lorapro_hf, name) for name in names}
    return {name: each for name, each in public.items() if isinstance(each, type) and issubclass(each, LoRAMethod)}


def _rates(rule: UpdateRule) -> tuple[float, ...]:
    return _LORA_RATES if rule.takes_lora_rates else _LIMITED_RATES


def _lora_pro() -> list[ComparedMethod]:
    """Every mode with every update that it knows, and the paper's own step, whose length has no limit."""
    methods = []
    for mode, update in ((mode, update) for mode in MODES for update in UPDATES):
        settings = {"mode": mode, "update": update}
        try:
            rule = rule_of(LoRAProConfig(mode=mode, update=update))
        except ValueError:  # a combination that has no meaning
            continue
        title = f"LoRA-Pro {mode}, {update}"
        clips = rule.takes_clipped_gradients
        name = f"pro_{mode}_{update}"
        methods.append(ComparedMethod(name, title, "lorapro", _rates(rule), settings, clips=clips))
    paper = {"mode": "full", "update": "linear", "trust_region": 0}
    title = "LoRA-Pro full, as in the paper"
    return [*methods, ComparedMethod("pro_full_paper", title, "lorapro", _WEIGHT_RATES, paper)]


_PISSA, _LORA_GA = ({"init_lora_weights": name} for name in ("pissa_niter_16", "lora_ga"))
# The settings of BeamLoRA and XGBLoRA are for sixty steps.
_CALLBACKS: Mapping[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
    "lora_one": ("LoRA-One", {"GradientStart": {"method": "lora_one"}}),
    "flat_lora": ("Flat-LoRA", {"FlatLoRACallback": {}}),
    "ggpo": ("LoRA-GGPO", {"FlatLoRACallback": {"sigma": 0.03, "beta": 0.01}}),
    "mgpo": ("LoRA-MGPO", {"MGPOCallback": {}}),
    "beamlora": ("BeamLoRA", {"BeamLoRACallback": {"every": 10}}),
    "xgblora": ("XGBLoRA", {"BoostingCallback": {"steps_per_booster": 15, "rank": None}}),
}


def _neighbours() -> list[ComparedMethod]:
    """The methods that act beside an optimizer, each with AdamW and with LoRA-Pro's default."""
    settings: dict[str, Any] = {"mode": MODE, "update": UPDATE}
    rates = _rates(rule_of(LoRAProConfig(**settings)))
    methods = [ComparedMethod("lora_sb", "LoRA-SB", "adamw", _LORA_RATES, callbacks={"LoRASB": {}})]  # trains R alone
    named = {**_CALLBACKS, "gelora": ("GeLoRA", None)}
    for name, (title, callbacks) in named.items():
        gelora: dict[str, Any] | None = {} if callbacks is None else None
        alone = ComparedMethod(name, title, "adamw", _LORA_RATES, callbacks=callbacks, gelora=gelora)
        ours = replace(alone, name=f"pro_{name}", title=f"LoRA-Pro, {title}", optimizer="lorapro")
        methods += [alone, replace(ours, learning_rates=rates, settings=settings)]
    return methods


METHODS: Mapping[str, ComparedMethod] = {
    method.name: method
    for method in (
        ComparedMethod(LORA, "LoRA (AdamW)", "adamw", _LORA_RATES),
        ComparedMethod("rslora", "rsLoRA", "adamw", _LORA_RATES, adapter={"use_rslora": True}),
        ComparedMethod("loraplus", "LoRA+", "loraplus", _LOW_RATES, {"loraplus_lr_ratio": 16.0}),
        ComparedMethod("dora", "DoRA", "adamw", _LORA_RATES, adapter={"use_dora": True}),
        ComparedMethod("pissa", "PiSSA", "adamw", _LOW_RATES, adapter=_PISSA),
        ComparedMethod("loraga", "LoRA-GA", "adamw", _LOW_RATES, adapter=_LORA_GA),
        ComparedMethod("lorafa", "LoRA-FA", "lorafa", _LORA_RATES),
        ComparedMethod("riemannian", "Riemannian", "riemannian", _LORA_RATES),
        ComparedMethod("lorarite", "LoRA-RITE", "lorarite", _LORA_RATES, clips=False, package="pytorch_optimizer"),
        *_neighbours(),
        *_lora_pro(),
        ComparedMethod(FULL, "full fine-tuning", "adamw", _WEIGHT_RATES, adapter=None),
    )
}


def method_of(name: str, entry: Any) -> ComparedMethod:
    """The method of an entry under `methods` of the YAML; raises `UsageError`.

    The entry is nothing, for one of `METHODS` as it is; learning rates (see `learning_rates`); or a mapping with any of
    `like` (the method it is a variant of), `title`, `learning_rates`, `optimizer`, `adapter`, `callbacks` and `gelora`.
    The last four hold keywords that are added to those of the method: for its optimizer (LoRA-Pro: settings of
    `LoRAProConfig`), for `LoraConfig`, for each `LoRAMethod` by the name of its class, and for `gelora_ranks`.
    """
    require_name("method", name)
    if not isinstance(entry, Mapping):
        entry = {} if entry is None else {"learning_rates": entry}
    if unknown := sorted(set(entry) - set(_KEYS)):
        raise UsageError(f"Method {name}: {unknown} is unknown; use {', '.join(_KEYS)}.")
    like = entry.get("like", name)
    base = METHODS.get(like) if isinstance(like, str) else None
    if base is None:
        known = ", ".join(METHODS)
        raise UsageError(f"Method {like!r} is unknown; choose from {known}, or name one of them with `like`.")
    title = entry.get("title", base.title if name == base.name else name)
    typed(f"Method {name}: ", {"title": title}, {"title": str})
    for key in _MAPPINGS:
        require_mapping(f"Method {name}", key, entry.get(key))
        if base.adapter is None and key != "optimizer" and key in entry:
            raise UsageError(f"Method {name}: {base.title} has no adapter; leave `{key}` out.")
    settings = {**base.settings, **(entry.get("optimizer") or {})}
    if base.is_lora_pro:
        _require_lora_pro(name, settings)
    rates = learning_rates(name, entry.get("learning_rates", base.learning_rates))
    adapter = None if base.adapter is None else {**base.adapter, **_adapter(name, entry.get("adapter") or {})}
    method = replace(base, name=name, title=title, learning_rates=rates, settings=settings, adapter=adapter)
    return _with_callbacks(method, entry)


def learning_rates(name: str, values: Any) -> tuple[float, ...]:
    """The grid of a method in ascending order: a list of different positive numbers, or three around a number."""
    try:
        found = typed("", {"rates": values}, {"rates": tuple[float, ...] | float})["rates"]
    except UsageError:
        found = ()
    rates = sorted(found if isinstance(found, tuple) else (found,))
    if not rates or len(set(rates)) < len(rates) or rates[0] <= 0:
        message = "must be a positive number, or a list of different positive numbers"
        raise UsageError(f"The learning rates {values!r} of {name} {message}.")
    return tuple(rates) if isinstance(found, tuple) else grid_around(rates[0])


def _require_lora_pro(name: str, settings: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(LoRAProConfig)]
    if unknown := sorted(set(settings) - set(known)):
        knows = ", ".join(known)
        raise UsageError(f"Method {name}: optimizer has {unknown}, unknown to LoRA-Pro, which knows {knows}.")
    try:
        rule_of(LoRAProConfig(**settings))
    except (TypeError, ValueError) as error:
        raise UsageError(f"Method {name}: {error}") from error


def _with_callbacks(method: ComparedMethod, entry: Mapping[str, Any]) -> ComparedMethod:
    """The method with the callbacks and the choice of ranks of an entry; refuses those that a run would refuse."""
    owner, callbacks, gelora = f"Method {method.name}: ", dict(method.callbacks or {}), method.gelora
    for each, keywords in (entry.get("callbacks") or {}).items():
        if each not in _lora_methods():
            raise UsageError(f"{owner}callbacks has {each!r}; choose from {', '.join(_lora_methods())}.")
        require_mapping(owner.rstrip(": "), f"callbacks.{each}", keywords)
        callbacks[each] = {**callbacks.get(each, {}), **(keywords or {})}
    if "gelora" in entry:
        gelora = {**(gelora or {}), **(entry["gelora"] or {})}
    known = sorted(set(inspect.signature(gelora_ranks).parameters) - _GELORA_SET_BY_US)
    if unknown := sorted(set(gelora or {}) - set(known)):
        raise UsageError(f"{owner}gelora has {unknown}; use {', '.join(known)}.")
    method = replace(method, callbacks=callbacks or None, gelora=gelora)
    config = asdict(LoRAProConfig(**method.settings)) if method.is_lora_pro else {}
    stated = {"lora_pro": method.is_lora_pro, **config, **(method.adapter or {})}
    try:
        require_compatible(method.make_callbacks(), stated)
    except TypeError as error:
        raise UsageError(f"{owner}{error} (YAML needs a point in numbers: 1.0e-8).") from error
    except ValueError as error:
        raise UsageError(f"{owner}{error}") from error
    return method


def _adapter(name: str, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `LoraConfig`, numbers and flags of the right type; refuses those that the comparison itself sets."""
    known = {each.name: each.type for each in fields(LoraConfig) if each.name not in _SET_BY_US}
    if unknown := sorted(set(adapter) - set(known)):
        reason = "which LoraConfig does not know or the comparison itself sets (ranks, scaling, target_modules)"
        raise UsageError(f"Method {name}: adapter has {unknown}, {reason}.")
    hints = {key: plain for plain in (bool, int, float) for key in adapter if known[key] in (plain, plain.__name__)}
    plain = {key: adapter[key] for key in hints}
    return {**adapter, **typed(f"Method {name}: adapter.", plain, hints)}


def require_usable(method: ComparedMethod, device: torch.device) -> None:
    """Try the optimizer of a method on one tiny layer, before hours are spent on others; raises `UsageError`."""
    if method.package is not None:
        require_packages(f"Method {method.name}", method.package, extra="bench")
    layer = nn.Sequential(nn.Linear(2, 2, bias=False, device=device))
    try:
        model = get_peft_model(layer, LoraConfig(r=1, target_modules=["0"]))
        build(method.optimizer, model, 1e-3, method.settings)
    except Exception as error:
        message = f"its optimizer cannot be built with {dict(method.settings)}: {error}"
        raise UsageError(f"Method {method.name}: {message} (YAML needs a point in numbers: 1.0e-8).") from error
