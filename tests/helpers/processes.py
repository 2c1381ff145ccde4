"""Workers in processes of their own, connected by gloo.

They are started once and take one job after the other: starting takes seconds, most of them for imports.
"""

import atexit
import queue
import time
import traceback
import uuid

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 240  # seconds for a job

_workers = []


def run(job, ranks, folder, *arguments):
    """What `job(rank, ranks, *arguments)` returns on each rank: anything that torch.save takes without pickling."""
    context = mp.get_context("spawn")
    while len(_workers) < ranks:
        inbox, outbox = context.Queue(), context.Queue()
        process = context.Process(target=_work, args=(inbox, outbox), daemon=True)
        process.start()
        _workers.append((process, inbox, outbox))
    name = f"{folder}/{uuid.uuid4().hex}"
    for rank in range(ranks):
        _workers[rank][1].put((job, rank, ranks, name, arguments))
    waiting, deadline = set(range(ranks)), time.monotonic() + PATIENCE
    while waiting:
        for rank in sorted(waiting):
            error = _answer(rank, deadline)
            if error:
                stop()  # the others may wait for this one for ever
                raise AssertionError(error)
            if error is None:
                waiting.discard(rank)
    return [torch.load(f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def _answer(rank, deadline):
    """What went wrong there, None if nothing did, or "" if there is no answer yet."""
    try:
        return _workers[rank][2].get(timeout=0.05)
    except queue.Empty:
        return "" if time.monotonic() < deadline else f"rank {rank} has not answered within {PATIENCE} seconds"


@atexit.register
def stop():
    while _workers:
        _workers.pop()[0].kill()


def _work(inbox, outbox):
    torch.set_num_threads(1)
    while True:
        job, rank, ranks, name, arguments = inbox.get()
        error = None
        try:
            dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=ranks)
            torch.save(job(rank, ranks, *arguments), f"{name}-{rank}.pt")
            dist.barrier()  # nobody leaves while others still talk to it
            dist.destroy_process_group()
        except BaseException:
            error = f"rank {rank}: {traceback.format_exc()}"
        outbox.put(error)
