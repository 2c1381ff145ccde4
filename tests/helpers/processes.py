"""Workers in processes of their own, connected by gloo and forked from the nursery of `killable`."""

import atexit
import contextlib
import os
import signal
import time
import traceback
import uuid
from multiprocessing.connection import Client, Listener

import torch
import torch.distributed as dist

from killable import nursery

PATIENCE = 240  # seconds for a job

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
            worker.kill()


class _Worker:
    """A process that waits for jobs."""

    def __init__(self):
        with Listener(family="AF_UNIX") as listener:
            self.process = nursery().fork(_work, listener.address)
            self.connection = listener.accept()

    def kill(self):
        self.connection.close()
        os.kill(self.process, signal.SIGKILL)


def _finish(workers, job, folder, arguments, environment):
    """Have all workers do the job; their results."""
    ranks, name = len(workers), f"{folder}/{uuid.uuid4().hex}"
    for rank, worker in enumerate(workers):
        worker.connection.send((job, rank, ranks, name, arguments, environment))
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
        if worker.connection.poll(0.05):
            return worker.connection.recv()
    except (EOFError, ConnectionError):
        return f"rank {rank} has ended"
    return "" if time.monotonic() < deadline else f"rank {rank} has not answered within {PATIENCE} seconds"


@atexit.register
def stop():
    while _workers:
        _workers.pop().kill()


def _work(address):
    """Take jobs until the tests have ended."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError), Client(address) as connection:
        while True:
            connection.send(_error_of(*connection.recv()))


def _error_of(job, rank, ranks, name, arguments, environment):
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
        return f"rank {rank}: {traceback.format_exc()}"
    return None
