"""How are trainable parameters read and written that ZeRO has partitioned?

ZeRO flattens the parameters of a group and cuts the result into one part for each rank (stages 1 and 2), or cuts each
parameter (stage 3). A rank's part of a parameter, of its float32 master, its gradient and AdamW's moments is therefore
the same contiguous, possibly empty range of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.distributed.access import Access
from lorapro_hf.utils.private_names import private

# The classes of DeepSpeed's optimizers: their modules, and the attributes that hold parameters and masters.
_RUNTIME = "deepspeed.runtime"
ZERO_OPTIMIZERS = {
    "DeepSpeedZeroOptimizer": (f"{_RUNTIME}.zero.stage_1_and_2", "bit16_groups", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": (f"{_RUNTIME}.zero.stage3", "fp16_groups", "fp32_partitioned_groups_flat"),
    "BF16_Optimizer": (f"{_RUNTIME}.bf16_optimizer", "bf16_groups", "fp32_groups_flat_partition"),
}


class ZeroAccess(Access):
    """The trainable parameters of a DeepSpeed engine, given DeepSpeed's optimizer, its stage, and names of parameters.

    Attributes:
        scale: returns the factor for the raw gradients, once DeepSpeed has computed their norm.
    """

    in_place = False
    group: dist.ProcessGroup

    def __init__(self, zero: Any, stage: int, names: Mapping[Tensor, str]) -> None:
        super().__init__(private(zero, "dp_process_group"))
        self.zero = zero
        self.partitions_parameters = stage == 3
        self.scale: Callable[[], float | Tensor] = lambda: 1.0
        _, groups, masters = ZERO_OPTIMIZERS[type(zero).__name__]
        self._groups: list[list[Any]] = private(zero, groups)
        self._masters: list[Tensor] = private(zero, masters)
        self._names = names
        self._held: dict[int, Tensor] = {}

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype of the masters, float32."""
        return torch.float32

    def shape(self, parameter: Any) -> torch.Size:
        """The shape of a whole parameter."""
        return torch.Size(private(parameter, "ds_shape") if self.partitions_parameters else parameter.shape)

    def held(self, parameter: Any) -> Tensor:
        """This rank's part of the master."""
        return self._own_master(parameter)

    @torch.no_grad()
    def hold_gradients(self, parameters: Sequence[Any]) -> None:
        """Copy this rank's parts of the raw gradients, which DeepSpeed frees or scales during its step.

        All ranks pass the same parameters: every one that a backward pass has reached on any rank.
        """
        self._held = {id(p): self._own_gradient(p).float().clone() for p in parameters}

    def release_gradients(self) -> None:
        """Free the copies of `hold_gradients`."""
        self._held = {}

    @torch.no_grad()
    def gradients(self, parameters: Sequence[Any]) -> list[Tensor | None]:
        """The whole gradients, unscaled and clipped, in one collective."""
        held = [p for p in parameters if id(p) in self._held]
        whole = dict(zip(map(id, held), self.gather(held, [self._held[id(p)] for p in held]), strict=True))
        factor = self.scale()
        return [whole[id(p)].mul_(factor) if id(p) in whole else None for p in parameters]

    @torch.no_grad()
    def values(self, parameters: Sequence[Any]) -> list[Tensor]:
        """The whole masters, in one collective."""
        return self.gather(parameters, [self._own_master(p) for p in parameters])

    @torch.no_grad()
    def store(self, parameters: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Copy this rank's parts into the masters, without communication; the parameters stay as they are."""
        for parameter, value in zip(parameters, values, strict=True):
            self._own_master(parameter).copy_(self._own_part(parameter, value))

    @torch.no_grad()
    def gather(self, parameters: Sequence[Any], parts: Sequence[Tensor]) -> list[Tensor]:
        """The whole tensors, shaped like the parameters, from the parts that each rank passes; one collective."""
        if not parameters:
            return []
        shapes = [self.shape(p) for p in parameters]
        flat = torch.zeros(sum(shape.numel() for shape in shapes), dtype=torch.float32, device=parameters[0].device)
        whole = flat.split([shape.numel() for shape in shapes])
        for parameter, part, tensor in zip(parameters, parts, whole, strict=True):
            self._own_part(parameter, tensor).copy_(part)
        dist.all_reduce(flat, group=self.group)  # each element is 0 on all ranks but one
        return [tensor.view(shape) for tensor, shape in zip(whole, shapes, strict=True)]

    def trained(self) -> Iterator[tuple[str, Any]]:
        """Names and parameters that DeepSpeed trains, in the same order on all ranks."""
        for group in self._groups:
            yield from ((self._names[parameter], parameter) for parameter in group)

    def moments(self, parameter: Any) -> dict[str, Tensor]:
        """This rank's parts of AdamW's moments and the step of a parameter of no pair; empty before its first step."""
        flat, start, length = self._place(parameter)
        state = self.zero.state.get(flat, {})
        return {
            name: state[name] if name == "step" else state[name][start : start + length]
            for name in ("step", "exp_avg", "exp_avg_sq")
            if name in state
        }

    @torch.no_grad()
    def store_moments(self, parameter: Any, moments: Mapping[str, Tensor]) -> None:
        """Store this rank's parts of whole moments, by the names that `moments` gives them."""
        flat = self._place(parameter)[0]
        if "step" not in self.zero.state[flat]:
            self.zero.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        for name, kept in self.moments(parameter).items():
            kept.copy_(moments[name] if name == "step" else self._own_part(parameter, moments[name]))

    def _own_part(self, parameter: Any, whole: Tensor) -> Tensor:
        start, length = self._own_range(parameter)
        return whole.reshape(-1)[start : start + length]

    def _own_range(self, parameter: Any) -> tuple[int, int]:
        """The start and the length of this rank's part of a parameter."""
        if self.partitions_parameters:
            size = private(parameter, "partition_numel")()  # parts of the last ranks are padded to this
            start = self.group.rank() * size
            return start, max(0, min(size, private(parameter, "ds_numel") - start))
        mapping = private(parameter, "_hp_mapping")
        if mapping is None:
            return 0, 0
        fragment = private(mapping, "lp_fragment_address")
        return fragment.start, fragment.numel

    def _place(self, parameter: Any) -> tuple[Tensor, int, int]:
        """The flat master that holds this rank's part, and the start and length within it."""
        length = self._own_range(parameter)[1]
        if self.partitions_parameters:
            number = private(self.zero, "get_param_id")(parameter)
            sub_group, start, _ = private(self.zero, "grad_position")[number]
            return self._masters[sub_group], start, length
        mapping = private(parameter, "_hp_mapping")
        if mapping is not None:
            master = self._masters[private(mapping, "param_group_index")]
            return master, private(mapping, "hp_fragment_address").start, length
        index = next(index for index, group in enumerate(self._groups) if any(p is parameter for p in group))
        return self._masters[index], 0, 0

    def _own_master(self, parameter: Any) -> Tensor:
        flat, start, length = self._place(parameter)
        return flat.detach()[start : start + length]

    def _own_gradient(self, parameter: Any) -> Tensor:
        length = self._own_range(parameter)[1]
        if self.partitions_parameters:
            from deepspeed.utils import safe_get_local_grad

            return safe_get_local_grad(parameter).reshape(-1)[:length]
        if not length:
            return torch.zeros(0, device=parameter.device)
        read = private(private(parameter, "_hp_mapping"), "get_lp_grad_fragment")
        part = read(private(parameter, "_index_in_param_group")).reshape(-1)
        # BF16_Optimizer keeps the whole gradient on every rank.
        return self._own_part(parameter, part) if len(part) == parameter.numel() else part
