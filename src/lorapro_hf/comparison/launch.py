"""How does a comparison run on several devices?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence


def launch(devices: int, device: str, arguments: Sequence[str]) -> int:
    """Run `lorapro compare` in so many processes through accelerate, and wait for them.

    Args:
        devices: How many.
        device: `"cpu"` or `"cuda"`; on a CPU the processes share its cores out unless OMP_NUM_THREADS says otherwise.
        arguments: Of `lorapro compare`, for each process.

    Returns:
        The exit code of accelerate, to which SIGTERM is passed on; 128 and a signal's number if one ended it.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the processes have ended.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(devices)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "lorapro_hf.cli", "compare", *arguments]
    environment = dict(os.environ)
    if device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    stopped = False
    with subprocess.Popen(command, env=environment) as process:
        # Ctrl-C reaches the whole group; what a queue or `kill` sends reaches this process alone.
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        while process.returncode is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # the processes have got it too, and end by themselves
                stopped = True
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise KeyboardInterrupt
    return process.returncode if process.returncode >= 0 else 128 - process.returncode
