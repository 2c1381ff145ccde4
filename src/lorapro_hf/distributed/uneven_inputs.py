"""Is the model trained within `DistributedDataParallel.join()`, where ranks may run out of batches?

Such ranks answer the collectives of DDP alone, so that the collectives of a step would hang.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from weakref import ReferenceType, ref

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf.utils.private_names import private

Wrapper = ReferenceType[DistributedDataParallel]


def wrappers_of(parameter: Tensor) -> list[Wrapper]:
    """All instances of DDP around a parameter; they may be newer than the optimizer."""
    found = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [ref(wrapper) for wrapper in found if any(own is parameter for own in wrapper.parameters())]


def require_even_inputs(wrappers: Iterable[Wrapper]) -> None:
    """Raise if a model is trained within `join()`, before any rank waits.

    Raises:
        RuntimeError: one of the wrapped models is.
    """
    for wrapper in wrappers:
        model = wrapper()
        if model is not None and private(model, "_join_config").enable:
            raise RuntimeError(
                "the model is trained within DistributedDataParallel.join(), where ranks that have run out of batches "
                "take no more steps, while with shard_states=True each pair is stepped by one rank alone. Give all "
                "ranks as many batches, as DistributedSampler does, or set LoRAProConfig(shard_states=False)."
            )
