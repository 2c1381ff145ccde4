"""Workers in processes of their own, connected by gloo.

They are forked from a server that has imported the libraries, since importing them takes ten seconds of CPU time.
"""

import atexit
import os
import queue
import sys
import time
import traceback
import uuid

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 240  # seconds for a job
PRELOADED = ("peft", "transformers.trainer", "torch.distributed.fsdp", "lorapro_hf.optim.factory")

_workers = []


def run(job, ranks, folder, *arguments):
    """What `job(rank, ranks, *arguments)` returns on each rank: anything that torch.save takes without pickling.

    The same workers take one job after the other.
    """
    while len(_workers) < ranks:
        _workers.append(_Worker())
    return _finish(_workers[:ranks], job, folder, arguments, {})


def run_afresh(job, ranks, folder, *arguments, environment=None):
    """As `run`, in new processes with the variables that a launcher would set and some more.

    DeepSpeed and accelerate do not forget the process groups and settings of an earlier job.
    """
    workers = [_Worker() for _ in range(ranks)]
    try:
        return _finish(
            workers, job, folder, arguments, {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, **(environment or {})}
        )
    finally:
        for worker in workers:
            worker.process.kill()


class _Worker:
    """A process that waits for jobs."""

    def __init__(self):
        context = _context()
        self.inbox, self.outbox = context.Queue(), context.Queue()
        self.process = context.Process(target=_work, args=(self.inbox, self.outbox), daemon=True)
        self.process.start()


def _context():
    if sys.platform != "linux":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _finish(workers, job, folder, arguments, environment):
    """Have all workers do the job; their results."""
    ranks, name = len(workers), f"{folder}/{uuid.uuid4().hex}"
    for rank, worker in enumerate(workers):
        worker.inbox.put((job, rank, ranks, name, arguments, environment))
    waiting, deadline = set(range(ranks)), time.monotonic() + PATIENCE
    while waiting:
        for rank in sorted(waiting):
            error = _answer(rank, workers[rank], deadline)
            if error:
                stop()  # the others may wait for this one for ever
                raise AssertionError(error)
            if error is None:
                waiting.discard(rank)
    return [torch.load(f"{name}-{rank}.pt", weights_only=True) for rank in range(ranks)]


def _answer(rank, worker, deadline):
    """What went wrong there, None if nothing did, or "" if there is no answer yet."""
    try:
        return worker.outbox.get(timeout=0.05)
    except queue.Empty:
        if not worker.process.is_alive():
            return f"rank {rank} has ended with exit code {worker.process.exitcode}"
        return "" if time.monotonic() < deadline else f"rank {rank} has not answered within {PATIENCE} seconds"


@atexit.register
def stop():
    while _workers:
        _workers.pop().process.kill()


def _work(inbox, outbox):
    torch.set_num_threads(1)
    while True:
        job, rank, ranks, name, arguments, environment = inbox.get()
        error = None
        try:
            if environment:
                os.environ.update(
                    {key: str(value) for key, value in environment.items()}, RANK=str(rank), LOCAL_RANK=str(rank)
                )
            dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=ranks)
            torch.save(job(rank, ranks, *arguments), f"{name}-{rank}.pt")
            if dist.is_initialized():
                dist.barrier()  # nobody leaves while others still talk to it
                dist.destroy_process_group()
        except BaseException:
            error = f"rank {rank}: {traceback.format_exc()}"
        outbox.put(error)
