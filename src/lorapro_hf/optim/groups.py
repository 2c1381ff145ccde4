"""What must a param group say, and how are its parameters called?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair


def name_parameters(param_group: dict[str, Any], groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Give names to a new group where others have some, and to the others where it has: torch wants all or none.

    Args:
        param_group: the new group.
        groups: the optimizer's.
        pairs: of the optimizer, whose factors get their names in the model.
    """
    given = param_group["params"]
    if isinstance(given, set):  # for torch to refuse
        return
    given = param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
    has_names = "param_names" in param_group or any(isinstance(each, tuple) for each in given)
    if not has_names and not any("param_names" in group for group in groups):
        return
    of_factors = {id(p): f"{pair.name}.{name}" for pair in pairs for name, p in pair.layer.named_parameters()}
    for position, group in enumerate(groups):
        if "param_names" not in group:
            group["param_names"] = [name for name, _ in _with_names(group["params"], position, of_factors)]
    if "param_names" not in param_group:
        param_group["params"] = _with_names(given, len(groups), of_factors)
    if not given:  # torch takes an empty group for one without names
        param_group["param_names"] = []


def check_hyperparameters(group: Mapping[str, Any], where: str = "") -> None:
    """Raise if a group asks for what AdamW cannot do.

    Args:
        group: lr, betas, eps and weight_decay.
        where: what a message says behind the setting.

    Raises:
        ValueError: one is out of range.
    """
    lr, betas, eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r}{where} must be a finite number of at least 0.")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas={betas!r}{where} must be two numbers in [0, 1).")
    if not eps >= 0:
        raise ValueError(f"eps={eps!r}{where} must be at least 0.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}{where} must be at least 0.")


def _with_names(params: Iterable[Any], position: int, of_factors: Mapping[int, str]) -> list[tuple[str, Any]]:
    """Parameters of the group at a position with their names; names that exist are kept."""
    return [
        each if isinstance(each, tuple) else (of_factors.get(id(each), f"param_group_{position}.{index}"), each)
        for index, each in enumerate(params)
    ]
