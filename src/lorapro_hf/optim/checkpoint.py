"""Does a checkpoint belong to this optimizer? Checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lorapro_hf.config import LoRAProConfig
from lorapro_hf.distributed.access import local
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.optim.finite import find_broken
from lorapro_hf.optim.rules import rule_of
from lorapro_hf.optim.rules.base import MEANING, UpdateRule
from lorapro_hf.utils.text_files import shown

_ADVICE = "It is a checkpoint of another model or rank; resume with the model it was written for."
# Of settings that checkpoints of earlier versions do not hold. Their trust region limited the product of both changes.
_EARLIER_DEFAULTS = {"update": "linear", "trust_region": 0.03, "efficient_projected": True}
_WITHOUT_EARLIER_LIMIT = ("rite", "efficient")
# Raised where a pair has its step count but no moments: another rank held them.
_PARTIAL = (
    "the checkpoint has only part of the optimizer's state, as the state_dict() of a rank other than 0 does. Call "
    "state_dict() or consolidate_state_dict() on all ranks, and save and load the one of rank 0. Under FSDP2 leave "
    "out flatten_optimizer_state_dict."
)


def check_state_dict(
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    pairs: Sequence[LoRAPair],
    config: LoRAProConfig,
    needed: Sequence[LoRAPair] | None = None,
) -> None:
    """Raise a `ValueError` if `state_dict` is of another optimizer, mode, rank or model, or holds NaN or Inf.

    The other arguments are those of the optimizer that loads it; `needed` are the pairs whose moments this rank loads.
    """
    saved_groups = state_dict["param_groups"]
    if any("lora_pro_partial" in group for group in saved_groups):  # how earlier versions marked it
        raise ValueError(_PARTIAL)
    modes = {_kind(group) for group in saved_groups}
    own_mode = _kind(param_groups[0])
    if modes != {own_mode}:
        found = "of another optimizer" if None in modes else f"of LoRA-Pro mode {modes.pop()}"
        before = {group.get("lora_pro_mode") for group in saved_groups} - {None, config.mode}
        named = "".join(f", mode={shown(mode)} (--lora_pro_mode)" for mode in before)
        raise ValueError(
            f"the checkpoint is {found}, but this optimizer has LoRA-Pro mode {own_mode}. Resume with the settings it "
            f"was written with{named}, or start a new training from the saved adapter: PeftModel.from_pretrained(base, "
            "checkpoint, is_trainable=True)."
        )
    if len(saved_groups) != len(param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups, this optimizer {len(param_groups)}. {_ADVICE}"
        )
    for saved, own in zip(saved_groups, param_groups, strict=True):
        _check_group(saved, own)
    check_open_settings(saved_groups, rule_of(config))
    of_needed = {id(factor) for pair in (pairs if needed is None else needed) for factor in (pair.A, pair.B)}
    rule = rule_of(config)
    expected: dict[int, dict[str, tuple[int, ...]]] = {}
    for pair in pairs:
        expected[id(pair.A)], expected[id(pair.B)] = {}, {}
        for spec in rule.specs(pair):
            expected[id(pair.A if spec.side == "A" else pair.B)][spec.name] = spec.shape
    held = []
    for saved, own in zip(saved_groups, param_groups, strict=True):
        for key, name, parameter in zip(saved["params"], _names(own), own["params"], strict=True):
            state = state_dict["state"].get(key, {})
            shapes = expected.get(id(parameter), dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(parameter.shape)))
            if state and id(parameter) in expected and not shapes.keys() <= state.keys():
                if state.keys() != {"step"}:
                    raise ValueError(f"the checkpoint lacks the moments of {name}; it is damaged. Use an earlier one.")
                if id(parameter) in of_needed:
                    raise ValueError(_PARTIAL)
            _check_shapes(name, state, shapes)
            held += [(f"{kind!r} of {name}", local(x)) for kind, x in state.items() if isinstance(x, Tensor)]
    if broken := find_broken(held):
        raise ValueError(f"the checkpoint holds NaN or Inf in {broken}. Resume from an earlier one.")


def check_open_settings(saved_groups: Sequence[dict[str, Any]], rule: UpdateRule) -> None:
    """Raise a `ValueError` if a setting would change its value or meaning, because its default is another one now."""
    earlier = {_saved("trust_region", group) for group in saved_groups if not group.keys() >= MEANING.keys()} - {0.0}
    if earlier and (rule.config.trust_region is None or rule.config.trust_region in earlier):
        raise ValueError(
            f"the checkpoint was written by an earlier version with trust_region={earlier.pop()!r}, a limit of the "
            "product of the changes of both factors. That limit is gone, and trust_region now limits the step of the "
            "weight. Set trust_region=0 (--lora_pro_trust_region 0) to go on without a limit, or another fraction."
        )
    for name, now in rule.in_force.items():
        before = {_saved(name, group) for group in saved_groups}
        if getattr(rule.config, name) is None and before != {now}:
            was = (before - {now}).pop()
            raise ValueError(
                f"the checkpoint was written with {name}={was!r}, or by an earlier version with this default. "
                f"The settings leave {name} open, and its default is now {now!r}. Set {name}={was!r} "
                f"(--lora_pro_{name} {was}) to go on as before, or {name}={now!r}."
            )


def _saved(name: str, group: dict[str, Any]) -> Any:
    """The value of a setting in a checkpoint."""
    without_limit = name == "trust_region" and group.get("lora_pro_mode") in _WITHOUT_EARLIER_LIMIT
    return group.get(name, 0.0 if without_limit else _EARLIER_DEFAULTS[name])


def _check_shapes(name: str, state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    for moment, shape in shapes.items():
        before = tuple(state[moment].shape) if moment in state else shape
        if before != shape:
            raise ValueError(f"{name} has moments of shape {shape}, but {before} in the checkpoint. {_ADVICE}")


def _kind(group: dict[str, Any]) -> str | None:
    """How a message names the state of the pairs; a setting that a group lacks has its default."""
    mode, moments_dtype = group.get("lora_pro_mode"), group.get("moments_dtype", "float32")
    if mode is None:
        return None
    name = f"'full' in {shown(moments_dtype)}" if moments_dtype != "float32" else shown(mode)
    name += " with escape" if group.get("rite_escape") else ""
    return f"{name} with master factors" if group.get("master_factors") else name


def _check_group(saved: dict[str, Any], own: dict[str, Any]) -> None:
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            f"the checkpoint has {len(saved['params'])} parameters in a group, this optimizer {len(own['params'])}. "
            f"{_ADVICE}"
        )
    names = _names(own)
    for name, before in zip(names, saved.get("param_names") or names, strict=True):
        if unwrapped_name(before) != unwrapped_name(name):
            raise ValueError(
                f"the checkpoint has the state of {shown(before)} where this optimizer has {name!r}. {_ADVICE}"
            )
    for name, before, now in zip(names, saved["param_shapes"], own["param_shapes"], strict=True):
        if list(before) != list(now):
            raise ValueError(f"{name} has shape {list(now)}, but {shown(list(before))} in the checkpoint. {_ADVICE}")


def _names(group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
