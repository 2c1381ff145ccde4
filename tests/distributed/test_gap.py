"""The gradient gap on several processes is that of one with the same batches, and leaves the training as it is."""

import json
from dataclasses import asdict

import pytest
import torch
from test_fsdp2 import sharded
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf.config import MODES
from lorapro_hf.diagnostics import GradientGapMeter
from processes import run
from training import assert_close, batches, build, loss_of, make_optimizer, result, share

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONFIGS = {
    "adamw": "adamw",
    **{mode: {"mode": mode, "shard_states": True} for mode in MODES if mode != "full_8bit"},
    "sequential": {"mode": "full", "update": "sequential", "shard_states": True},
}


def measured(model, config, rank=0, ranks=1, accumulate=2):
    optimizer = make_optimizer(model, config)
    meter = GradientGapMeter(model, max_bytes=8 * 42)  # one layer at a time
    found = []
    for batch in batches(steps=4):
        optimizer.zero_grad()
        meter.start()
        for part in share(batch, rank, ranks).chunk(accumulate):
            (loss_of(model, part) / accumulate).backward()
        meter.before_step(optimizer)
        optimizer.step()
        found += [asdict(gap) for gap in meter.after_step(optimizer)]
    return {"gaps": json.dumps(found), **result(model)}


def under_ddp(rank, ranks):
    return {name: measured(DistributedDataParallel(build()), config, rank, ranks) for name, config in CONFIGS.items()}


def under_fsdp2(rank, ranks):
    return {name: measured(sharded(ranks), config, rank, ranks) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("job", [under_ddp, under_fsdp2])
def test_ranks_measure_what_one_process_does(job, tmp_path):
    found = run(job, 2, tmp_path)
    for name, config in CONFIGS.items():
        expected = measured(build(), config)
        figures = json.loads(expected.pop("gaps"))
        assert len({gap["layer"] for gap in figures}) == 2
        for of_rank in found:
            gaps = json.loads(of_rank[name].pop("gaps"))
            assert len(gaps) == len(figures) == 4
            for gap, other in zip(gaps, figures, strict=True):
                for figure, value in other.items():
                    if figure == "residual" or (figure == "step_error" and value < 1e-9):
                        assert gap[figure] < 1e-8
                    elif isinstance(value, float):
                        assert gap[figure] == pytest.approx(value, rel=1e-6), (name, figure)
                    else:
                        assert gap[figure] == value
            assert_close(of_rank[name], expected, 1e-10)
            assert all(torch.isfinite(value).all() for value in of_rank[name].values())


def missing_a_pass(rank, ranks):
    """The first rank has missed a backward pass of the first layer: both ranks leave the layer out, and go on."""
    model = DistributedDataParallel(build())
    optimizer, meter = make_optimizer(model, "adamw"), GradientGapMeter(model)
    meter.start()
    loss_of(model, share(next(iter(batches(steps=1))), rank, ranks)).backward()
    meter._recordings[0].lost = rank == 0
    meter.before_step(optimizer)
    optimizer.step()
    measured = meter.after_step(optimizer)
    return {"measured": json.dumps([gap.layer for gap in measured]), "unseen": json.dumps(meter.unseen)}


def test_a_pass_missed_by_one_rank_holds_up_nobody(tmp_path):
    names = [pair for turn in GradientGapMeter(build()).turns for pair in turn]
    for of_rank in run(missing_a_pass, 2, tmp_path):
        assert json.loads(of_rank["unseen"]) == names[:1]
        assert json.loads(of_rank["measured"]) == names[1:]
