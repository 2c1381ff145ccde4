"""How do several processes share the runs of a comparison?"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lorapro_hf.commands.common.processes import supervise

_RANK, _COUNT, _LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"


@dataclass(frozen=True)
class Worker:
    """The number of this process among several, which share only the folder of results."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> Worker:
        """The worker of this process, from the variables of `accelerate launch` and torchrun."""
        return cls(int(os.environ.get(_RANK, "0")), int(os.environ.get(_COUNT, "1")))

    @staticmethod
    def forget_others() -> None:
        """Hide the other processes and all GPUs but one from `Trainer`, which would train one model on all of them.

        Call it before the first call of CUDA.
        """
        local = int(os.environ.get(_LOCAL, "0"))
        for name in (_RANK, _COUNT, _LOCAL):
            os.environ.pop(name, None)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", str(local)).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)]


def launch(devices: int, device: str, arguments: Sequence[str]) -> int:
    """Run `lorapro compare` in several processes through accelerate, and return its exit code.

    On a CPU the processes share its cores out unless OMP_NUM_THREADS says otherwise.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the processes have ended.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(devices)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "lorapro_hf.cli", "compare", *arguments]
    environment = dict(os.environ)
    if device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    code = supervise(command, environment)
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return code
