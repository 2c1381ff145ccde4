"""Does this optimizer checkpoint belong to this optimizer? Asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorapro_hf.moments import dense_shape
from lorapro_hf.pairs import LoRAPair

_ADVICE = "It is a checkpoint of another model or rank; resume with the model it was written for."


def check_state_dict(
    state_dict: dict[str, Any], param_groups: list[dict[str, Any]], pairs: Sequence[LoRAPair], mode: str
) -> None:
    """Raise a `ValueError` that says what differs if `state_dict` is of another optimizer, mode, rank or model."""
    saved_groups = state_dict["param_groups"]
    modes = {group.get("lora_pro_mode") for group in saved_groups}
    if modes != {mode}:
        found = "of another optimizer" if None in modes else f"of LoRA-Pro mode {modes.pop()!r}"
        raise ValueError(
            f"the checkpoint is {found}, but this optimizer has LoRA-Pro mode {mode!r}. Resume with the settings it "
            "was written with, or without the optimizer's state (delete optimizer.pt from the checkpoint's folder)."
        )
    if len(saved_groups) != len(param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups, this optimizer {len(param_groups)}. {_ADVICE}"
        )
    for saved, own in zip(saved_groups, param_groups, strict=True):
        _check_group(saved, own)
    holders = {id(p) for pair in pairs for p in ((pair.A,) if mode == "full" else (pair.A, pair.B))}
    dense = {id(pair.A): dense_shape(pair) for pair in pairs} if mode == "full" else {}
    for saved, own in zip(saved_groups, param_groups, strict=True):
        for key, name, parameter in zip(saved["params"], _names(own), own["params"], strict=True):
            state = state_dict["state"].get(key, {})
            if (id(parameter) in holders) and state and not {"exp_avg", "exp_avg_sq"} <= state.keys():
                raise ValueError(f"the checkpoint lacks the moments of {name}; it is damaged. Use an earlier one.")
            shape = dense.get(id(parameter), tuple(parameter.shape))
            for moment in ("exp_avg", "exp_avg_sq"):
                before = tuple(state[moment].shape) if moment in state else shape
                if before != shape:
                    raise ValueError(f"{name} has moments of shape {shape}, but {before} in the checkpoint. {_ADVICE}")


def _check_group(saved: dict[str, Any], own: dict[str, Any]) -> None:
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            f"the checkpoint has {len(saved['params'])} parameters in a group, this optimizer {len(own['params'])}. "
            f"{_ADVICE}"
        )
    names = _names(own)
    for name, before in zip(names, saved.get("param_names") or names, strict=True):
        if before != name:
            raise ValueError(f"the checkpoint has the state of {before!r} where this optimizer has {name!r}. {_ADVICE}")
    for name, before, now in zip(names, saved["param_shapes"], own["param_shapes"], strict=True):
        if list(before) != list(now):
            raise ValueError(f"{name} has shape {list(now)}, but {list(before)} in the checkpoint. {_ADVICE}")


def _names(group: dict[str, Any]) -> list[str]:
    return group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
