"""Ranks that share the state take a step together or not at all, whatever one of them meets."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from processes import run
from training import assert_close, batches, build, loss_of, make_optimizer, result, share, train

pytestmark = pytest.mark.distributed

STEPS = 4


def no_gradient_of_one_factor(optimizer, rank):
    """Only the pair's owner looks."""
    optimizer.pairs[0].A.grad = None


def sparse_gradient(optimizer, rank):
    if rank == 1:
        ordinary = optimizer.param_groups[-1]["params"][-1]
        ordinary.grad = ordinary.grad.to_sparse()


def no_scaling(optimizer, rank):
    pair = optimizer.pairs[0]
    pair.layer.scaling[pair.adapter_name] = 0.0


def other_groups(optimizer, rank):
    if rank == 1:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not optimizer.pairs[0].B]


def no_gradients(optimizer, rank):
    if rank == 1:
        optimizer.zero_grad()


ERRORS = [no_gradient_of_one_factor, sparse_gradient, no_scaling, other_groups, no_gradients]


def interrupted(rank, ranks, kind):
    """A training in which every second step meets an error that is caught."""
    model = build()
    model = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model)
    optimizer = make_optimizer(model, {"mode": "full", "shard_states": True})
    errors = ERRORS if kind == "ddp" else [no_scaling, other_groups]
    said = []
    for index, error in enumerate(errors):
        data = share(batches()[index], rank, ranks)
        before = result(model)
        groups = [list(group["params"]) for group in optimizer.param_groups]
        scaling = copy.copy(optimizer.pairs[0].layer.scaling)
        loss_of(model, data).backward()
        error(optimizer, rank)
        try:
            optimizer.step()
            said.append("nothing")
        except (RuntimeError, ValueError) as found:
            said.append(str(found))
        assert all(torch.equal(value, before[name]) for name, value in result(model).items())
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = params
        optimizer.pairs[0].layer.scaling.update(scaling)
        optimizer.zero_grad()
        train(model, optimizer, rank, ranks, steps=range(index, index + 1))
    return {"said": said, "end": result(model), "skipped": optimizer.skipped_steps}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_error_on_one_rank_is_raised_on_all(kind, tmp_path):
    found = run(interrupted, 2, tmp_path, kind)
    names = [error.__name__ for error in (ERRORS if kind == "ddp" else [no_scaling, other_groups])]
    expected = {
        "no_gradient_of_one_factor": "RuntimeError",
        "sparse_gradient": "RuntimeError: a parameter has a sparse gradient",
        "no_scaling": "ValueError",
        "other_groups": "ValueError",
        "no_gradients": "RuntimeError: none of the 2 LoRA pairs has a gradient",
    }
    for name, *said in zip(names, *(each["said"] for each in found), strict=True):
        of_others = [text for text in said if text.startswith("all ranks leave out this step")]
        assert len(of_others) == 1, (name, said)
        (own,) = (text for text in said if text not in of_others)
        rank = said.index(own)
        assert f"rank {rank} raised {expected[name]}" in of_others[0] and own in of_others[0]
    model = build()
    train(model, make_optimizer(model, {"mode": "full"}), steps=range(len(names)))
    for each in found:
        assert_close(each["end"], result(model), 1e-10)
        assert each["skipped"] == 0


def on_a_device(rank, ranks):
    """As where flags lie on a device that nobody waits for: the others leave out the step without a word."""
    model = DistributedDataParallel(build())
    optimizer = make_optimizer(model, {"mode": "full", "shard_states": True})
    train(model, optimizer, rank, ranks, steps=range(1))
    ownership = optimizer._current_ownership()
    type(ownership)._can_read_flags, kept = False, type(ownership)._can_read_flags
    try:
        before = result(model)
        loss_of(model, share(batches()[1], rank, ranks)).backward()
        no_gradients(optimizer, rank)
        try:
            optimizer.step()
            said = ""
        except RuntimeError as error:
            said = str(error)
        after = result(model)
    finally:
        type(ownership)._can_read_flags = kept
    train(model, optimizer, rank, ranks, steps=range(1, 2))
    return {"said": said, "before": before, "after": after, "end": result(model), "skipped": optimizer.skipped_steps}


def test_where_that_would_take_a_wait_the_others_skip_the_step(tmp_path):
    first, second = run(on_a_device, 2, tmp_path)
    assert first["said"] == "" and first["skipped"] == 1
    assert second["said"].startswith("none of the 2 LoRA pairs has a gradient")
    model = build()
    train(model, make_optimizer(model, {"mode": "full"}), steps=range(2))
    for each in (first, second):
        assert_close(each["after"], each["before"], 0)
        assert_close(each["end"], result(model), 1e-10)


def uneven(rank, ranks, shard_states):
    """Rank 0 has two batches, rank 1 three."""
    model = DistributedDataParallel(build())
    optimizer = make_optimizer(model, {"mode": "efficient", "shard_states": shard_states})
    said = ""
    try:
        with model.join():
            for step in range(2 + rank):
                train(model, optimizer, rank, ranks, steps=range(step, step + 1))
    except RuntimeError as error:
        said = str(error)
    dist.barrier()
    return {"said": said, "end": result(model)}


def test_uneven_inputs_are_refused_before_they_hang(tmp_path):
    for found in run(uneven, 2, tmp_path, True):
        assert "trained within DistributedDataParallel.join()" in found["said"]
    found = run(uneven, 2, tmp_path, False)
    assert not any(each["said"] for each in found)
    assert_close(found[0]["end"], found[1]["end"], 0)
