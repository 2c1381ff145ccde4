"""Which layers does the file of an adapter describe by itself?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from lorapro_hf.checkpoints.adapters import ADAPTER_FILES, PREFIX
from lorapro_hf.options import UsageError

WEIGHTS = ADAPTER_FILES[0]
Shapes = Mapping[str, tuple[int, ...]]


def tensor_shapes(file: Path) -> Shapes:
    """Names and shapes of the tensors in a safetensors file; only its header is read.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"cannot read {file}: {error}. It is cut off or damaged; copy or save it again.") from error


def differences(model: PeftModel, adapter: str, found: Shapes) -> list[str]:
    """Differences between the tensors of an adapter's file and those of a model with the adapter."""
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    own = {name: tuple(tensor.shape) for name, tensor in state.items()}
    missing = sorted(own.keys() - found.keys())
    # PEFT also saves embeddings whole if they may have grown
    other = sorted(name for name in found.keys() - own.keys() if ".lora_" in name)
    shapes = sorted(name for name in own.keys() & found.keys() if own[name] != found[name])
    notes = []
    for names, what in (
        (missing, "of the model are missing in the adapter's file"),
        (other, "in the adapter's file belong to nothing in the model"),
        (shapes, "have another shape in the adapter's file than in the model"),
    ):
        if names:
            notes.append(f"{len(names)} tensors {what}, {names[0]} to begin with: it is of another base model.")
    return notes


class Experts(nn.Module):
    """Packed matrices of one size, without values."""

    is_transposed = True  # for PEFT: inputs come before outputs

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs, device="meta"))


def skeleton(shapes: Shapes, config: LoraConfig) -> tuple[nn.Module, LoraConfig]:
    """Bare layers on the meta device for an adapter's tensors of these shapes, and the adapter's settings for them."""
    root = nn.Module()
    targets: list[str] = []
    parameters: list[str] = []
    for key, shape in shapes.items():
        layer, found, rest = key.removeprefix(PREFIX).partition(".lora_A.weight")
        if found and not rest:
            other = shapes[key.replace("lora_A", "lora_B")]
            # PEFT nests the layers of several parameters of one module; here they stand side by side
            name = layer.replace(".base_layer", "_inner")
            module = _bare(shape, other, _experts(layer, shape, config))
            (parameters if isinstance(module, Experts) else targets).append(name)
        else:
            layer, found, _ = key.removeprefix(PREFIX).partition(".lora_embedding_A")
            if not found:
                continue
            other = shapes[key.replace("lora_embedding_A", "lora_embedding_B")]
            name, module = layer, nn.Embedding(shape[1], other[0], device="meta")
            targets.append(name)
        _place(root, name, module)
    config = copy.deepcopy(config)
    config.target_modules, config.modules_to_save, config.layers_to_transform = targets, None, None
    if parameters:
        config.target_parameters = [f"{name}.weight" for name in parameters]
    return root, config


def _experts(layer: str, shape: tuple[int, ...], config: LoraConfig) -> int:
    """The number of experts that are packed into the rows of a factor; 0 for an ordinary layer."""
    ends = [name.rpartition(".")[0] for name in getattr(config, "target_parameters", None) or []]
    is_packed = any(layer.replace(".base_layer", "").endswith(end) for end in ends)
    return max(1, shape[0] // config.r) if is_packed else 0


def _bare(A: tuple[int, ...], B: tuple[int, ...], experts: int) -> nn.Module:
    if experts:
        return Experts(experts, A[1], B[0])
    if len(A) > 2:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(A) - 3]
        return kind(A[1], B[0], A[2:], device="meta")  # type: ignore[arg-type]
    return nn.Linear(A[1], B[0], device="meta")


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(last, module)
