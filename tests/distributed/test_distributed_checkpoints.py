"""`torch.distributed.checkpoint` loads shared state on any number of ranks to the bit, under DDP and FSDP2."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from processes import run
from training import assert_close, build, make_optimizer, result, train, whole

pytestmark = pytest.mark.distributed

MODES = ("full", "spectral")  # without and with moments under B
LAYOUTS = {"ddp": (False, True), "fsdp2": (False,)}  # by flatten_optimizer_state_dict


def started(kind, mode):
    model = build()
    model = fully_shard(model) if kind == "fsdp2" else DistributedDataParallel(model)
    return model, make_optimizer(model, {"mode": mode, "shard_states": True})


def state_of(optimizer):
    """All of it on rank 0, by place and name, and the step of the whole optimizer."""
    found = {
        f"{key}.{name}": whole(value).clone()
        for key, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {name: torch.as_tensor(value) for name, value in found.items()}


def save(rank, ranks, kind, folder):
    found = {}
    for mode in MODES:
        model, optimizer = started(kind, mode)
        train(model, optimizer, rank, ranks, steps=range(3))
        for flat in LAYOUTS[kind]:
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
            dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{folder}/{mode}-{flat}")
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/{mode}-raw")
        found[mode] = {"state": state_of(optimizer), "factors": result(model)}
    return found


def load(rank, ranks, kind, folder, is_same):
    found = {}
    for mode in MODES:
        for flat in LAYOUTS[kind] if is_same else (False,):
            torch.manual_seed(99)
            model, optimizer = started(kind, mode)
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
            loaded = {"model": of_model, "optimizer": of_optimizer}
            dcp.load(loaded, checkpoint_id=f"{folder}/{mode}-{flat}")
            set_state_dict(
                model,
                optimizer,
                model_state_dict=loaded["model"],
                optim_state_dict=loaded["optimizer"],
                options=options,
            )
            found[f"{mode} {flat}"] = {"state": state_of(optimizer), "factors": result(model)}
            train(model, optimizer, rank, ranks, steps=range(3, 4))  # goes on
        if is_same:  # an optimizer that has stepped, as its state gives the names to load
            model, optimizer = started(kind, mode)
            train(model, optimizer, rank, ranks, steps=range(1))
            of_optimizer = {"optimizer": optimizer.state_dict()}
            dcp.load(of_optimizer, checkpoint_id=f"{folder}/{mode}-raw")
            optimizer.load_state_dict(of_optimizer["optimizer"])
            found[f"{mode} raw"] = {"state": state_of(optimizer)}
    return found


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param(("ddp", 2), [("fsdp2", 2), ("ddp", 1)], marks=pytest.mark.slow),
        pytest.param(("fsdp2", 2), [("ddp", 2), ("fsdp2", 1)], marks=pytest.mark.slow),
        pytest.param(("ddp", 2), [("ddp", 2), ("ddp", 3), ("fsdp2", 3)], marks=pytest.mark.slow),
        pytest.param(("fsdp2", 2), [("fsdp2", 3), ("ddp", 3)], marks=pytest.mark.slow),
        pytest.param(("ddp", 3), [("ddp", 1), ("ddp", 2), ("fsdp2", 1)], marks=pytest.mark.slow),
        pytest.param(("ddp", 1), [("ddp", 2), ("ddp", 3), ("fsdp2", 2)], marks=pytest.mark.slow),
        pytest.param(("fsdp2", 1), [("fsdp2", 2), ("ddp", 3)], marks=pytest.mark.slow),
        pytest.param(("fsdp2", 3), [("fsdp2", 2), ("ddp", 1)], marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_loads_to_the_bit(saved, loaded, tmp_path):
    kind, ranks = saved
    written = run(save, ranks, tmp_path, kind, str(tmp_path / "saved"))[0]
    for to, many in loaded:
        found = run(load, many, tmp_path, to, str(tmp_path / "saved"), to == kind)
        for name, read in found[0].items():
            expected = written[name.split()[0]]
            assert read["state"].keys() == expected["state"].keys(), (to, many, name)
            for key, value in expected["state"].items():
                assert torch.equal(read["state"][key], value), (to, many, name, key)
        for each in found:
            for name, read in each.items():
                if "factors" in read:
                    assert_close(read["factors"], written[name.split()[0]]["factors"], 0)


def flat(rank, ranks):
    """PyTorch drops what it finds no name for in the optimizer's own state."""
    model, optimizer = started("fsdp2", "full")
    train(model, optimizer, rank, ranks, steps=range(1))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    try:
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    except ValueError as error:
        return {"said": str(error)}


def test_flat_states_of_fsdp2_are_refused(tmp_path):
    for found in run(flat, 2, tmp_path):
        assert "leave out flatten_optimizer_state_dict" in found["said"]
