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

from lorapro_hf.factors.pairs import LoRAPair, find_lora_pairs
from lorapro_hf.hub.settings import Settings
from lorapro_hf.hub.usage import base_of
from lorapro_hf.optim.memory import readable_bytes, state_bytes_by_device
from lorapro_hf.optim.rules import rule_of

_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")
_IN_CACHE = re.compile(r"models--(.+)/snapshots/[0-9a-f]+/?")  # folders of huggingface_hub's downloads


def adapter_of(model: Any) -> tuple[str, Any]:
    """Return name and PEFT settings of the active adapter; `("default", None)` if PEFT made none."""
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
    """Return the base model's name on the Hub, the stated one first; `None` for a local or nameless model."""
    _, adapter = adapter_of(model)
    names = (getattr(adapter, "base_model_name_or_path", None), getattr(base_of(model), "name_or_path", None))
    return next(filter(None, map(name_on_hub, (stated, *names))), None)


def name_on_hub(name: Any) -> str | None:
    """Return the name of a model or data set on the Hub; `None` for a path.

    A folder in the download cache of `huggingface_hub` tells the name. Other folders do not: `_name_or_path` in their
    `config.json` often names the model that theirs was trained from.
    """
    if not isinstance(name, str) or not name:
        return None
    if cached := _IN_CACHE.search(name):
        name = cached[1].replace("--", "/")
    elif os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def dataset_names(dataset: Any) -> list[str]:
    """Return the names on the Hub that a `datasets.Dataset` was loaded from, if it remembers them."""
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    return sorted({match[1] for source in sources if (match := _ON_HUB.match(str(source)))})


def describe_lora_pro(model: nn.Module, settings: Settings) -> dict[str, str]:
    """Return the settings of LoRA-Pro and of the adapter by name, as far as the model tells them."""
    config, rule = settings.config, rule_of(settings.config)
    _, adapter = adapter_of(model)
    try:
        pairs = find_lora_pairs(model)
    except ValueError:  # a merged adapter, say, which still deserves a card
        pairs = []
    rows = {"mode": config.mode, "update": rule.described_update}
    rows["trust region"] = f"{rule.trust_region:g} of the weight" if rule.trust_region else "none"
    if config.moments_dtype != "float32":
        rows["dtype of the moments"] = config.moments_dtype
    if config.rtol is not None:
        rows["rtol"] = f"{config.rtol:g}"
    if config.master_factors:
        rows["master factors"] = "yes, in float32"
    if pairs:
        rows |= _ranks(pairs)
        rows["rsLoRA"] = "yes" if getattr(adapter, "use_rslora", False) else "no"
        rows["DoRA"] = "yes" if getattr(adapter, "use_dora", False) else "no"
    rows |= _unusual(adapter)
    if pairs:
        of_pairs = {id(p) for pair in pairs for p in (pair.A, pair.B, *pair.tied_parameters)}
        trained = [p for p in model.parameters() if p.requires_grad]
        state = state_bytes_by_device(pairs, config, [p for p in trained if id(p) not in of_pairs])
        layers = sorted(Counter(layer_kind(pair.name) for pair in pairs).items())
        rows["adapted layers"] = ", ".join(f"`{name}` ({count})" for name, count in layers)
        rows["pairs of factors"] = f"{len(pairs)}"
        rows["trained parameters"] = f"{sum(p.numel() for p in trained):,}"
        rows["optimizer state"] = readable_bytes(sum(state.values()))
    quantization = getattr(getattr(base_of(model), "config", None), "quantization_config", None)
    if quantization is not None:
        rows["base model loaded in"] = describe_quantization(quantization)
    return rows


def describe_optimizer(settings: Settings) -> dict[str, str]:
    """Return the learning rate and other settings of the optimizer; nothing if they are not known."""
    known = settings.optimizer
    if not known:
        return {}
    beta1, beta2 = known["betas"]
    return {
        "learning rate": f"{known['learning_rate']:g}",
        "optimizer": f"LoRAProAdamW with betas ({beta1:g}, {beta2:g}), epsilon {known['eps']:g}, "
        f"weight decay {known['weight_decay']:g}",
    }


def layer_kind(name: str) -> str:
    """Return `"q_proj"` for `"model.layers.0.self_attn.q_proj"`."""
    parts = [part for part in name.split(".") if not part.isdigit() and part != "base_layer"]
    return parts[-1] if parts else name


def describe_quantization(settings: Any) -> str:
    """Return a `quantization_config` in words, such as "4 bits (bitsandbytes, nf4)"."""
    known = settings if isinstance(settings, Mapping) else settings.to_dict()
    method = known.get("quant_method", "unknown method")
    method = str(getattr(method, "value", method))
    bits = 4 if known.get("load_in_4bit") else 8 if known.get("load_in_8bit") else known.get("bits")
    kind = f", {known['bnb_4bit_quant_type']}" if known.get("load_in_4bit") else ""
    return f"{bits} bits ({method}{kind})" if bits else method


def _ranks(pairs: Iterable[LoRAPair]) -> dict[str, str]:
    """Return the smallest and the largest rank, alpha and scaling."""
    values = {
        "rank r": {pair.layer.r[pair.adapter_name] for pair in pairs},
        "alpha": {pair.layer.lora_alpha[pair.adapter_name] for pair in pairs},
        "scaling of B·A": {pair.scaling for pair in pairs},
    }
    return {name: " to ".join(f"{end:g}" for end in sorted({min(each), max(each)})) for name, each in values.items()}


def _unusual(adapter: Any) -> dict[str, str]:
    """Return PEFT's settings that differ from their defaults."""
    rows = {}
    for name in ("target_parameters", "modules_to_save", "bias", "init_lora_weights", "lora_dropout"):
        value = getattr(adapter, name, None)
        if value in (None, "none", True, 0.0) or value == [] or value == set():
            continue
        named = sorted(map(str, value)) if isinstance(value, list | set | tuple) else [str(value)]
        rows[name.replace("_", " ")] = ", ".join(f"`{each}`" for each in named)
    return rows
