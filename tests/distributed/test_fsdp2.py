"""`fully_shard` (FSDP2) takes the steps of one process; its checkpoints load on any number of ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lorapro_hf import LoRAProConfig, find_lora_pairs
from lorapro_hf.config import MODES
from lorapro_hf.optim.projected_gradients import project_pair_gradients_
from processes import run
from training import (
    STEPS,
    assert_close,
    assert_differ,
    assert_every_mode_equals_one_process,
    build,
    every_mode,
    make_optimizer,
    result,
    single,
    slow,
    train,
    whole,
)

pytestmark = pytest.mark.distributed

FEW = ("full", "spectral", "rite")
OTHERS = tuple(mode for mode in MODES if mode not in FEW)


def sharded(ranks, dtype=torch.float64, replicas=1, **settings):
    model = build(dtype, **settings)
    shape, names = ((replicas, ranks // replicas), ("replicas", "shards")) if replicas > 1 else ((ranks,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in (model.base_model.model[0], model.base_model.model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def trained(rank, ranks, config, dtype=torch.float64, replicas=1, model_settings=None, **options):
    model = sharded(ranks, dtype, replicas, **(model_settings or {}))
    train(model, make_optimizer(model, config), rank, ranks, dtype=dtype, **options)
    return result(model)


def many(rank, ranks, modes, shared, dtypes, model_settings):
    return every_mode(trained, rank, ranks, modes, shared, dtypes, model_settings)


# r = 1: two ranks hold nothing of A
@pytest.mark.parametrize(
    ("modes", "ranks", "shared", "dtypes", "model_settings"),
    [
        (FEW, 2, (None,), {"float64": 1e-10}, {}),
        pytest.param(OTHERS, 2, (None,), {"float64": 1e-10}, {}, marks=pytest.mark.slow),
        pytest.param(MODES, 2, (False,), {"float64": 1e-10}, {}, marks=pytest.mark.slow),
        pytest.param(MODES, 2, (None, False), {"float32": 1e-5}, {}, marks=pytest.mark.slow),
        pytest.param(MODES, 3, (None, False), {"float64": 1e-10, "float32": 1e-5}, {"r": 1}, marks=pytest.mark.slow),
    ],
)
def test_every_mode_equals_one_process(modes, ranks, shared, dtypes, model_settings, tmp_path):
    found = run(many, ranks, tmp_path, modes, shared, tuple(dtypes), model_settings)
    assert_every_mode_equals_one_process(found, modes, shared, dtypes, model_settings)


def variants(rank, ranks):
    config = {"mode": "full"}
    skipped = sharded(ranks)
    optimizer = make_optimizer(skipped, config)
    train(skipped, optimizer, rank, ranks, steps=range(2))
    before = result(skipped)
    train(skipped, _Poisoned(optimizer, rank), rank, ranks, steps=range(2, 3))
    return {
        "accumulated": trained(rank, ranks, config, accumulate=2),
        "clipped": trained(rank, ranks, config, clip=0.05),
        "before": before,
        "skipped": result(skipped),
        "count": optimizer.skipped_steps,
    }


class _Poisoned:
    """An optimizer that finds an ordinary gradient of rank 1 not finite."""

    def __init__(self, optimizer, rank):
        self.optimizer, self.rank = optimizer, rank
        self.zero_grad = optimizer.zero_grad

    def step(self):
        last = self.optimizer.param_groups[-1]["params"][0]
        if self.rank == 1:
            last.grad.to_local().fill_(float("nan"))
        self.optimizer.step()


@pytest.mark.slow
def test_accumulation_clipping_and_skipped_steps(tmp_path):
    for found in run(variants, 2, tmp_path):
        assert_close(found["accumulated"], single({"mode": "full"}), 1e-10)
        assert_close(found["clipped"], single({"mode": "full"}, clip=0.05), 1e-10)
        assert_close(found["skipped"], found["before"], 0)
        assert found["count"] == 1


def two_dtypes(rank, ranks):
    """The factors of one layer in bfloat16, those of the other in float32."""
    model = build(torch.float32)
    layer = model.base_model.model[3]
    mesh = init_device_mesh("cpu", (ranks,))
    for module in (layer.lora_A.to(torch.bfloat16)["default"], layer.lora_B.to(torch.bfloat16)["default"], model):
        fully_shard(module, mesh=mesh)
    train(model, make_optimizer(model, {"mode": "full"}), rank, ranks, dtype=torch.float32)
    return result(model)


@pytest.mark.slow
def test_factors_of_two_dtypes(tmp_path):
    model = build(torch.float32)
    for factors in (model.base_model.model[3].lora_A, model.base_model.model[3].lora_B):
        factors.to(torch.bfloat16)
    train(model, make_optimizer(model, {"mode": "full"}), dtype=torch.float32)
    for found in run(two_dtypes, 3, tmp_path):
        assert_close(found, result(model), 0.02)  # gradients are averaged in bfloat16


def with_replicas(rank, ranks):
    return trained(rank, ranks, {"mode": "full"}, replicas=2)


@pytest.mark.slow
def test_shards_with_replicas(tmp_path):
    expected = single({"mode": "full"})
    for found in run(with_replicas, 4, tmp_path):
        assert_close(found, expected, 1e-10)


def save(rank, ranks, mode, folder):
    model = sharded(ranks)
    optimizer = make_optimizer(model, {"mode": mode})
    train(model, optimizer, rank, ranks, steps=range(5))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    moments = optimizer.state_dict()["state"]
    held = sum(t.to_local().numel() for state in moments.values() for t in state.values() if hasattr(t, "to_local"))
    of_all = sum(t.numel() for state in moments.values() for t in state.values() if hasattr(t, "to_local"))
    train(model, optimizer, rank, ranks, steps=range(5, STEPS))
    return {"end": result(model), "share": torch.tensor(held / of_all)}


def resume(rank, ranks, mode, folder):
    torch.manual_seed(99)
    model = sharded(ranks)
    optimizer = make_optimizer(model, {"mode": mode})
    of_model, of_optimizer = get_state_dict(model, optimizer)
    loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, optimizer, rank, ranks, steps=range(5, STEPS))
    return {"end": result(model)}


@pytest.mark.parametrize("mode", ["full_8bit", *slow(mode for mode in MODES if mode != "full_8bit")])
def test_distributed_checkpoints_load_on_any_number_of_ranks(mode, tmp_path):
    folder = str(tmp_path / "checkpoint")
    saved = run(save, 2, tmp_path, mode, folder)
    assert all(0.3 < float(found["share"]) < 0.7 for found in saved)
    for ranks, tolerance in ((2, 0), (3, 1e-3 if mode == "full_8bit" else 1e-9)):
        for found in run(resume, ranks, tmp_path, mode, folder):
            assert_close(found["end"], saved[0]["end"], tolerance)


def full_state(rank, ranks):
    """What accelerate's FULL_STATE_DICT does: rank 0 gets all, and hands it to the others when it is loaded."""
    model = sharded(ranks)
    optimizer = make_optimizer(model, {"mode": "full"})
    train(model, optimizer, rank, ranks, steps=range(5))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))  # steps are not copied
    assert bool(saved) == (rank == 0)
    midway = [p.to_local().clone() for p in model.parameters()]
    train(model, optimizer, rank, ranks, steps=range(5, STEPS))
    end = result(model)
    again = sharded(ranks)
    with torch.no_grad():
        for parameter, value in zip(again.parameters(), midway, strict=True):
            parameter.to_local().copy_(value)
    optimizer = make_optimizer(again, {"mode": "full"})
    set_optimizer_state_dict(again, optimizer, saved, options=options)
    train(again, optimizer, rank, ranks, steps=range(5, STEPS))
    return {"end": end, "resumed": result(again)}


def test_full_state_dicts(tmp_path):
    for found in run(full_state, 2, tmp_path):
        assert_close(found["resumed"], found["end"], 0)


def projected(rank, ranks):
    """The callback's way: adjusted gradients for an optimizer that is not ours."""
    model = sharded(ranks)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, _Projected(model, optimizer), rank, ranks, steps=range(3))
    return result(model)


class _Projected:
    def __init__(self, model, optimizer):
        self.optimizer, self.pairs = optimizer, find_lora_pairs(model)
        self.zero_grad = optimizer.zero_grad

    def step(self):
        project_pair_gradients_(self.pairs, LoRAProConfig(mode="efficient"))
        self.optimizer.step()


def test_adjusted_gradients_for_other_optimizers(tmp_path):
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    plain = build()
    train(plain, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1), steps=range(3))
    train(model, _Projected(model, optimizer), steps=range(3))
    assert_differ(result(model), result(plain))
    for found in run(projected, 2, tmp_path):
        assert_close(found, result(model), 1e-10)


def refusals(rank, ranks):
    messages = {}
    model = build()
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(model.base_model.model[0], mesh=mesh)
    try:
        make_optimizer(model, {"mode": "full"})
    except RuntimeError as error:
        messages["half"] = str(error)
    dist.barrier()
    whole_model = build()
    stale = make_optimizer(whole_model, {"mode": "full"})
    fully_shard(whole_model, mesh=mesh)
    try:
        train(whole_model, stale, rank, ranks, steps=range(1))
    except ValueError as error:
        messages["stale"] = str(error)
    assert whole(next(whole_model.parameters())) is not None
    return messages


def test_refusals_name_the_remedy(tmp_path):
    for found in run(refusals, 2, tmp_path):
        assert "Call fully_shard on the whole model" in found["half"]
        assert "Build the optimizer from the model it trains" in found["stale"]
