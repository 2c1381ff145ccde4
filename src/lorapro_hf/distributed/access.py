"""How are whole gradients and values of factors read, and how does each rank store its part of a new value?

Each layout of the factors has a class: whole on every rank (`Access`), DTensors of `fully_shard` (`ShardedAccess`),
and partitions of DeepSpeed (`ZeroAccess` in `lorapro_hf.distributed.zero`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro_hf.factors.pairs import LoRAPair
from lorapro_hf.factors.wrappers import plugin_in_use, require_no_checkpoint_wrapper


class Access:
    """Reads and writes factors as whole tensors; this class serves one process and DDP, with whole factors everywhere.

    All methods but `dtype` and `held` are collective in a subclass: every rank calls them with the same parameters.

    Args:
        group: the ranks that hold the same factors, or parts of them; `None` for this process alone.
    """

    in_place = True
    """Whether the parameters are whole, so that nothing is fetched."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """The precision in which the engine keeps a parameter."""
        return parameter.dtype

    def held(self, parameter: Tensor) -> Tensor:
        """This rank's part of a value."""
        return local(parameter.detach())

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The whole gradients, averaged over the ranks; `None` where no backward pass has reached a parameter."""
        return [parameter.grad for parameter in parameters]

    def values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The whole values."""
        return [parameter.detach() for parameter in parameters]

    @torch.no_grad()
    def store(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Overwrite parameters, or tensors laid out like them, with whole values; every rank passes the same."""
        torch._foreach_copy_(list(parameters), list(values))


class ShardedAccess(Access):
    """Factors that are DTensors, sharded along one dimension of one device mesh: FSDP2, also with replicas (HSDP).

    Raises:
        RuntimeError: they are sharded over several dimensions (tensor parallelism) or meshes, or offloaded.
    """

    in_place = False
    group: dist.ProcessGroup

    def __init__(self, parameters: Iterable[Any]) -> None:
        factors = list(parameters)
        meshes = {(factor.device_mesh, _mesh_dim(factor)) for factor in factors}
        of_shards = {(mesh, dim) for mesh, dim in meshes if dim is not None}
        if len({mesh for mesh, _ in meshes}) > 1 or len(of_shards) > 1:
            raise RuntimeError(
                "the factors are sharded over several device meshes, which LoRA-Pro does not support. Call fully_shard "
                "with one and the same mesh for all modules."
            )
        self.mesh, self.mesh_dim = next(iter(of_shards or meshes))
        super().__init__(self.mesh.get_group(self.mesh_dim or 0))
        devices = {factor.to_local().device.type for factor in factors}
        if devices != {self.mesh.device_type}:
            raise RuntimeError(
                f"the factors lie on {', '.join(sorted(devices))}, while their device mesh is of "
                f"{self.mesh.device_type}: parameters are offloaded, which LoRA-Pro does not support. Leave out "
                "CPUOffloadPolicy, or set fsdp_offload_params: false."
            )

    def gradients(self, parameters: Sequence[Any]) -> list[Tensor | None]:
        """One collective for each dtype."""
        gradients = [parameter.grad for parameter in parameters]
        # A rank without a gradient takes part, too: the others would wait for it.
        whole = self._gather(
            [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(parameters, gradients, strict=True)
            ]
        )
        return [None if own is None else gathered for own, gathered in zip(gradients, whole, strict=True)]

    def values(self, parameters: Sequence[Any]) -> list[Tensor]:
        """One collective for each dtype."""
        return self._gather([parameter.detach() for parameter in parameters])

    @torch.no_grad()
    def store(self, parameters: Sequence[Any], values: Sequence[Tensor]) -> None:
        """Copy this rank's rows, without communication."""
        for parameter, value in zip(parameters, values, strict=True):
            own, dim = parameter.to_local(), self._sharded_dim(parameter)
            if dim is None:
                own.copy_(value)
            elif own.numel():
                start = self.group.rank() * _chunk(parameter.shape[dim], self.group.size())
                own.copy_(value.narrow(dim, start, own.shape[dim]))

    @torch.no_grad()
    def _gather(self, tensors: Sequence[Any]) -> list[Tensor]:
        whole: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # in the same order on all ranks, unlike a set
            alike = [index for index, tensor in enumerate(tensors) if tensor.dtype == dtype]
            whole.update(zip(alike, self._gather_alike([tensors[index] for index in alike]), strict=True))
        return [whole[index] for index in range(len(tensors))]

    def _gather_alike(self, tensors: list[Any]) -> list[Tensor]:
        ranks = self.group.size()
        dims = [self._sharded_dim(tensor) for tensor in tensors]
        locals_ = [tensor.to_local() for tensor in tensors]
        # As torch.chunk: all ranks get the same number of rows, the last ranks fewer or none.
        sizes = [
            0 if dim is None or not size else _chunk(tensor.shape[dim], ranks) * (size // tensor.shape[dim])
            for tensor, dim, size in zip(tensors, dims, map(torch.Tensor.numel, tensors), strict=True)
        ]
        own = locals_[0].new_zeros(sum(sizes))
        for part, local, dim in zip(own.split(sizes), locals_, dims, strict=True):
            if dim is not None:
                part[: local.numel()] = local.movedim(dim, 0).reshape(-1)
        gathered = own.new_empty(ranks * len(own))
        if len(own):
            all_gather(gathered, own, self.group)
        parts = gathered.view(ranks, -1).split(sizes, dim=1)
        whole = []
        for tensor, local, dim, part in zip(tensors, locals_, dims, parts, strict=True):
            if dim is None or not tensor.numel():
                whole.append(local if dim is None else local.new_zeros(tensor.shape))
                continue
            rest = tensor.shape[:dim] + tensor.shape[dim + 1 :]
            rows = part.reshape(-1, *rest)[: tensor.shape[dim]]
            whole.append(rows.movedim(0, dim).contiguous())
        return whole

    def _sharded_dim(self, tensor: Any) -> int | None:
        """The sharded dimension of a tensor, `None` if it is replicated."""
        placement = None if self.mesh_dim is None else tensor.placements[self.mesh_dim]
        return placement.dim if placement is not None and placement.is_shard() else None


def access_to(pairs: Sequence[LoRAPair], group: dist.ProcessGroup | None = None) -> Access:
    """The access for the layout of the factors, given the ranks that would hold the same whole factors.

    Raises:
        RuntimeError: some factors are sharded and others not, or in a way that is not supported, or accelerate has
            wrapped the layers for activation checkpointing.
    """
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    sharded = [_is_sharded(factor) for factor in factors]
    if not any(sharded):
        return Access(group)
    require_no_checkpoint_wrapper(plugin_in_use("fsdp_plugin"))
    if not all(sharded):
        odd = pairs[sharded.index(False) // 2].name
        raise RuntimeError(
            f"{odd}: its factors are whole, while those of other layers are sharded. Call fully_shard on the whole "
            "model last, so that all parameters are sharded."
        )
    tied = [pair.name for pair in pairs if pair.tied_parameters]
    if tied:
        raise RuntimeError(
            f"{tied[0]} shares its factors with another layer, which LoRA-Pro supports on whole factors only. Train "
            "with DDP, or leave one of the layers out of target_modules."
        )
    return ShardedAccess(factors)


def all_gather(gathered: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
    """Fill `gathered` with `own` of all ranks, in their order."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the latter before torch 2.13
    gather(gathered, own, group=group)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """This rank's part of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _mesh_dim(tensor: Any) -> int | None:
    """The dimension of the mesh over which a DTensor is sharded."""
    dims = [index for index, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(dims) > 1 or any(type(tensor.placements[dim]).__name__ != "Shard" for dim in dims):
        raise RuntimeError(
            f"a factor is sharded as {tensor.placements}, over more than one dimension of the device mesh (tensor "
            "parallelism), which LoRA-Pro does not support. Shard the adapters with fully_shard alone."
        )
    return dims[0] if dims else None


def _chunk(length: int, ranks: int) -> int:
    return -(-length // ranks)
