"""How does a DeepSpeed checkpoint hold the moments of the pairs, for any number of processes?

Each rank writes one more file into the folder of the checkpoint's tag, with the moments of the pairs that it owns.
DeepSpeed loads its own state only on as many processes as have saved it. For other numbers the files also hold, divided
among the ranks, the float32 masters of all trainable parameters and AdamW's moments of those that belong to no pair.
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
from typing import Any, NamedTuple

from torch import Tensor

from lorapro_hf.distributed.zero import ZeroAccess
from lorapro_hf.optim.checkpoint import check_open_settings
from lorapro_hf.optim.lora_pro import LoRAProAdamW

_NAME = "lora_pro_rank{}.safetensors"
_METADATA = "lora_pro"
_WEIGHTS_ALONE = "To start LoRA-Pro from its weights alone, call load_checkpoint(..., load_optimizer_states=False)."


def save_with_moments(engine: Any, optimizer: LoRAProAdamW, access: ZeroAccess) -> Callable[..., Any]:
    """Wrap `engine.save_checkpoint`: write the moments first, so that `latest` always names a complete checkpoint."""
    original = engine.save_checkpoint

    @wraps(original)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, args, kwargs)
        if given["save_dir"]:
            optimizer.require_finite_save()
            tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
            frozen = not given.get("exclude_frozen_parameters", False)
            _write(Path(given["save_dir"], tag), optimizer, access, global_steps=engine.global_steps, frozen=frozen)
        return original(*args, **kwargs)

    return save_checkpoint


def load_with_moments(engine: Any, optimizer: LoRAProAdamW, access: ZeroAccess) -> Callable[..., Any]:
    """Wrap `engine.load_checkpoint`: check the files of the moments, let DeepSpeed load its own, then load ours."""
    original = engine.load_checkpoint

    def load(**given: Any) -> Any:
        loaded = original(**given)
        engine.optimizer.clip_grad = engine.gradient_clipping()  # DeepSpeed takes the checkpoint's
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
            optimizer.load_pair_state(saved.read)
        return loaded

    return load_checkpoint


class _Saved(NamedTuple):
    """The folder of a checkpoint, facts about it, and the open files of all ranks by the tensors they hold."""

    folder: Path
    about: dict[str, Any]
    files: dict[str, Any]

    def read(self, name: str) -> Tensor | None:
        return self.files[name].get_tensor(name) if name in self.files else None


def _write(folder: Path, optimizer: LoRAProAdamW, access: ZeroAccess, **about: Any) -> None:
    from safetensors.torch import save_file

    rank, ranks = access.group.rank(), access.group.size()
    tensors = {} if optimizer.config.shard_states is False and rank else optimizer.pair_state()
    tensors = {**tensors, **_parameter_states(access)}
    about |= {**_identity(optimizer), "rank": rank, "ranks": ranks, "groups": _group_settings(optimizer)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME.format(rank)
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # save_file would follow a link
    # Scalars are views of one tensor, which the format does not allow.
    on_cpu = {name: t.detach().cpu().clone() if t.dim() == 0 else t.detach().cpu() for name, t in tensors.items()}
    save_file(on_cpu, partial, metadata={_METADATA: json.dumps(about)})
    os.replace(partial, path)
    if rank == 0:  # more ranks may have saved under the same tag before
        for old, old_rank in moments_files(folder).items():
            if old_rank >= ranks:
                old.unlink()


def moments_files(folder: Path) -> dict[Path, int]:
    """The files of the moments in a folder, with the ranks that wrote them."""
    pattern = re.compile(_NAME.format("([0-9]+)"))
    named = {path: pattern.fullmatch(path.name) for path in sorted(folder.glob(_NAME.format("*")))}
    return {path: int(match[1]) for path, match in named.items() if match}


@contextmanager
def _opened(folder: Path, optimizer: LoRAProAdamW) -> Iterator[_Saved]:
    """Open all files of a folder, after checking that they belong together and to this optimizer."""
    from safetensors import SafetensorError, safe_open

    paths = list(moments_files(folder))
    if not paths:
        raise FileNotFoundError(
            f"{folder} has no {_NAME.format('<n>')}: the checkpoint was written without LoRA-Pro, or before "
            f"attach_deepspeed was called. {_WEIGHTS_ALONE}"
        )
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        abouts = []
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                abouts.append(json.loads((file.metadata() or {})[_METADATA]))
            except (SafetensorError, KeyError) as error:
                reason = f"{path} is truncated or not from LoRA-Pro ({error}). Load an earlier checkpoint."
                raise ValueError(reason) from error
            files.update(dict.fromkeys(file.keys(), file))
        _check(folder, abouts, _identity(optimizer))
        check_open_settings(abouts[0]["groups"], optimizer.rule)
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
        raise FileNotFoundError(f"{folder} lacks {names}. Copy the missing files there, or load another checkpoint.")
    for key, expected in identity.items():
        if first[key] != expected:
            raise ValueError(
                f"the checkpoint {folder} is of another LoRA-Pro training: its {key} "
                f"{_difference(first[key], expected)}. Resume with the model and settings it was written with. "
                f"{_WEIGHTS_ALONE}"
            )


def _identity(optimizer: LoRAProAdamW) -> dict[str, Any]:
    """The settings and shapes in which a checkpoint and an optimizer must agree, as JSON returns them."""
    pairs = {f"{p.name}.{p.adapter_name}": [list(p.shape_A), list(p.shape_B)] for p in optimizer.pairs}
    return {"mode": optimizer.config.mode, "moments_dtype": optimizer.config.moments_dtype, "pairs": pairs}


def _difference(saved: Any, expected: Any) -> str:
    if not isinstance(expected, dict):
        return f"is {saved!r}, here it is {expected!r}"
    name = next(name for name in {**expected, **saved} if saved.get(name) != expected.get(name))
    return f"have {name} with shapes {saved.get(name)}, here they are {expected.get(name)}"


def _require_readable(saved: _Saved, access: ZeroAccess, tag: str, folder: Any) -> None:
    """Raise where DeepSpeed cannot load weights that another number of processes has saved."""
    if not access.partitions_parameters:
        return
    ranks, size = saved.about["ranks"], access.group.size()
    if saved.about["frozen"]:
        remedy = (
            "save with save_checkpoint(..., exclude_frozen_parameters=True), as Trainer does, and load with "
            "load_module_strict=False"
        )
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
    """The masters of every n-th parameter for n ranks, and AdamW's state of these parameters if they are in no pair."""
    rank, ranks = access.group.rank(), access.group.size()
    tensors: dict[str, Tensor] = {}
    for index, (name, parameter) in enumerate(access.trained()):
        whole = {"master": access.values([parameter])[0]}
        for moment, part in access.moments(parameter).items():
            whole[moment] = part if moment == "step" else access.gather([parameter], [part])[0]
        if index % ranks == rank:
            tensors.update({f"{name}:{key}": tensor for key, tensor in whole.items()})
    return tensors


def _restore_parameters(saved: _Saved, optimizer: LoRAProAdamW, access: ZeroAccess) -> None:
    """Load masters, AdamW's state and the settings of the groups; DeepSpeed has loaded the parameters themselves."""
    for group, settings in zip(optimizer.param_groups, saved.about["groups"], strict=True):
        group.update(settings, betas=tuple(settings["betas"]))
    for name, parameter in access.trained():
        read = {key: saved.read(f"{name}:{key}") for key in ("master", "step", "exp_avg", "exp_avg_sq")}
        whole = {key: tensor.to(parameter.device) for key, tensor in read.items() if tensor is not None}
        if "master" not in whole or whole["master"].shape != access.shape(parameter):
            shape = list(access.shape(parameter))
            raise ValueError(f"{saved.folder} has no {name} of shape {shape}. Load it into the model that wrote it.")
        access.store([parameter], [whole.pop("master")])
        if whole:
            access.store_moments(parameter, whole)


def _group_settings(optimizer: LoRAProAdamW) -> list[dict[str, Any]]:
    """The settings of the groups in JSON's types, with present learning rates and the number of skipped steps."""
    settings: list[dict[str, Any]] = [
        {"betas": list(group["betas"])}
        | {key: float(value) for key, value in group.items() if isinstance(value, Tensor) and value.dim() == 0}
        | {key: value for key, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in optimizer.param_groups
    ]
    settings[0]["skipped_steps"] = optimizer.skipped_steps
    return settings


def _latest(folder: Any) -> str | None:
    path = Path(folder, "latest")
    return path.read_text().strip() if path.is_file() else None


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
