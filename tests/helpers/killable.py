"""Trainings that may be killed at any moment, in processes forked from one that has imported everything.

Run as a program it is that one process: a line of JSON on its input is a training, a line on its output its exit codes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PATIENCE = 240
# What a training would import for itself, the first being optional.
IMPORTED_LATER = ("deepspeed", "transformers.models.llama.modeling_llama", "peft.tuners.lora.bnb")


class Nursery:
    """The process that forks trainings; `jobs` is the module that has them."""

    def __init__(self, jobs: str = "killable_jobs") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, __file__, jobs]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE)
        self.process.stdout.close()

    def run(self, folder: Path, **job: Any) -> list[int]:
        """Exit codes of all ranks; minus the signal for one that was killed."""
        assert self.process.stdin and self.process.stdout
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps({"folder": str(folder), "ranks": 1, **job}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def finish(self, folder: Path, **job: Any) -> list[dict[str, Any]]:
        """What each rank has found, of a training that must come to its end."""
        import torch

        codes = self.run(folder, **job)
        ranks = range(len(codes))
        assert not any(codes), "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in ranks)
        return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in ranks]


def serve(jobs: str) -> None:
    """Fork what is asked for until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries print what they think of themselves
    import torch

    importlib.import_module(jobs)
    for module in IMPORTED_LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # the trainings collect garbage, of which there is none in what has been imported
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [_fork(jobs, job, rank, port) for rank in range(job["ranks"])]
        print(json.dumps(_wait(children, job.get("kill_after"))), file=answers, flush=True)


def _fork(jobs: str, job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{job['folder']}/log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["ranks"] > 1:
            ranks = str(job["ranks"])
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        import torch

        found = getattr(importlib.import_module(jobs), job.get("do", "train"))(job, rank)
        torch.save(found, f"{job['folder']}/result-{rank}.pt")
        if job["ranks"] > 1:  # rank 0 holds the store that the others still need
            torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)  # some libraries complain when they are unloaded
