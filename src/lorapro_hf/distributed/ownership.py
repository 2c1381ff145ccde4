"""Which rank steps which pair, and how do all ranks get the result?

Every pair has one owner, the only rank that keeps its moments and computes its step: work and state are divided by the
number of ranks. Before a step the owners fetch whole factors and gradients. After it one collective for each shape
brings the new factors to all ranks.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from weakref import ReferenceType, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf.distributed.access import Access, all_gather
from lorapro_hf.distributed.attendance import Attendance
from lorapro_hf.factors.pairs import LoRAPair, unwrapped_name
from lorapro_hf.utils.private_names import private
from lorapro_hf.utils.ranks import errors_of_ranks

# Factors are fetched in portions, so that no rank holds all factors of the model at once.
_FETCHED_ELEMENTS = 2**25
# A rank whose step fails adds this to the sum of the flags to skip the step, which are 0 or 1.
_FAILED = 2.0**32
# The stages of a step.
_NOT_BEGUN, _FETCHED, _AGREED = range(3)


class PairOwnership:
    """The pairs of a model and the ranks that step them.

    Args:
        pairs: in the same order on all ranks.
        access: reads and writes their factors.
        shared: whether each pair has one owner; otherwise every rank steps all pairs.

    Attributes:
        owned: the pairs that this rank steps.
        factors: A and B of these pairs, whole: the parameters themselves, or buffers that `fetch` fills.
    """

    def __init__(self, pairs: Sequence[LoRAPair], access: Access, shared: bool) -> None:
        self.access = access
        self.pairs = list(pairs)
        self.group = access.group if shared and access.group is not None and access.group.size() > 1 else None
        self._have_met = False
        self._progress = _NOT_BEGUN
        self._device = self.pairs[0].A.device if self.pairs else torch.device("cpu")
        self._wrappers: list[ReferenceType[DistributedDataParallel]] = []
        self.rank = self.group.rank() if self.group else 0
        self.size = self.group.size() if self.group else 1
        self.alike = group_alike(self.pairs)
        self.owners = assign_owners([len(indices) for indices in self.alike], self.size)
        self._owner_of = dict.fromkeys(range(len(self.pairs)), 0)
        for indices, owners in zip(self.alike, self.owners, strict=True):
            self._owner_of.update(zip(indices, owners, strict=True))
        self._owned_ids = [index for index in range(len(self.pairs)) if self._owner_of[index] == self.rank]
        self.owned = [self.pairs[index] for index in self._owned_ids]
        self.factors: list[tuple[Tensor, Tensor]] = [(pair.A, pair.B) for pair in self.owned]
        if not access.in_place:
            self.factors = [
                (_buffer(pair.A, pair.shape_A, access), _buffer(pair.B, pair.shape_B, access)) for pair in self.owned
            ]

    @cached_property
    def attendance(self) -> Attendance:
        """The attendance of the ranks that hold the same factors, or parts of them."""
        assert self.access.group is not None
        return Attendance(self.access.group)

    def owner_of(self, index: int) -> int:
        """The rank in the group that steps the pair at an index."""
        return self._owner_of[index]

    @torch.no_grad()
    def fetch(self) -> list[bool]:
        """Fetch values and gradients of this rank's pairs; return which of all pairs have a gradient.

        Raises:
            RuntimeError: the ranks do not train the same pairs, or train within DDP's `join()`.
        """
        self._progress = _AGREED  # an error in the middle of a collective leaves the ranks apart
        self._meet()
        have_gradients = self._fetch_all()
        self._progress = _FETCHED
        return have_gradients

    def _fetch_all(self) -> list[bool]:
        if self.access.in_place:
            return [pair.has_gradient for pair in self.pairs]
        have_gradients = [False] * len(self.pairs)
        own = dict(zip(self._owned_ids, self.factors, strict=True))
        for indices in self._portions():
            parameters = [factor for index in indices for factor in (self.pairs[index].A, self.pairs[index].B)]
            gradients = self.access.gradients(parameters)
            values = self.access.values(parameters)
            for position, index in enumerate(indices):
                of_pair = slice(2 * position, 2 * position + 2)
                have_gradients[index] = any(gradient is not None for gradient in gradients[of_pair])
                for buffer, value, gradient in zip(
                    own.get(index, ()), values[of_pair], gradients[of_pair], strict=False
                ):
                    buffer.copy_(value)
                    buffer.grad = None if gradient is None else gradient.to(buffer)
        return have_gradients

    def _portions(self) -> list[list[int]]:
        portions: list[list[int]] = [[]]
        elements = 0
        for index, pair in enumerate(self.pairs):
            size = pair.shape_A.numel() + pair.shape_B.numel()
            if portions[-1] and elements + size > _FETCHED_ELEMENTS:
                portions.append([])
                elements = 0
            portions[-1].append(index)
            elements += size
        return portions

    def _meet(self) -> None:
        """Check once that all ranks train the same pairs; otherwise collectives would mix up factors, or hang."""
        _require_even_inputs(self._wrappers)
        if self.group is None or self._have_met:
            return
        if self.access.in_place:
            self._wrappers = _wrappers_of(self.pairs[0].A)
            _require_even_inputs(self._wrappers)
        described = [(unwrapped_name(pair.name), *pair.shape_A, *pair.shape_B) for pair in self.pairs]
        code = float(zlib.crc32(repr(described).encode()))
        extremes = torch.tensor([code, -code], dtype=torch.float64, device=self._device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        if extremes.tolist() != [code, -code]:
            raise RuntimeError(
                "the ranks train different pairs and cannot share them out among themselves. Give all ranks the same "
                "adapter, or set LoRAProConfig(shard_states=False) where each trains a model of its own."
            )
        self._have_met = True

    @torch.no_grad()
    def publish(self) -> None:
        """Store the new factors of all pairs on all ranks, at the end of a step."""
        self._progress = _NOT_BEGUN
        if self.group is not None:
            new = dict(zip(self._owned_ids, self.factors, strict=True))
            for indices, owners in zip(self.alike, self.owners, strict=True):
                self._publish_alike(self.group, indices, owners, new)
        elif not self.access.in_place:
            parameters = [factor for pair in self.owned for factor in (pair.A, pair.B)]
            self.access.store(parameters, [value for factors in self.factors for value in factors])

    def _publish_alike(
        self, group: dist.ProcessGroup, indices: list[int], owners: list[int], new: Mapping[int, tuple[Tensor, Tensor]]
    ) -> None:
        first = self.pairs[indices[0]]
        sizes = first.shape_A.numel(), first.shape_B.numel()
        of_rank = [[i for i, owner in zip(indices, owners, strict=True) if owner == rank] for rank in range(self.size)]
        dtype = torch.promote_types(self.access.dtype(first.A), self.access.dtype(first.B))
        rows = max(map(len, of_rank))
        own = torch.zeros(rows, sum(sizes), dtype=dtype, device=first.A.device)
        for row, index in zip(own, of_rank[self.rank], strict=False):
            torch.cat([factor.reshape(-1) for factor in new[index]], out=row)
        gathered = own.new_empty(self.size * rows, sum(sizes))
        all_gather(gathered, own, group)
        parameters: list[Tensor] = []
        values: list[Tensor] = []
        for rank, received in enumerate(gathered.view(self.size, rows, -1)):
            if rank == self.rank and self.access.in_place:
                continue
            for row, index in zip(received, of_rank[rank], strict=False):
                pair = self.pairs[index]
                A, B = row.split(sizes)
                parameters += [pair.A, pair.B]
                values += [A.view(pair.shape_A), B.view(pair.shape_B)]
        if parameters:
            self.access.store(parameters, values)

    def total(self, values: Tensor) -> Tensor:
        """Sum values over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def agree(self, norms: Tensor, found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """The norms `(2,)` over the pairs of all ranks together, and 1 if any rank must skip the step, else 0.

        Ranks that step all pairs can differ in `found_inf`, too, since other parameters may be sharded.

        Raises:
            RuntimeError: another rank has met an error, see `fail`.
        """
        group = self._agreeing
        if group is None:
            return norms, found_inf
        squares = norms.double().square() if self.group else torch.zeros_like(norms, dtype=torch.float64)
        both = torch.cat([squares, found_inf.double()[None]])
        dist.all_reduce(both, group=group)
        self._progress = _AGREED
        if self._can_read_flags and both[-1] >= _FAILED:
            errors = errors_of_ranks(None, group)
            raise RuntimeError(f"all ranks leave out this step, and nothing has been changed: {errors}")
        return both[:-1].sqrt().to(norms.dtype) if self.group else norms, (both[-1] > 0).to(found_inf.dtype)

    def fail(self, error: Exception) -> None:
        """Take part in the collectives of a step that has failed on this rank, so that all ranks skip it.

        On CPUs the other ranks raise an error that names this rank. Elsewhere reading the flag would wait for the
        device in each step; they skip the step as if a gradient were not finite. Nothing happens where the ranks have
        agreed on the step already, or share no step.
        """
        progress, self._progress = self._progress, _NOT_BEGUN
        group = self._agreeing
        if group is None or progress == _AGREED:
            return
        if progress == _NOT_BEGUN:
            self._meet()
            if not self.access.in_place:
                self._fetch_all()
        flags = torch.tensor([0.0, 0.0, _FAILED], dtype=torch.float64, device=self._device)
        dist.all_reduce(flags, group=group)
        if self._can_read_flags:
            errors_of_ranks(error, group)
        else:
            self.publish()

    @property
    def _agreeing(self) -> dist.ProcessGroup | None:
        """The ranks that take each step together or not at all."""
        group = self.group if self.access.in_place else self.access.group
        return None if group is None or group.size() == 1 else group

    @property
    def _can_read_flags(self) -> bool:
        """Whether reading a tensor does not wait for its device."""
        return self._device.type == "cpu"


def share_pairs(
    pairs: Sequence[LoRAPair], access: Access, shard_states: bool | None, saved_collectively: bool
) -> PairOwnership:
    """The ownership of pairs, shared by the ranks if `shard_states` says so.

    If it is `None`, ranks share pairs where all of them take part in saving the state: if factors are not whole on
    each rank, or if `saved_collectively`.
    """
    shared = not access.in_place or saved_collectively if shard_states is None else shard_states
    return PairOwnership(pairs, access, shared)


def everyone() -> dist.ProcessGroup | None:
    """The group of all processes of a distributed run, `None` in a single process."""
    running = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if running else None


def assign_owners(counts: Sequence[int], ranks: int) -> list[list[int]]:
    """The owners of the pairs of each group: equal numbers for all ranks, the rest to the least busy.

    `counts` has the number of pairs of each group, the costliest group first.
    """
    spare = [0] * ranks
    owners = []
    for count in counts:
        own = [index % ranks for index in range(count - count % ranks)]
        for rank in sorted(range(ranks), key=lambda rank: (spare[rank], rank))[: count % ranks]:
            own.append(rank)
            spare[rank] += 1
        owners.append(own)
    return owners


def group_alike(pairs: Sequence[LoRAPair]) -> list[list[int]]:
    """The indices of pairs of the same shape, dtype and device, the largest weights first."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        A, B = pair.A, pair.B
        alike.setdefault((pair.shape_A, pair.shape_B, A.dtype, B.dtype, A.device), []).append(index)
    return sorted(alike.values(), key=lambda indices: -_cost(pairs[indices[0]]))


def _cost(pair: LoRAPair) -> int:
    return pair.shape_A.numel() * pair.shape_B.numel()


def _buffer(parameter: Tensor, shape: torch.Size, access: Access) -> Tensor:
    return torch.empty(shape, dtype=access.dtype(parameter), device=parameter.device)


def _wrappers_of(parameter: Tensor) -> list[ReferenceType[DistributedDataParallel]]:
    """All instances of DDP around a parameter; they may be newer than the optimizer."""
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [ref(wrapper) for wrapper in wrappers if any(own is parameter for own in wrapper.parameters())]


def _require_even_inputs(wrappers: Iterable[ReferenceType[DistributedDataParallel]]) -> None:
    """Raise if a model is trained within DDP's `join()`.

    Ranks that have run out of batches answer the collectives of DDP alone, so that the collectives of a step would
    hang.
    """
    for wrapper in wrappers:
        model = wrapper()
        if model is not None and private(model, "_join_config").enable:
            raise RuntimeError(
                "the model is trained within DistributedDataParallel.join(), where ranks that have run out of batches "
                "take no more steps, while with shard_states=True each pair is stepped by one rank alone. Give all "
                "ranks as many batches, as DistributedSampler does, or set LoRAProConfig(shard_states=False)."
            )
