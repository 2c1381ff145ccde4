"""Which methods can be compared, and what makes each of them what it is?"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from lorapro_hf.commands.compare.checks import (
    require_adapter,
    require_mapping,
    require_name,
    require_settings,
    require_types,
)
from lorapro_hf.config import MODES, UPDATES, LoRAProConfig
from lorapro_hf.optim.rules import RULES, rule_of
from lorapro_hf.options import UsageError

_LORA_RATES = (3e-4, 1e-3, 3e-3)
_WEIGHT_RATES = (3e-5, 1e-4, 3e-4)  # each element of a weight moves by about one rate a step
_LIMITED_RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # a limit on the first steps lets higher ones be used

LORA, FULL = "lora", "full"


@dataclass(frozen=True)
class Method:
    """A way of adapting a model: plain values only, so that it can be hashed, stored and changed from a YAML.

    Args:
        name: Its name in YAML and JSON.
        title: Its name in tables.
        optimizer: Which function of `optimizers.BUILDERS` makes its optimizer.
        learning_rates: The grid where the YAML gives none.
        settings: Keywords for that function.
        adapter: Keywords for `LoraConfig` beyond rank, alpha and layers; `None` trains the weights themselves.
        clips: Whether `max_grad_norm` applies; clipping raw gradients would break what some methods rest on.
        package: A module that it needs beyond this package's dependencies.
        install: What to install for that module.
    """

    name: str
    title: str
    optimizer: str
    learning_rates: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] | None = field(default_factory=dict)
    clips: bool = True
    package: str | None = None
    install: str | None = None

    @property
    def is_lora_pro(self) -> bool:
        """Whether it is one of this package."""
        return self.optimizer == "lorapro"

    def decides(self) -> dict[str, Any]:
        """What of it decides how a run ends: neither names nor grid."""
        adapter = None if self.adapter is None else dict(self.adapter)
        settings = dict(self.settings)
        if self.is_lora_pro:  # spelled out: a default may change
            config = LoRAProConfig(**settings)
            settings = {**asdict(config), "trust_region": rule_of(config).trust_region}
        return {
            "optimizer": self.optimizer,
            "settings": settings,
            "adapter": adapter,
            "clips": self.clips,
        }

    def require_usable(self, device: torch.device) -> None:
        """Raise a `UsageError` that names what is missing for it on a device, if anything is."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            raise UsageError(
                f"Method {self.name} needs a package that is not installed: pip install '{self.install}', or leave the "
                "method out."
            )
        if not self.is_lora_pro:
            return
        try:
            rule_of(LoRAProConfig(**self.settings)).check_device(device)
        except (ImportError, RuntimeError) as error:
            raise UsageError(f"Method {self.name}: {error}") from error


def _lora_pro() -> list[Method]:
    """Every mode with every update that it knows, and the paper's own step, whose length has no limit."""
    found = []
    for mode in MODES:
        for update in UPDATES:
            rates = _LORA_RATES if RULES[mode].takes_lora_rates else _LIMITED_RATES
            settings = {"mode": mode, "update": update}
            title = f"LoRA-Pro {mode}, {update}"
            found.append(Method(f"pro_{mode}_{update}", title, "lorapro", rates, settings))
    paper = {"mode": "full", "update": "linear", "trust_region": 0}
    return [*found, Method("pro_full_paper", "LoRA-Pro full, as in the paper", "lorapro", _WEIGHT_RATES, paper)]


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(LORA, "LoRA (AdamW)", "adamw", _LORA_RATES),
        Method("rslora", "rsLoRA", "adamw", _LORA_RATES, adapter={"use_rslora": True}),
        Method("loraplus", "LoRA+", "loraplus", (1e-4, 3e-4, 1e-3), {"loraplus_lr_ratio": 16.0}),
        Method("dora", "DoRA", "adamw", _LORA_RATES, adapter={"use_dora": True}),
        Method("pissa", "PiSSA", "adamw", (1e-4, 3e-4, 1e-3), adapter={"init_lora_weights": "pissa_niter_16"}),
        Method("loraga", "LoRA-GA", "adamw", (1e-4, 3e-4, 1e-3), adapter={"init_lora_weights": "lora_ga"}),
        Method("lorafa", "LoRA-FA", "lorafa", _LORA_RATES),
        Method("riemannian", "Riemannian", "riemannian", _LORA_RATES),
        Method(
            "lorarite",
            "LoRA-RITE",
            "lorarite",
            _LORA_RATES,
            clips=False,
            package="pytorch_optimizer",
            install="pytorch_optimizer>=4.1",
        ),
        *_lora_pro(),
        Method(FULL, "full fine-tuning", "adamw", _WEIGHT_RATES, adapter=None),
    )
}


def method_of(name: str, entry: Any) -> Method:
    """The method that an entry under `methods` of the YAML means.

    Args:
        name: Its key. Without `like` it is one of `METHODS`.
        entry: Nothing, for the method as it is; a list of learning rates; or a mapping with any of `like` (the method
            it is a variant of), `title`, `learning_rates`, `optimizer` and `adapter`, keywords that are added to those
            of the method for its optimizer (LoRA-Pro: settings of `LoRAProConfig`) and for `LoraConfig`.

    Raises:
        UsageError: for an unknown method, key or keyword, a value of the wrong kind, or a rate that is not a positive
            number.
    """
    require_name("method", name)
    if entry is None or isinstance(entry, list):
        entry = {} if entry is None else {"learning_rates": entry}
    if not isinstance(entry, Mapping):
        raise UsageError(f"Method {name}: {entry!r} is neither a list of learning rates nor a mapping.")
    unknown = sorted(set(entry) - {"like", "title", "learning_rates", "optimizer", "adapter"})
    if unknown:
        raise UsageError(f"Method {name}: {unknown} is unknown; use like, title, learning_rates, optimizer or adapter.")
    like = entry.get("like", name)
    base = METHODS.get(like) if isinstance(like, str) else None
    if base is None:
        raise UsageError(
            f"Method {like!r} is unknown; choose from {', '.join(METHODS)}, or say with `like` "
            "which of them it is a variant of."
        )
    require_types(f"Method {name}", entry, {"title": (str,)})
    for key in ("optimizer", "adapter"):
        require_mapping(f"Method {name}", key, entry.get(key))
    if entry.get("adapter") and base.adapter is None:
        raise UsageError(f"Method {name}: {base.title} has no adapter; leave `adapter` out.")
    adapter = None if base.adapter is None else {**base.adapter, **(entry.get("adapter") or {})}
    settings = {**base.settings, **(entry.get("optimizer") or {})}
    require_settings(name, base.optimizer, settings)
    require_adapter(name, adapter or {})
    return replace(
        base,
        name=name,
        title=entry.get("title", base.title if name == base.name else name),
        learning_rates=learning_rates(name, entry.get("learning_rates", base.learning_rates)),
        settings=settings,
        adapter=adapter,
    )


def learning_rates(name: str, values: Any) -> tuple[float, ...]:
    """The grid of a method in ascending order; YAML reads `1e-3` as text, which is a number here.

    Raises:
        UsageError: for what is no list of different positive numbers.
    """
    try:
        # neither a text, whose digits would be taken for rates, nor `true`, which would be 1
        plain = isinstance(values, list | tuple) and not any(isinstance(value, bool) for value in values)
        found = sorted({float(value) for value in values}) if plain else []
    except (TypeError, ValueError):
        found = []
    if not found or len(found) < len(values) or not all(math.isfinite(rate) and rate > 0 for rate in found):
        raise UsageError(f"The learning rates {values!r} of {name} must be a list of different positive numbers.")
    return tuple(found)
