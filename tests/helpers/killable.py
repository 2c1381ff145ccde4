"""Trainings that may be killed at any moment, in processes forked from one that has imported everything.

That one is forked from the tests before the first of them, since importing takes ten seconds of CPU time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 240
# What a training would import for itself; the last two are optional.
IMPORTED_LATER = (
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.fsdp",
    "peft.tuners.lora.bnb",
    "deepspeed",
)


@functools.cache
def nursery() -> Nursery:
    """The one of this process; the first call forks it, with all that has been imported until then."""
    return Nursery()


class Nursery:
    """The process that forks trainings, and workers of tests."""

    def __init__(self) -> None:
        self.connection, other = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: pytest-xdist's, which nothing here needs
            self.pid = os.fork()
        if not self.pid:
            self.connection.close()
            _serve(other)
        other.close()

    def close(self) -> None:
        self.connection.close()
        os.waitpid(self.pid, 0)

    def fork(self, function: Callable[..., None], *arguments: Any) -> int:
        """Call the function in a new process, whose id is returned."""
        self.connection.send((function, arguments))
        return self.connection.recv()

    def run(self, folder: Path, jobs: str = "killable_jobs", **job: Any) -> list[int]:
        """Exit codes of all ranks; minus the signal for one that was killed. `jobs` is the module that has the job."""
        folder.mkdir(parents=True, exist_ok=True)
        self.connection.send((_train, (jobs, {"folder": str(folder), "ranks": 1, **job})))
        return self.connection.recv()

    def finish(self, folder: Path, **job: Any) -> list[dict[str, Any]]:
        """What each rank has found, of a training that must come to its end."""
        import torch

        codes = self.run(folder, **job)
        ranks = range(len(codes))
        assert not any(codes), "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in ranks)
        return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in ranks]


def _serve(connection: Connection) -> None:
    """Fork what is asked for until the other end is closed."""
    try:
        logging.getLogger().handlers.clear()  # pytest's
        os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
        with contextlib.suppress(EOFError):
            while True:
                function, arguments = connection.recv()
                _import(IMPORTED_LATER)
                if function is _train:
                    connection.send(_train(*arguments))
                else:
                    connection.send(_fork(function, *arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # some libraries complain when they are unloaded


def _import(modules: tuple[str, ...]) -> None:
    for module in modules:
        if module not in sys.modules:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
            gc.freeze()  # the trainings collect garbage, of which there is none in what has been imported


def _fork(function: Callable[..., None], *arguments: Any) -> int:
    """The id of a new process, which calls the function and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(jobs: str, job: dict[str, Any]) -> list[int]:
    _import((jobs,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_fork(_train_rank, jobs, job, rank, port) for rank in range(job["ranks"])]
    return _wait(children, job.get("kill_after"))


def _train_rank(jobs: str, job: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(f"{job['folder']}/log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2, sys.stdout, sys.stderr):  # pytest has put files of its own in the place of the last two
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(log, stream if isinstance(stream, int) else stream.fileno())
    if job["ranks"] > 1:
        ranks = str(job["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    found = getattr(importlib.import_module(jobs), job.get("do", "train"))(job, rank)
    torch.save(found, f"{job['folder']}/result-{rank}.pt")
    if job["ranks"] > 1:  # rank 0 holds the store that the others still need
        torch.distributed.barrier()


def _wait(children: list[int], kill_after: float | None) -> list[int]:
    """Exit codes; as torchrun does, the others are ended when one fails, here after a second."""
    codes: dict[int, int] = {}
    end = time.monotonic() + (PATIENCE if kill_after is None else kill_after)
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    end = min(end, time.monotonic() + 1)
        if time.monotonic() > end:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.002)
    return [codes[child] for child in children]
