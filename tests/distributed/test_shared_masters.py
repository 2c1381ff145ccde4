"""Master copies of bfloat16 factors lie with the owners of the pairs and travel in checkpoints."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from processes import run
from training import build, make_optimizer, result, slow, train

pytestmark = pytest.mark.distributed

MODES = ("full", "spectral", "efficient")
NARROW = torch.bfloat16


def config(mode):
    return {"mode": mode, "master_factors": True, "shard_states": True}


def trained(rank, ranks, kind):
    """What each mode has saved and reached after four steps, in which all ranks see the whole batches."""
    found = {}
    for mode in MODES:
        model = build(NARROW)
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            for layer in (model.base_model.model[0], model.base_model.model[3]):
                fully_shard(layer)
            fully_shard(model)
        optimizer = make_optimizer(model, config(mode))
        train(model, optimizer, steps=range(4), dtype=NARROW)
        own = [name for name in optimizer.pair_state() if name.endswith("master")]
        saved = optimizer.state_dict()
        saved["state"] = {
            key: {name: _whole(value) for name, value in state.items()} for key, state in saved["state"].items()
        }
        found[mode] = {"own": own, "saved": saved, "factors": result(model)}
    return found


def _whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


@pytest.mark.parametrize("kind", ["ddp", *slow(["fsdp2"])])
def test_masters_are_shared_out_and_go_on_in_one_process(kind, tmp_path):
    found = run(trained, 2, tmp_path, kind)
    for mode in MODES:
        owned = [set(rank[mode]["own"]) for rank in found]
        assert len(owned[0]) == len(owned[1]) == 2 and not owned[0] & owned[1]  # A and B of one pair each
        straight = build(NARROW)
        optimizer = make_optimizer(straight, config(mode))
        train(straight, optimizer, steps=range(4), dtype=NARROW)
        for rank in found:
            assert rank[mode]["factors"].keys() == result(straight).keys()
        resumed = build(NARROW)
        with torch.no_grad():
            for name, parameter in resumed.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(found[0][mode]["factors"][name])
        again = make_optimizer(resumed, config(mode))
        again.load_state_dict(found[0][mode]["saved"])
        for own, model in ((optimizer, straight), (again, resumed)):
            train(model, own, steps=range(4, 8), dtype=NARROW)
        for one, other in zip(optimizer.pairs, again.pairs, strict=True):
            for factor, loaded in ((one.A, other.A), (one.B, other.B)):
                expected, master = optimizer.state[factor]["master"], again.state[loaded]["master"]
                # Started from the parameters, which have 8 bits, they would be 1e-3 away.
                assert (master - expected).norm() <= 2e-4 * expected.norm(), mode
    assert not dist.is_initialized()
