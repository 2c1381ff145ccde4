"""What is the gradient of the loss with respect to each adapted frozen weight, as full fine-tuning would see it?"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.recording import AdaptedLayer, Recording, adapted_layers, buffer_bytes
from lorapro_hf.utils.ranks import errors_of_ranks

LossFunction = Callable[[nn.Module, Any], Tensor]


def weight_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction | None = None,
    *,
    max_bytes: int = 2**30,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[LoRAPair, Tensor]]:
    """Compute the mean gradient of the loss over batches, with respect to each adapted frozen weight.

    ```python
    from lorapro_hf import weight_gradients

    for pair, gradient in weight_gradients(model, batches):
        U, S, V = torch.svd_lowrank(gradient, q=16)
    ```

    The gradient is that of the model as it is: adapters active, in training or evaluation mode, with gradient
    checkpointing or without. It is computed through the layers that the pair adapts: a second layer with the same
    weight but no adapter (a tied output head) adds nothing, and layers that share the factors are added up. The model
    does not change (`.grad`, `requires_grad`, training mode, buffers), nor do the random states of Python, NumPy and
    torch. Do not write to the model between two gradients.

    Only the gradients of as many layers as fit into `max_bytes` are in memory at a time. **The batches are run once for
    each such group**, with the same dropout masks: 7 billion parameters have 28 GB of gradients in float32, hence 28
    passes over the batches with the default of 1 GiB.

    Args:
        model: a model with LoRA layers, also inside `DistributedDataParallel`. It is run without that wrapper, and
            without `torch.compile`.
        batches: all have the same weight in the mean. A list, or another object that yields the same batches whenever
            it is iterated; an iterator suffices for one pass.
        loss_fn: `loss_fn(model, batch)`, a scalar. By default `model(**batch).loss`, with the batch's tensors moved to
            the device of the model's first parameter.
        max_bytes: the memory for gradients; 0 for one layer at a time. A layer that needs more is computed alone.
        dtype: of the gradients; by default float32, or float64 for float64 factors. Linear layers, embeddings and
            convolutions are computed in it (convolutions on CUDA in TF32, unless it is switched off), other layers in
            the dtype of the weight.
        group: the ranks to average over; by default all, if `torch.distributed` is initialised. Each rank gives any
            number of batches of its own, and gets the same gradients.

    Returns:
        An iterator over `(pair, gradient)`, in the order of `find_lora_pairs`. The gradient lies on the device of the
        factors and is shaped like `B @ A`: `(m, n)`, the kernel flattened into n for convolutions, `(experts, m, n)`
        for experts and `(groups, m, n)` for convolutions with groups. It is the transpose of the weight for layers that
        keep their weight so (`nn.Embedding`, `Conv1D` of GPT-2). Reduce it before you ask for the next one.

    Raises:
        ValueError: no batch, no scalar loss, an iterator that would have to be read more than once, a layer whose
            gradient cannot be computed (`nn.MultiheadAttention`, quantised experts), or a model that `find_lora_pairs`
            refuses.
        RuntimeError: sharded parameters (FSDP, tensor parallelism, DeepSpeed), or, during the iteration, a layer that
            no backward pass has reached, a gradient that is not finite, or an error on another rank.
    """
    if type(max_bytes) is not int or max_bytes < 0:
        raise ValueError(f"max_bytes={max_bytes!r} must be a whole number of bytes, 0 for one layer at a time.")
    require_whole_parameters(model, "weight_gradients")
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    groups = _groups(adapted_layers(model), max_bytes, dtype)
    if len(groups) > 1 and iter(batches) is batches:
        raise ValueError(
            f"batches is an iterator, which can be read once, but the gradients are computed in {len(groups)} passes "
            f"(max_bytes={max_bytes:,}). Give a list or a DataLoader, or raise max_bytes."
        )
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return _gradients(model, batches, loss_fn or _loss_of_model, groups, dtype, group)


def _gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    groups: Sequence[Sequence[AdaptedLayer]],
    dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
) -> Iterator[tuple[LoRAPair, Tensor]]:
    states = None
    for layers in groups:
        recordings: list[Recording] = []
        count, failure = 0, None
        try:
            with _unchanged(model), _random_states(states) as states, ExitStack() as recorded:
                for layer in layers:
                    recording = Recording(layer.pairs[0], dtype)
                    recordings.append(recording)
                    recorded.callback(recording.stop)
                    for weight in layer.weights:
                        weight.record(recording)
                count = _run(model, batches, loss_fn)
        except Exception as error:
            if group is None:
                raise
            failure = error
        if group is not None and (errors := errors_of_ranks(failure, group, layers[0].pairs[0].A.device)):
            raise failure or RuntimeError(f"no gradient was computed: {errors}")
        _average(recordings, count, group)
        for layer in layers:
            recording = recordings.pop(0)
            for pair in layer.pairs:
                yield pair, recording.gradient
        del recording  # before the next group's memory is taken


def _run(model: nn.Module, batches: Iterable[Any], loss_fn: LossFunction) -> int:
    """Run forward and backward passes over all batches, and return their number."""
    count = 0
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            loss = loss_fn(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"the loss must be a scalar tensor, but it is {_described(loss)}.")
            if loss.requires_grad:
                loss.backward()
            count += 1
    return count


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    from accelerate.utils import send_to_device

    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is {_described(batch)}, not a dictionary of the model's arguments. Give loss_fn=lambda model, "
            "batch: ..."
        )
    loss: Tensor | None = getattr(model(**send_to_device(batch, next(model.parameters()).device)), "loss", None)
    if loss is None:
        raise ValueError("the model returns no loss. Put labels into the batches, or give loss_fn(model, batch).")
    return loss


def _described(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _average(recordings: Sequence[Recording], count: int, group: dist.ProcessGroup | None) -> None:
    """Divide the sums over all ranks by the number of their batches."""
    counts = [[float(count), float(recording.passes), float(recording.lost)] for recording in recordings]
    totals = torch.tensor(counts, device=recordings[0].gradient.device)
    if group is not None:
        dist.all_reduce(totals, group=group)
    for recording, (total, passes, lost) in zip(recordings, totals.tolist(), strict=True):
        if not total:
            raise ValueError("batches is empty: give at least one batch.")
        if not passes or lost:
            raise RuntimeError(
                f"{recording.pair.name}: its gradient cannot be computed, since "
                + ("the model overwrites its input" if lost else "no backward pass has reached it")
                + ". Are there batches that use the layer? Kernels that bypass layers (fused LoRA) have to be switched "
                "off, and reentrant gradient checkpointing needs model.enable_input_require_grads()."
            )
        if group is not None:
            dist.all_reduce(recording.gradient, group=group)
        recording.gradient /= total
        if not bool(recording.gradient.isfinite().all()):
            raise RuntimeError(
                f"{recording.pair.name}: its gradient is not finite. Compute the loss in a wider dtype, or scale it in "
                "loss_fn."
            )


def _groups(layers: Sequence[AdaptedLayer], max_bytes: int, dtype: torch.dtype | None) -> list[list[AdaptedLayer]]:
    """Neighbouring layers whose gradients fit into the memory together, at least one each."""
    groups: list[list[AdaptedLayer]] = []
    left = 0
    for layer in layers:
        needed = buffer_bytes(layer.pairs[0], dtype)
        if not groups or needed > left:
            groups.append([])
            left = max_bytes
        groups[-1].append(layer)
        left -= needed
    return groups


def require_whole_parameters(model: nn.Module, function: str) -> None:
    """Refuse a model with sharded parameters for a function of this name.

    Raises:
        RuntimeError: FSDP, tensor parallelism or DeepSpeed has sharded parameters.
    """
    kinds = [type(module).__name__ for module in model.modules()]
    sharded = [kind for kind in kinds if kind in ("FullyShardedDataParallel", "DeepSpeedEngine")]
    sharded += [name for name, x in model.named_parameters() if hasattr(x, "placements") or hasattr(x, "ds_shape")]
    if sharded:
        raise RuntimeError(
            f"{function} needs whole parameters on each rank, but {sharded[0]} is sharded (FSDP, tensor "
            "parallelism or DeepSpeed). Call it before the model is sharded: with a whole model on each rank, or with "
            "one that device_map has distributed over the devices."
        )


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, so that no gradient, hook or reduction of a training sees the passes; put back buffers."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Running statistics are updated by each pass. Quantised weights, kept in buffers of integers, are not.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point() or buffer.dim() == 0
    ]
    held = set(trained)

    def freeze(module: nn.Module, *_: Any) -> None:
        for parameter in held.intersection(module.parameters()):
            parameter.requires_grad_(False)

    freeze(model)
    # a loss with a reference model (DPO) disables the adapters, after which PEFT makes the factors trainable again
    hooks = [m.register_forward_pre_hook(freeze) for m in model.modules() if hasattr(m, "active_adapters")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, name, buffer, values in buffers:
            setattr(module, name, buffer)
            buffer.data.copy_(values)


@contextmanager
def _random_states(states: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Start from the given random states, by default the present ones, and restore the present ones at the end."""
    before = _states()
    _set_states(states or before)
    try:
        yield states or before
    finally:
        _set_states(before)


def _states() -> dict[str, Any]:
    import numpy as np

    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "cuda": devices}


def _set_states(states: Mapping[str, Any]) -> None:
    import numpy as np

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
