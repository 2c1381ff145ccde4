"""How does a comparison run on several devices?"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from lorapro_hf.commands.common.processes import supervise


def launch(devices: int, device: str, arguments: Sequence[str]) -> int:
    """Run `lorapro compare` in so many processes through accelerate, and wait for them.

    Args:
        devices: How many.
        device: `"cpu"` or `"cuda"`; on a CPU the processes share its cores out unless OMP_NUM_THREADS says otherwise.
        arguments: Of `lorapro compare`, for each process.

    Returns:
        The exit code of accelerate; 128 and a signal's number if one ended it. Signals are passed on to it.

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
