"""DistributedDataParallel takes the steps of one process, whether or not the ranks share the pairs out."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf import LoRAProOptimizerFactory
from lorapro_hf.config import MODES
from processes import run
from training import (
    STEPS,
    assert_close,
    assert_differ,
    assert_every_mode_equals_one_process,
    batches,
    build,
    every_mode,
    loss_of,
    make_optimizer,
    result,
    share,
    single,
    slow,
    train,
)

pytestmark = pytest.mark.distributed

FEW = ("full", "spectral", "rite")
OTHERS = tuple(mode for mode in MODES if mode not in FEW)

BOTH = (True, False)
TOLERANCES = {"float64": 1e-10, "float32": 1e-5}


def trained(rank, ranks, config, dtype=torch.float64, model_settings=None, **options):
    model = DistributedDataParallel(build(dtype, **(model_settings or {})))
    train(model, make_optimizer(model, config), rank, ranks, dtype=dtype, **options)
    return result(model)


def many(rank, ranks, modes, shared, dtypes, model_settings):
    return every_mode(trained, rank, ranks, modes, shared, dtypes, model_settings)


@pytest.mark.parametrize(
    ("modes", "ranks", "shared", "dtypes", "model_settings"),
    [
        (FEW, 2, (True,), {"float64": 1e-10}, {}),
        pytest.param(OTHERS, 2, (True,), {"float64": 1e-10}, {}, marks=pytest.mark.slow),
        pytest.param(MODES, 2, (False,), {"float64": 1e-10}, {}, marks=pytest.mark.slow),
        pytest.param(MODES, 2, BOTH, {"float32": 1e-5}, {}, marks=pytest.mark.slow),
        pytest.param(MODES, 3, BOTH, TOLERANCES, {"r": 1}, marks=pytest.mark.slow),
        pytest.param(MODES, 3, BOTH, TOLERANCES, {"target_modules": ["0", "3"]}, marks=pytest.mark.slow),
    ],
)
def test_every_mode_equals_one_process(modes, ranks, shared, dtypes, model_settings, tmp_path):
    found = run(many, ranks, tmp_path, modes, shared, tuple(dtypes), model_settings)
    assert_every_mode_equals_one_process(found, modes, shared, dtypes, model_settings)


def variants(rank, ranks):
    config = {"mode": "full", "shard_states": True}
    return {
        "accumulated": trained(rank, ranks, config, accumulate=2),
        "clipped": trained(rank, ranks, config, clip=0.05),
        "bfloat16 moments": trained(rank, ranks, {**config, "moments_dtype": "bfloat16"}),
    }


def test_accumulation_clipping_and_narrow_moments(tmp_path):
    found = run(variants, 2, tmp_path)
    plain = single({"mode": "full"})
    for rank in range(2):
        assert_close(found[rank]["accumulated"], plain, 1e-10)
        assert_close(found[rank]["clipped"], single({"mode": "full"}, clip=0.05), 1e-10)
        assert_close(found[rank]["bfloat16 moments"], plain, 0.05)
    assert any((found[0]["clipped"][name] - value).norm() > 1e-4 for name, value in plain.items())


def without_adapter(model):
    """The second adapted layer, from now on without its adapter."""
    layer = model.base_model.model[3]
    layer.forward = layer.base_layer.forward
    return layer


def one_sided(rank, ranks):
    """Only rank 0 uses the adapter of the second layer."""
    model = build()
    before = result(model)
    if rank:
        without_adapter(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    train(wrapped, make_optimizer(wrapped, {"mode": "full", "shard_states": True}), rank, ranks, steps=range(3))
    return {"before": before, "after": result(model)}


def one_sided_alone():
    """The same on one process: the halves of a batch one after the other, the second without the adapter."""
    model = build()
    layer = model.base_model.model[3]
    with_it = layer.forward
    optimizer = make_optimizer(model, {"mode": "full"})
    for batch in batches()[:3]:
        optimizer.zero_grad()
        for rank, forward in enumerate((with_it, layer.base_layer.forward)):
            layer.forward = forward
            (loss_of(model, share(batch, rank, 2)) / 2).backward()
        optimizer.step()
    return result(model)


def never_used(rank, ranks):
    """A pair that no rank reaches stays as it is, with its state unbegun; the checkpoint loads and one rank tells."""
    said = logging.Handler()
    told = []
    said.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("lorapro_hf.optim.first_steps").addHandler(said)
    model = build()
    unused = without_adapter(model)
    before = unused.lora_A["default"].weight.clone()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = make_optimizer(wrapped, {"mode": "efficient", "shard_states": True})
    train(wrapped, optimizer, rank, ranks, steps=range(2))
    optimizer.finish_training()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(_from_rank_0(saved))
    untouched = torch.equal(before, unused.lora_A["default"].weight)
    return {"untouched": untouched, "entries": len(saved["state"]), "told": told}


def test_pairs_without_gradients(tmp_path):
    for rank, found in enumerate(run(never_used, 2, tmp_path)):
        assert found["untouched"]
        assert found["entries"] == 6  # two factors and four ordinary parameters
        assert len(found["told"]) == (rank == 0)
        assert all(said.startswith("1 of 2 LoRA pairs had no gradient in the first 2 steps") for said in found["told"])
    found = run(one_sided, 2, tmp_path)
    assert_differ(found[0]["after"], found[0]["before"])
    for each in found:
        assert_close(each["after"], one_sided_alone(), 1e-10)


def _from_rank_0(saved):
    """As if it had been read from the file that rank 0 wrote."""
    held = [saved]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def shared_state(rank, ranks, mode):
    config = {"mode": mode, "shard_states": True}
    model = DistributedDataParallel(build())
    optimizer = make_optimizer(model, config)
    train(model, optimizer, rank, ranks, steps=range(5))
    own = sum(tensor.numel() for tensor in optimizer.pair_state().values())
    optimizer.consolidate_state_dict()
    saved = copy.deepcopy(optimizer.state_dict())
    refused = ""
    if rank:
        optimizer.load_state_dict(copy.deepcopy(saved))  # its own part, as accelerate loads what it has just saved
        try:
            make_optimizer(build(), {"mode": mode, "shard_states": False}).load_state_dict(saved)
        except ValueError as error:
            refused = str(error)
    else:
        optimizer.load_state_dict(copy.deepcopy(saved))
    midway = result(model)
    whole = _from_rank_0(saved)
    train(model, optimizer, rank, ranks, steps=range(5, STEPS))
    end = result(model)
    # a new run that goes on from there
    again = build()
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if name in midway:
                parameter.copy_(midway[name])
    again = DistributedDataParallel(again)
    optimizer = make_optimizer(again, config)
    optimizer.load_state_dict(copy.deepcopy(whole))
    train(again, optimizer, rank, ranks, steps=range(5, STEPS))
    return {"own": own, "saved": whole, "midway": midway, "end": end, "resumed": result(again), "refused": refused}


@pytest.mark.parametrize("mode", ["factored", *slow(mode for mode in MODES if mode != "factored")])
def test_shared_state_is_saved_and_loaded_by_any_number_of_ranks(mode, tmp_path):
    found = run(shared_state, 2, tmp_path, mode)
    assert "only part of the optimizer's state" in found[1]["refused"]
    for rank in range(2):
        assert_close(found[rank]["resumed"], found[rank]["end"], 0)
    model = build()
    optimizer = make_optimizer(model, {"mode": mode})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found[0]["midway"]:
                parameter.copy_(found[0]["midway"][name])
    optimizer.load_state_dict(found[0]["saved"])
    assert sum(t.numel() for t in optimizer.pair_state().values()) == found[0]["own"] + found[1]["own"]
    train(model, optimizer, steps=range(5, STEPS))
    assert_close(result(model), found[0]["end"], 1e-3 if mode == "full_8bit" else 1e-9)


def poisoned(rank, ranks):
    """The gradient of one pair is not finite, which only its owner sees in the end."""
    model = DistributedDataParallel(build())
    optimizer = make_optimizer(model, {"mode": "full", "shard_states": True})
    train(model, optimizer, rank, ranks, steps=range(2))
    before = result(model)
    loss_of(model, share(batches()[2], rank, ranks)).backward()
    optimizer.pairs[0].A.grad.fill_(float("nan"))
    optimizer.step()
    return {"before": before, "after": result(model), "skipped": optimizer.skipped_steps}


def test_all_ranks_skip_what_one_finds_not_finite(tmp_path):
    for found in run(poisoned, 2, tmp_path):
        assert_close(found["after"], found["before"], 0)
        assert found["skipped"] == 1


def norms(rank, ranks):
    model = DistributedDataParallel(build())
    optimizer = make_optimizer(model, {"mode": "full", "shard_states": True})
    train(model, optimizer, rank, ranks, steps=range(3))
    return {"norm": float(optimizer.last_grad_norm)}


def test_the_norm_is_that_of_all_pairs(tmp_path):
    model = build()
    optimizer = make_optimizer(model, {"mode": "full"})
    train(model, optimizer, steps=range(3))
    for found in run(norms, 2, tmp_path):
        assert found["norm"] == pytest.approx(float(optimizer.last_grad_norm), rel=1e-9)


def plain_factory(rank, ranks):
    """What a plain Trainer does with a factory."""
    try:
        LoRAProOptimizerFactory()(build(), lr=1e-2, config={"shard_states": True})
    except ValueError as error:
        return {"message": str(error)}


def test_a_factory_shares_only_what_is_collected(tmp_path):
    for found in run(plain_factory, 2, tmp_path):
        assert "Use LoRAProTrainer" in found["message"]
    LoRAProOptimizerFactory()(build(), lr=1e-2, config={"shard_states": True})  # one process keeps all
