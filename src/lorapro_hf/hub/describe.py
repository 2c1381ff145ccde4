"""What can be said of a model, its adapter and its training?"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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

_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@")
_IN_CACHE = re.compile(r"models--(.+)/snapshots/[0-9a-f]+/?")  # folders of huggingface_hub's downloads


def adapter_of(model: Any) -> tuple[str, Any]:
    """Name and PEFT settings of the active adapter; `("default", None)` if there is none or PEFT did not make it."""
    parts: Any = model.modules() if isinstance(model, nn.Module) else [model]  # other libraries wrap the model
    adapted = next((part for part in parts if getattr(part, "peft_config", None)), None)
    if adapted is None:
        return "default", None
    # methods in models that took their adapter without PEFT, of which transformers has given up the second
    active: Any = getattr(adapted, "active_adapters", None) or getattr(adapted, "active_adapter", "default")
    active = active() if callable(active) else active
    if not isinstance(active, str):
        active = next(iter(active), "default")
    return active, adapted.peft_config.get(active)


def base_model_name(model: Any, stated: str | None = None) -> str | None:
    """The base model's name on the Hub; `None` for a model of a local folder or without a name.

    Args:
        model: the PEFT model.
        stated: the name that the user gave, which counts first unless it is a path.
    """
    _, adapter = adapter_of(model)
    names = (getattr(adapter, "base_model_name_or_path", None), getattr(base_of(model), "name_or_path", None))
    return next(filter(None, map(name_on_hub, (stated, *names))), None)


def name_on_hub(name: Any) -> str | None:
    """The name that a model or data set has on the Hub; `None` for a path.

    A folder of the cache into which `huggingface_hub` downloads tells the model's name. Other folders do not: the
    `_name_or_path` in their `config.json` is often the model from which theirs was trained.
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
    """The settings of LoRA-Pro and of the adapter, as a table of names and values.

    Rows that the model cannot tell, such as the pairs of a merged adapter, are left out.
    """
    config, rule = settings.config, rule_of(settings.config)
    rows = {
        "mode": config.mode,
        "update": rule.described_update,
        **_trust_region(rule),
        **_unusual(config.to_dict()),
    }
    try:
        pairs = find_lora_pairs(model)
    except ValueError:  # an adapter that cannot be trained any more; what it was is all the same worth a card
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
        layers_of = Counter(_layer_kind(pair.name) for pair in pairs)
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
        rows["base model loaded in"] = _quantization(quantization)
    return rows


def describe_optimizer(settings: Settings) -> dict[str, str]:
    """Learning rate and the like of the optimizer, as far as they are known."""
    known = settings.optimizer
    if not known:
        return {}
    beta1, beta2 = known["betas"]
    return {
        "learning rate": f"{known['learning_rate']:g}",
        "optimizer": f"LoRAProAdamW with betas ({beta1:g}, {beta2:g}), epsilon {known['eps']:g}, "
        f"weight decay {known['weight_decay']:g}",
    }


def split_at_end(log_history: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any] | None]:
    """What was logged during the training and what after it, `None` while it goes on."""
    ends = [i for i, entry in enumerate(log_history) if "train_runtime" in entry]
    if not ends:
        return list(log_history), None
    return list(log_history[: ends[-1]]), list(log_history[ends[-1] + 1 :])


def final_evaluation(log_history: Sequence[Mapping[str, Any]], best_step: int | None = None) -> dict[str, float]:
    """The metrics, without `eval_`, of the evaluation that is true of the saved weights.

    An evaluation after the training counts first, then that of the best step, if its weights have been loaded at the
    end, else the last one.

    Args:
        log_history: `trainer.state.log_history`.
        best_step: the step whose weights are loaded at the end, `None` if those of the last step are kept.
    """
    before, after = split_at_end(log_history)
    during, later = _evaluations(before), _evaluations(after or [])
    if later:
        return later[max(later)]
    if after is not None and best_step in during:
        return during[best_step]
    return during[max(during)] if during else {}


def evaluations_by_step(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations in a log, each with step, epoch and the last training loss before it."""
    losses, epochs = logged_numbers(log_history, "loss"), logged_numbers(log_history, "epoch")
    rows = []
    for step, metrics in sorted(_evaluations(log_history).items()):
        row: dict[str, float] = {"step": step}
        if step in epochs:
            row["epoch"] = epochs[step]
        before = [at for at in losses if at <= step]
        if before:
            row["training loss"] = losses[max(before)]
        rows.append({**row, **metrics})
    return rows


def _evaluations(entries: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for entry in entries:
        metrics = {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
        metrics = numbers_of({k: v for k, v in metrics.items() if not k.endswith(_NO_METRICS)})
        step = _step(entry)
        if metrics and step is not None:
            found.setdefault(step, {}).update(metrics)
    return found


def logged_numbers(log_history: Iterable[Mapping[str, Any]], name: str) -> dict[int, float]:
    """What was logged under a name, by step, as far as these are numbers; of a step's values the last counts."""
    found = ((_step(entry), as_number(entry.get(name))) for entry in log_history)
    return {step: value for step, value in found if step is not None and value is not None}


def _step(entry: Mapping[str, Any]) -> int | None:
    step = as_number(entry.get("step"))
    return int(step) if step is not None and math.isfinite(step) else None


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries whose values are numbers; lists, texts, `None` and the like stay out."""
    found = {name: as_number(value) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def as_number(value: Any) -> float | None:
    """A number of Python, NumPy or a tensor with one element as `float`; `None` for everything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    except (ArithmeticError, RuntimeError, TypeError, ValueError):  # more elements than one, more digits than a float's
        return None


def dataset_names(dataset: Any) -> list[str]:
    """The names on the Hub of what a `datasets.Dataset` was loaded from, as far as it remembers."""
    info = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or {}
    return sorted({found[1] for source in sources if (found := _ON_HUB.match(str(source)))})


def number(value: Any) -> str:
    """A number as in a table: four digits behind the point at most, and what does not fit them as it is."""
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    return f"{value:.4f}".rstrip("0").rstrip(".") if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def _trust_region(rule: UpdateRule) -> dict[str, str]:
    """The trust region, where the mode has one."""
    if not rule.has_trust_region:
        return {}
    return {"trust region": f"{rule.trust_region:g}" if rule.trust_region else "none"}


def _unusual(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that say something about the training and are not at their defaults."""
    rows = {}
    if settings["moments_dtype"] != "float32":
        rows["dtype of the moments"] = settings["moments_dtype"]
    if settings["rtol"] is not None:
        rows["rtol"] = f"{settings['rtol']:g}"
    if settings["master_factors"]:
        rows["master factors"] = "yes, in float32"
    return rows


def _layer_kind(name: str) -> str:
    """`"model.layers.0.self_attn.q_proj"` as `"q_proj"`; numbers and PEFT's own levels tell nothing."""
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


def _quantization(settings: Any) -> str:
    known = settings if isinstance(settings, Mapping) else settings.to_dict()
    method = known.get("quant_method", "quantized")
    method = getattr(method, "value", method)
    if known.get("load_in_4bit"):
        return f"4 bits ({known.get('bnb_4bit_quant_type', method)}, {method})"
    return f"8 bits ({method})" if known.get("load_in_8bit") else f"{known.get('bits', 'fewer')} bits ({method})"


def _spread(values: Iterable[float]) -> str:
    different = sorted(set(values))
    return f"{different[0]:g}" if len(different) == 1 else f"{different[0]:g} to {different[-1]:g}"


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"
