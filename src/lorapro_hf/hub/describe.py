"""Which names and settings of a model, its adapter and its data does a card show?"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn

from lorapro_hf.factors.pairs import find_lora_pairs
from lorapro_hf.hub.settings import Settings
from lorapro_hf.hub.usage import base_of
from lorapro_hf.optim.memory import readable_bytes, state_bytes_by_device
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import UpdateRule

_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")
_IN_CACHE = re.compile(r"models--(.+)/snapshots/[0-9a-f]+/?")  # folders of huggingface_hub's downloads


def adapter_of(model: Any) -> tuple[str, Any]:
    """Name and PEFT settings of the active adapter; `("default", None)` if there is none or PEFT did not make it."""
    parts: Any = model.modules() if isinstance(model, nn.Module) else [model]  # other libraries wrap the model
    adapted = next((part for part in parts if getattr(part, "peft_config", None)), None)
    if adapted is None:
        return "default", None
    # these are methods in models that load adapters without a PeftModel; transformers 5 has only the first
    active: Any = getattr(adapted, "active_adapters", None) or getattr(adapted, "active_adapter", "default")
    active = active() if callable(active) else active
    if not isinstance(active, str):
        active = next(iter(active), "default")
    return active, adapted.peft_config.get(active)


def base_model_name(model: Any, stated: str | None = None) -> str | None:
    """The base model's name on the Hub; `None` for a model of a local folder or without a name.

    Args:
        model: the PEFT model.
        stated: the user's name for it, which counts first unless it is a path.
    """
    _, adapter = adapter_of(model)
    names = (getattr(adapter, "base_model_name_or_path", None), getattr(base_of(model), "name_or_path", None))
    return next(filter(None, map(name_on_hub, (stated, *names))), None)


def name_on_hub(name: Any) -> str | None:
    """The name of a model or data set on the Hub; `None` for a path.

    A folder in the download cache of `huggingface_hub` tells the name. Other folders do not: `_name_or_path` in their
    `config.json` often names the model that theirs was trained from.
    """
    if not isinstance(name, str) or not name:
        return None
    if found := _IN_CACHE.search(name):
        name = found[1].replace("--", "/")
    elif os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def describe_lora_pro(model: nn.Module, settings: Settings) -> dict[str, str]:
    """The settings of LoRA-Pro and of the adapter, as names and values, as far as the model tells them."""
    config, rule = settings.config, rule_of(settings.config)
    rows = {
        "mode": config.mode,
        "update": rule.described_update,
        **_trust_region(rule),
        **_unusual(config.to_dict()),
    }
    try:
        pairs = find_lora_pairs(model)
    except ValueError:  # a merged adapter, say, which still deserves a card
        pairs = []
    _, adapter = adapter_of(model)
    if pairs:
        layers = [(pair.layer, pair.adapter_name) for pair in pairs]
        rows |= {
            "rank r": _spread(layer.r[name] for layer, name in layers),
            "alpha": _spread(layer.lora_alpha[name] for layer, name in layers),
            "scaling of B·A": _spread(pair.scaling for pair in pairs),
            "rsLoRA": _yes_no(getattr(adapter, "use_rslora", False)),
            "DoRA": _yes_no(getattr(adapter, "use_dora", False)),
        }
    rows |= _targets(adapter)
    if pairs:
        layers_of = Counter(layer_kind(pair.name) for pair in pairs)
        rows["adapted layers"] = ", ".join(f"`{name}` ({count})" for name, count in sorted(layers_of.items()))
        of_pairs = {id(p) for pair in pairs for p in (pair.A, pair.B, *pair.tied_parameters)}
        trained = [p for p in model.parameters() if p.requires_grad]
        state = state_bytes_by_device(pairs, config, [p for p in trained if id(p) not in of_pairs])
        rows |= {
            "pairs of factors": f"{len(pairs)}",
            "trained parameters": f"{sum(p.numel() for p in trained):,}",
            "optimizer state": readable_bytes(sum(state.values())),
        }
    quantization = getattr(getattr(base_of(model), "config", None), "quantization_config", None)
    if quantization is not None:
        rows["base model loaded in"] = describe_quantization(quantization)
    return rows


def describe_optimizer(settings: Settings) -> dict[str, str]:
    """Learning rate and other settings of the optimizer; empty if they are not known."""
    known = settings.optimizer
    if not known:
        return {}
    beta1, beta2 = known["betas"]
    return {
        "learning rate": f"{known['learning_rate']:g}",
        "optimizer": f"LoRAProAdamW with betas ({beta1:g}, {beta2:g}), epsilon {known['eps']:g}, "
        f"weight decay {known['weight_decay']:g}",
    }


def dataset_names(dataset: Any) -> list[str]:
    """The names on the Hub that a `datasets.Dataset` was loaded from, if it remembers them."""
    info = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or {}
    return sorted({found[1] for source in sources if (found := _ON_HUB.match(str(source)))})


def _trust_region(rule: UpdateRule) -> dict[str, str]:
    """The trust region, where the mode has one."""
    if not rule.has_trust_region:
        return {}
    return {"trust region": f"{rule.trust_region:g}" if rule.trust_region else "none"}


def _unusual(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that differ from their defaults."""
    rows = {}
    if settings["moments_dtype"] != "float32":
        rows["dtype of the moments"] = settings["moments_dtype"]
    if settings["rtol"] is not None:
        rows["rtol"] = f"{settings['rtol']:g}"
    if settings["master_factors"]:
        rows["master factors"] = "yes, in float32"
    return rows


def layer_kind(name: str) -> str:
    """`"q_proj"` for `"model.layers.0.self_attn.q_proj"`."""
    parts = [part for part in name.split(".") if not part.isdigit() and part != "base_layer"]
    return parts[-1] if parts else name


def _targets(adapter: Any) -> dict[str, str]:
    rows = {}
    for name in ("target_parameters", "modules_to_save", "bias", "init_lora_weights", "lora_dropout"):
        value = getattr(adapter, name, None)
        if value in (None, "none", True, 0.0) or value == [] or value == set():
            continue
        named = sorted(map(str, value)) if isinstance(value, list | set | tuple) else [str(value)]
        rows[name.replace("_", " ")] = ", ".join(f"`{each}`" for each in named)
    return rows


def describe_quantization(settings: Any) -> str:
    """A `quantization_config` in words, such as "4 bits (bitsandbytes, nf4)"."""
    known = settings if isinstance(settings, Mapping) else settings.to_dict()
    method = known.get("quant_method", "unknown method")
    method = str(getattr(method, "value", method))
    bits = 4 if known.get("load_in_4bit") else 8 if known.get("load_in_8bit") else known.get("bits")
    kind = f", {known['bnb_4bit_quant_type']}" if known.get("load_in_4bit") else ""
    return f"{bits} bits ({method}{kind})" if bits else method


def _spread(values: Iterable[float]) -> str:
    different = sorted(set(values))
    return f"{different[0]:g}" if len(different) == 1 else f"{different[0]:g} to {different[-1]:g}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"
