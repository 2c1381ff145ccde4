"""Which settings and names must param groups have, and which of them hold the factors?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair


def name_parameters(param_group: dict[str, Any], groups: Sequence[dict[str, Any]], pairs: Sequence[LoRAPair]) -> None:
    """Name all parameters if any has a name, since torch wants names for all or for none.

    The factors of the pairs get their names in the model.
    """
    given = param_group["params"]
    if isinstance(given, set):  # torch refuses sets
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
    if not given:  # an empty group looks like one without names to torch
        param_group["param_names"] = []


def check_hyperparameters(group: Mapping[str, Any], where: str = "") -> None:
    """Raise a `ValueError` if a setting is out of range; the message adds `where` behind the setting."""
    lr, betas, eps, weight_decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if not isinstance(lr, int | float | Tensor) or not 0 <= lr < float("inf"):
        raise ValueError(f"lr={lr!r}{where} must be a finite number of at least 0, such as 2e-4.")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas={betas!r}{where} must be two numbers in [0, 1).")
    if not eps >= 0:
        raise ValueError(f"eps={eps!r}{where} must be at least 0.")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}{where} must be at least 0.")


def group_positions(pairs: Iterable[LoRAPair], groups: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, int]]:
    """The positions of the groups of A and of B, by the id of each pair; a `ValueError` if a factor is in no group."""
    positions = {id(p): position for position, group in enumerate(groups) for p in group["params"]}
    of_pairs = {}
    for pair in pairs:
        A, B = pair.A, pair.B
        if any(id(factor) not in positions for factor in (A, B, *pair.tied_parameters)):
            raise ValueError(
                f"{pair.name}: its factors are not in the optimizer's param_groups. Build the optimizer from the model "
                "it trains, after moving or wrapping it or loading an adapter into it: "
                "create_lorapro_optimizer(model, lr=...). A plain Trainer has PEFT make new factors of those in "
                "bfloat16 and float16 when it resumes: use LoRAProTrainer. Under DeepSpeed, call "
                "attach_deepspeed(engine, optimizer) before the first step."
            )
        of_pairs[id(pair)] = positions[id(A)], positions[id(B)]
    return of_pairs


def require_same_pairs(
    of_optimizer: Sequence[LoRAPair], groups: Iterable[Mapping[str, Any]], of_model: Sequence[LoRAPair]
) -> None:
    """Raise a `ValueError` if a model no longer trains the pairs and factors that an optimizer was built for."""
    held = {id(parameter) for group in groups for parameter in group["params"]}
    trained = {(id(pair.layer), pair.adapter_name) for pair in of_model}
    added = [pair for pair in of_model if id(pair.A) not in held or id(pair.B) not in held]
    removed = [pair for pair in of_optimizer if (id(pair.layer), pair.adapter_name) not in trained]
    differences = [
        f"{len(pairs)} {difference}, to begin with {pairs[0].name} of adapter {pairs[0].adapter_name!r}"
        for pairs, difference in (
            (added, "of the model are not in the optimizer"),
            (removed, "of the optimizer are not trained"),
        )
        if pairs
    ]
    if differences:
        raise ValueError(
            f"the model's LoRA pairs are not those that the optimizer was built for: {'; '.join(differences)}. "
            "Adapters were added, activated, deactivated, deleted or replaced since, or it is the optimizer of another "
            "model. Set trainer.optimizer = None, so that one is built for the model as it is now, or make a new "
            "trainer."
        )


def _with_names(params: Iterable[Any], position: int, of_factors: Mapping[int, str]) -> list[tuple[str, Any]]:
    """The parameters of the group at a position with their names, the given names among them."""
    return [
        each if isinstance(each, tuple) else (of_factors.get(id(each), f"param_group_{position}.{index}"), each)
        for index, each in enumerate(params)
    ]
