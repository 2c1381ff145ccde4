"""How does a DeepSpeed checkpoint hold the moments of the pairs, for any number of processes?

DeepSpeed saves what lies in its flat partitions, and the moments of a pair do not. Each rank therefore writes one more
file into the folder of the checkpoint's tag, with the moments of the pairs that it owns. DeepSpeed's own state loads on
as many processes as have saved it and no others; for these the files also hold, divided among the ranks, the float32
masters of all trainable parameters and AdamW's moments of those that belong to no pair.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorapro_hf.distributed.zero import ZeroAccess
from lorapro_hf.optim.lora_pro import LoRAProAdamW

_NAME = "lora_pro_rank{}.safetensors"
_ABOUT = "lora_pro"
_AFRESH = "To start LoRA-Pro from its weights alone, call load_checkpoint(..., load_optimizer_states=False)."


def save_with_moments(engine: Any, optimizer: LoRAProAdamW, access: ZeroAccess) -> Callable[..., Any]:
    """The engine's `save_checkpoint`, which writes the moments first, so that `latest` never names a folder without."""
    original = engine.save_checkpoint

    @wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, args, kwargs)
        if given["save_dir"]:
            optimizer.require_finite_save()
            tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
            frozen = not given.get("exclude_frozen_parameters", False)
            about = {"global_steps": engine.global_steps, "frozen": frozen}
            _write(Path(given["save_dir"], tag), optimizer, access, about)
        return original(*args, **kwargs)

    return save_checkpoint


def load_with_moments(engine: Any, optimizer: LoRAProAdamW, access: ZeroAccess) -> Callable[..., Any]:
    """The engine's `load_checkpoint`, which checks the moments' files before and reads them after DeepSpeed's own."""
    original = engine.load_checkpoint

    def load(**given: Any) -> Any:
        loaded = original(**given)
        engine.optimizer.clip_grad = engine.gradient_clipping()  # DeepSpeed takes that of the checkpoint
        return loaded

    @wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, args, kwargs)
        tag = _latest(given["load_dir"]) if given["tag"] is None else str(given["tag"])
        if tag is None or given["load_module_only"] or not given["load_optimizer_states"]:
            return load(**given)
        with _opened(Path(given["load_dir"], tag), optimizer) as saved:
            is_same_size = saved.about["ranks"] == access.group.size()
            if not is_same_size:
                _require_readable(saved, access, tag, given["load_dir"])
                given["load_optimizer_states"] = False
            loaded = load(**given)
            if loaded[0] is None:
                return loaded
            if engine.global_steps != saved.about["global_steps"]:
                raise RuntimeError(
                    f"{saved.folder} mixes two checkpoints: DeepSpeed's files are of step {engine.global_steps}, the "
                    f"moments of step {saved.about['global_steps']}. Saving was interrupted; load an earlier tag into "
                    "a new engine."
                )
            if not is_same_size:
                _restore_parameters(saved, optimizer, access)
            optimizer.load_own_state(saved.read)
        return loaded

    return load_checkpoint


def partitions_state_dict(optimizer: LoRAProAdamW) -> dict[str, Any]:
    """What DeepSpeed saves of our optimizer: its groups, and the state of the flat partitions that stand in them."""
    optimizer._settle_skipped()
    factors: list[Tensor] = [factor for pair in optimizer.pairs for factor in (pair.A, pair.B)]
    of_pairs = {factor: optimizer.state.pop(factor) for factor in factors if factor in optimizer.state}
    try:
        return torch.optim.Optimizer.state_dict(optimizer)
    finally:
        optimizer.state.update(of_pairs)


def load_partitions_state_dict(optimizer: LoRAProAdamW, state_dict: dict[str, Any]) -> None:
    """The inverse of `partitions_state_dict`; the pairs are left without state.

    Raises:
        ValueError: it is of another optimizer or model. Nothing has been changed then.
    """
    keys = ("lora_pro_mode", "moments_dtype", "param_shapes")
    saved, own = (
        [[group.get(key) for key in keys] for group in groups]
        for groups in (state_dict["param_groups"], optimizer.param_groups)
    )
    if saved != own:
        raise ValueError(
            "the optimizer's state in the checkpoint is of another optimizer, mode or model. Resume with the settings "
            f"and the model it was written with. {_AFRESH}"
        )
    torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    optimizer._skipped = None
    optimizer._begin_training()
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(parameter.device, copy=True)


class _Saved:
    """What all ranks have written into one folder."""

    def __init__(self, folder: Path, about: dict[str, Any], files: dict[str, Any]) -> None:
        self.folder, self.about, self.files = folder, about, files

    def read(self, name: str) -> Tensor | None:
        return self.files[name].get_tensor(name) if name in self.files else None


def _write(folder: Path, optimizer: LoRAProAdamW, access: ZeroAccess, about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    rank, ranks = access.group.rank(), access.group.size()
    tensors = {} if optimizer.config.shard_states is False and rank else optimizer.own_state()
    tensors = {**tensors, **_parameter_states(access)}
    about = {**about, **_identity(optimizer), "rank": rank, "ranks": ranks, "groups": _scalars(optimizer)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME.format(rank)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # a link that lies there would be followed
    # Scalars are views of one tensor, which the format does not allow.
    on_cpu = {name: t.detach().cpu().clone() if t.dim() == 0 else t.detach().cpu() for name, t in tensors.items()}
    save_file(on_cpu, partial, metadata={_ABOUT: json.dumps(about)})
    os.replace(partial, path)
    if rank == 0:  # of an earlier save by more ranks under the same tag
        for old, its_rank in moments_files(folder).items():
            if its_rank >= ranks:
                old.unlink()


def moments_files(folder: Path) -> dict[Path, int]:
    """The files of the ranks in a folder, with their ranks; a file of another name is not LoRA-Pro's."""
    pattern = re.compile(_NAME.format("([0-9]+)"))
    named = {path: pattern.fullmatch(path.name) for path in sorted(folder.glob(_NAME.format("*")))}
    return {path: int(match[1]) for path, match in named.items() if match}


@contextmanager
def _opened(folder: Path, optimizer: LoRAProAdamW) -> Iterator[_Saved]:
    """All files of a folder, open, after checking that they belong together and to this optimizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, of another save, or of another model or mode.
    """
    from safetensors import SafetensorError, safe_open

    paths = list(moments_files(folder))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no {_NAME.format('<n>')}: the checkpoint was written without LoRA-Pro, or before "
            f"attach_deepspeed was called. {_AFRESH}"
        )
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        abouts = []
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                abouts.append(json.loads((file.metadata() or {})[_ABOUT]))
            except (SafetensorError, KeyError) as error:
                raise ValueError(
                    f"{path} is truncated or not from LoRA-Pro ({error}). Load an earlier checkpoint."
                ) from error
            files.update(dict.fromkeys(file.keys(), file))
        _check(folder, abouts, _identity(optimizer))
        yield _Saved(folder, abouts[0], files)


def _check(folder: Path, abouts: list[dict[str, Any]], identity: dict[str, Any]) -> None:
    first = abouts[0]
    for key in ("ranks", "global_steps"):
        if any(about[key] != first[key] for about in abouts):
            raise ValueError(
                f"the moments in {folder} are of two saves: {key} is {sorted({about[key] for about in abouts})}. "
                "Saving was interrupted; load an earlier checkpoint."
            )
    missing = set(range(first["ranks"])) - {about["rank"] for about in abouts}
    if missing:
        names = ", ".join(_NAME.format(rank) for rank in sorted(missing))
        raise FileNotFoundError(
            f"{folder} lacks {names}. Copy all files of all ranks there, or load another checkpoint."
        )
    for key, own in identity.items():
        if first[key] != own:
            raise ValueError(
                f"the checkpoint {folder} is of another LoRA-Pro training: its {key} {_difference(first[key], own)}. "
                f"Resume with the model and settings it was written with. {_AFRESH}"
            )


def _identity(optimizer: LoRAProAdamW) -> dict[str, Any]:
    """What a checkpoint and an optimizer must agree in, as JSON returns it."""
    pairs = {f"{p.name}.{p.adapter_name}": [list(p.shape_A), list(p.shape_B)] for p in optimizer.pairs}
    return {"mode": optimizer.config.mode, "moments_dtype": optimizer.config.moments_dtype, "pairs": pairs}


def _difference(saved: Any, own: Any) -> str:
    if not isinstance(own, dict):
        return f"is {saved!r}, here it is {own!r}"
    name = next(name for name in {**own, **saved} if saved.get(name) != own.get(name))
    return f"have {name} with shapes {saved.get(name)}, here they are {own.get(name)}"


def _require_readable(saved: _Saved, access: ZeroAccess, tag: str, folder: Any) -> None:
    """Raise where DeepSpeed cannot load the weights that another number of processes has saved."""
    if not access.partitions_parameters:
        return
    ranks, size = saved.about["ranks"], access.group.size()
    if saved.about["frozen"]:
        remedy = "save with save_checkpoint(..., exclude_frozen_parameters=True), as Trainer does, and load with "
        remedy += "load_module_strict=False"
    elif size > ranks:
        remedy = f"use at most {ranks} processes"
    elif tag != _latest(folder):
        remedy = f"write {tag!r} into the file 'latest' beside its folder, the only tag that DeepSpeed reads then"
    else:
        return
    raise RuntimeError(
        f"{saved.folder} was written by {ranks} processes at ZeRO stage 3 and does not load on {size}: {remedy}."
    )


def _parameter_states(access: ZeroAccess) -> dict[str, Tensor]:
    """This rank's share of the whole masters of all parameters, and of AdamW's state of those of no pair."""
    rank, ranks = access.group.rank(), access.group.size()
    found = {}
    for index, (name, parameter) in enumerate(access.trained()):
        whole = {"master": access.values([parameter])[0]}
        for moment, part in access.moments(parameter).items():
            whole[moment] = part if moment == "step" else access.gather([parameter], [part])[0]
        if index % ranks == rank:
            found.update({f"{name}:{key}": tensor for key, tensor in whole.items()})
    return found


def _restore_parameters(saved: _Saved, optimizer: LoRAProAdamW, access: ZeroAccess) -> None:
    """Take masters, AdamW's state and the groups' settings; DeepSpeed has loaded the parameters themselves."""
    for group, scalars in zip(optimizer.param_groups, saved.about["groups"], strict=True):
        group.update(scalars, betas=tuple(scalars["betas"]))
    for name, parameter in access.trained():
        read = {key: saved.read(f"{name}:{key}") for key in ("master", "step", "exp_avg", "exp_avg_sq")}
        whole = {key: tensor.to(parameter.device) for key, tensor in read.items() if tensor is not None}
        if "master" not in whole or whole["master"].shape != access.shape(parameter):
            raise ValueError(
                f"{saved.folder} has no {name} of shape {list(access.shape(parameter))}. Load it into the model "
                "that it was written for."
            )
        access.store([parameter], [whole.pop("master")])
        if whole:
            access.store_moments(parameter, whole)


def _scalars(optimizer: LoRAProAdamW) -> list[dict[str, Any]]:
    """The settings of the groups, the present learning rates among them, as JSON takes them."""
    optimizer._settle_skipped()
    return [
        {"betas": list(group["betas"])}
        | {key: float(value) for key, value in group.items() if isinstance(value, Tensor) and value.dim() == 0}
        | {key: value for key, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in optimizer.param_groups
    ]


def _latest(folder: Any) -> str | None:
    path = Path(folder, "latest")
    return path.read_text().strip() if path.is_file() else None


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
