"""A rank that saves waits for the others as long as their process group does."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lorapro_hf.distributed import attendance
from lorapro_hf.distributed.attendance import Attendance
from lorapro_hf.optim.consolidation import await_all
from processes import run
from training import build, make_optimizer, train

LIMIT = timedelta(minutes=30)  # of gloo, by default


class Clock:
    """Time that passes only while somebody sleeps, and what happens meanwhile."""

    def __init__(self):
        self.now, self.events = 0.0, {}

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += 100 * seconds
        for time in [time for time in self.events if time <= self.now]:
            self.events.pop(time)()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(attendance, "time", clock)
    return clock


@pytest.fixture
def ranks(monkeypatch):
    """The attendance of two ranks, both in this process."""
    store = dist.HashStore()
    store.set_timeout(LIMIT)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    return [
        Attendance(SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2, group_name="0"), store)
        for rank in range(2)
    ]


def test_the_limit_is_that_of_the_process_group(ranks, clock):
    clock.events = {1700: lambda: come(ranks[0])}
    assert ranks[1].wait_for_all() == []
    assert 1700 <= clock.now < 1800


def come(rank):
    """Enter without waiting: the other rank is there already."""
    assert rank.wait_for_all() == []


@pytest.mark.parametrize(
    ("saves", "message"),
    [
        (True, "rank 1 has waited 1800 seconds, the limit of the process group, for rank 0 to give .* ddp_timeout"),
        (False, r"state_dict\(\) was called on rank 1, but not on all ranks .* rank 0 did not call it within 1800"),
    ],
)
def test_who_stays_away_is_named(ranks, clock, saves, message):
    with pytest.raises(RuntimeError, match=message):
        await_all(ranks[1], saves)
    assert clock.now > 1800
    clock.events = {clock.now + 100: lambda: come(ranks[0])}
    await_all(ranks[1], saves)  # later together


def test_a_store_that_has_gone_is_said(ranks, monkeypatch):
    def gone(self):
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(Attendance, "wait_for_all", gone)
    with pytest.raises(RuntimeError, match="the process that kept the store of the process group"):
        await_all(ranks[1], True)


def alone(rank, ranks):
    """Rank 0 asks for the state, no other rank does before it has given up."""
    model = DistributedDataParallel(build())
    optimizer = make_optimizer(model, {"mode": "efficient", "shard_states": True})
    train(model, optimizer, rank, ranks, steps=range(1))
    present = optimizer._current_ownership().attendance
    found = {"limit": present.limit.total_seconds()}
    if rank == 0:
        limit, present.limit = present.limit, timedelta()
        found["alone"] = refused(optimizer.state_dict)
        present.limit = limit
    dist.barrier()
    optimizer.state_dict()  # together it works, also after that
    return found


def refused(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)


@pytest.mark.distributed
def test_ranks_that_share_the_state_wait_so(tmp_path):
    found = run(alone, 2, tmp_path)
    assert found[0]["limit"] == found[1]["limit"] == LIMIT.total_seconds()
    assert found[0]["alone"].startswith("state_dict() was called on rank 0, but not on all ranks")
