"""Two processes under DistributedDataParallel take the steps that one process takes on the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from lora_layers import ROWS
from lorapro_hf import create_lorapro_optimizer, find_lora_pairs
from lorapro_hf.config import MODES

STEPS = 4


def train(model, inputs, mode):
    optimizer = create_lorapro_optimizer(model, lr=1e-2, config={"mode": mode})
    for batch in inputs:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    return [factor.detach() for pair in optimizer.pairs for factor in (pair.A, pair.B)]


def data():
    return torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def fresh_model():
    torch.manual_seed(0)
    return ROWS[0].build(init_lora_weights=True)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        share = data()[:, 4 * rank : 4 * rank + 4]
        trained = {mode: train(DistributedDataParallel(fresh_model()), share, mode) for mode in MODES}
        torch.save(trained, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    before = [factor.detach() for pair in find_lora_pairs(fresh_model()) for factor in (pair.A, pair.B)]
    single = {mode: train(fresh_model(), data(), mode) for mode in MODES}
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for mode in MODES:
            for one, expected, start in zip(found[mode], single[mode], before, strict=True):
                torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)
                assert not torch.equal(expected, start)
