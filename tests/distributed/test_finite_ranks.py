"""What one rank finds to be NaN or Inf ends the training on all of them, by name, and none waits for another."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import zero_helpers
from processes import run
from training import build, make_optimizer, train

pytestmark = pytest.mark.distributed

NAMED = "NaN or Inf in {} of base_model.model.3 (adapter 'default'). No step can mend that"


def said(action, *arguments):
    try:
        action(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def ours(optimizer, rank):
    """The last pair if this rank steps it."""
    pair = optimizer.pairs[1]
    return pair if any(pair is own for own in optimizer._current_ownership().owned) else None


def ddp(rank, ranks):
    """A moment that only its owner holds, then a factor that one rank has and the next step brings to the other."""
    found = {}
    for shared in (True, False):
        model = DistributedDataParallel(build())
        optimizer = make_optimizer(model, {"mode": "full", "shard_states": shared})
        train(model, optimizer, rank, ranks, steps=range(2))
        pair = ours(optimizer, rank)
        kept = None if pair is None else optimizer.state[pair.A]["exp_avg"].clone()
        if kept is not None:
            optimizer.state[pair.A]["exp_avg"][0, 0] = float("nan")
        found[f"state_dict {shared}"] = said(optimizer.state_dict)
        found[f"consolidate {shared}"] = said(optimizer.consolidate_state_dict)
        if kept is not None:
            optimizer.state[pair.A]["exp_avg"].copy_(kept)
        with torch.no_grad():
            optimizer.pairs[1].B[0, 0] = float("inf")
        found[f"step {shared}"] = said(train, model, optimizer, rank, ranks, range(2, 3))
    return found


def test_under_ddp(tmp_path):
    moment = NAMED.format("the state 'exp_avg' of lora_A")
    for found in run(ddp, 2, tmp_path):
        for shared in (True, False):
            assert found[f"state_dict {shared}"].startswith(moment)
            assert found[f"consolidate {shared}"].startswith(moment) == shared
            assert found[f"step {shared}"].startswith(NAMED.format("lora_B"))


def fsdp(rank, ranks):
    """One element of one rank's shard."""
    model = build()
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (model.base_model.model[0], model.base_model.model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model, {"mode": "factored"})
    train(model, optimizer, rank, ranks, steps=range(2))
    if rank == 1:
        with torch.no_grad():
            optimizer.pairs[1].B.to_local()[-1, 0] = float("nan")
    return {
        "save": said(optimizer.state_dict),
        "step": said(train, model, optimizer, rank, ranks, range(2, 3)),
        "end": said(optimizer.finish_training),
    }


def test_under_fsdp2(tmp_path):
    for found in run(fsdp, 2, tmp_path):
        assert len(found) == 3 and all(text.startswith(NAMED.format("lora_B")) for text in found.values())


def zero(rank, ranks, folder):
    """DeepSpeed leaves out each step itself, so that none gets to our optimizer."""
    found = {}
    for stage in (1, 2, 3):
        engine = zero_helpers.launch({"mode": "full"}, stage=stage)
        optimizer = engine.optimizer.optimizer
        zero_helpers.train(engine, rank, ranks, range(2))
        whole = optimizer.access.values([optimizer.pairs[1].B])[0]
        whole[-1, -1] = float("nan")
        optimizer.access.store([optimizer.pairs[1].B], [whole])
        found[f"save {stage}"] = said(engine.save_checkpoint, f"{folder}/{stage}")
        found[f"log {stage}"] = said(optimizer.checked_skipped_steps)
        optimizer.load_pair_state(optimizer.pair_state().get)
        found[f"start {stage}"] = said(zero_helpers.train, engine, rank, ranks, range(2, 3))
        engine.destroy()
    return found


@pytest.mark.slow
def test_under_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    for found in zero_helpers.run(zero, 2, tmp_path, str(tmp_path)):
        for stage in (1, 2, 3):
            assert found[f"save {stage}"].startswith(NAMED.format("lora_B"))
            assert found[f"start {stage}"].startswith(NAMED.format("lora_B"))
    assert not list(tmp_path.glob("[123]/*"))
