"""Which arguments does a call of a mixin pass to its parent, whose signature is another library's?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lorapro_hf.factors.pairs import find_lora_pairs


def handed(trainer: type, mixin: type, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a trainer's `method`, by the names of the parents that come after the mixin.

    Where a parent takes `*args`, the next parent names the arguments beyond its own. A call that does not fit the
    parent raises nothing.
    """
    names: list[str] = []
    for parent in _definers(trainer, mixin, method):
        parameters = _parameters(parent, method).values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
        names += named[len(names) :]
        if all(p.kind is not p.VAR_POSITIONAL for p in parameters):
            break
    return {**dict(zip(names, args, strict=False)), **kwargs}


def replaced(
    given: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another value for `name`, which is among those `given` by `handed`."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    place = list(given).index(name)
    return (*args[:place], value, *args[place + 1 :]), kwargs


def accepted(method: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """The keywords among `offered` that a method takes."""
    parameters = inspect.signature(method).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in offered.items() if takes_all or name in parameters}


def require_adapter(trainer: type, mixin: type, given: Mapping[str, Any], otherwise: str) -> None:
    """Raise a `ValueError` if a trainer of TRL got no adapter that can be trained, and no `peft_config` to make one.

    Otherwise TRL would first prepare the whole data set, and the later message would name another remedy. The arguments
    of `__init__` are `given` by `handed`.
    """
    parent = next(_definers(trainer, mixin, "__init__"))
    # a user's subclass may make an adapter by itself
    makes_one = parent.__module__.startswith("trl.") and "peft_config" in _parameters(parent, "__init__")
    model = given.get("model")
    if not makes_one or model is None or given.get("train_dataset") is None or given.get("peft_config") is not None:
        return
    if getattr(model, "peft_config", None):
        find_lora_pairs(model)
        return
    raise ValueError(
        f"{trainer.__name__} got a model without an adapter, and no peft_config= to make one from. Pass "
        'peft_config=LoraConfig(target_modules="all-linear") (--use_peft in TRL\'s own scripts) or a model from '
        f"get_peft_model, or {otherwise}."
    )


def groups_beside(trainer: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Param groups of a trainer's parameters outside the model, such as those of a loss of sentence-transformers."""
    settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)[1]
    known = {id(parameter) for parameter in model.parameters()}
    groups = []
    for number, group in enumerate(settings.get("optimizer_dict", ())):
        beside = [parameter for parameter in group["params"] if id(parameter) not in known]
        named = [(f"beside_the_model.{number}.{place}", parameter) for place, parameter in enumerate(beside)]
        groups += [{**group, "params": named, "lora_pro_factors": False}] if named else []
    return groups


def _definers(trainer: type, mixin: type, method: str) -> Iterator[type]:
    order = trainer.__mro__
    return (parent for parent in order[order.index(mixin) + 1 :] if method in vars(parent))


def _parameters(parent: type, method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(vars(parent)[method]).parameters
