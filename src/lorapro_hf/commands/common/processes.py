"""How does a command hand over to another program, so that neither outlives the other?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

IS_POSIX = os.name == "posix"
GRACE = 30.0  # seconds between a signal and SIGKILL, as torchrun leaves them to its workers
# schedulers of clusters send SIGUSR1 or SIGUSR2 before they end a job
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_PASSED_ON = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by a program; POSIX only, elsewhere the process would end and the program run on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), environment)


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program, pass signals on to it and all that it has started, and end with them.

    Ctrl-C, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 reach the whole group of processes. A member that is still
    there 30 seconds after the program has ended by a signal is killed.

    Returns:
        The exit code of the program; as in a shell, 128 and the number of the signal that ended it.
    """
    received: list[int] = []
    early: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        if process is None:
            early.append(number)
        else:
            _send(process, number)

    with _handled(pass_on):
        # A session of its own: Ctrl-C in a terminal comes through this process alone, and once.
        process = subprocess.Popen(command, env=environment, start_new_session=IS_POSIX)
        for number in early:
            _send(process, number)
        code = process.wait()
        if received or code < 0:
            _end_group(process, None if received else signal.SIGTERM)
    if code and received:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


@contextmanager
def _handled(handler: object) -> Iterator[None]:
    """Handle signals so, except those that the parent has told this process to ignore, as `nohup` does."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread alone
        yield
        return
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _send(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to the group of a process, and say whether there was anybody left; 0 only asks."""
    if not IS_POSIX:  # the console sends Ctrl-C to all of its processes by itself
        if number == signal.SIGTERM:
            process.terminate()
        return process.poll() is None
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # the latter on macOS, where only zombies are left
        return False
    return True


def _end_group(process: subprocess.Popen[bytes], number: int | None) -> None:
    """Wait for what a program has started and not ended itself, after a signal if one is given."""
    if number is not None:
        _send(process, number)
    end = time.monotonic() + GRACE
    while _send(process, 0):
        if time.monotonic() > end:
            _send(process, signal.SIGKILL)
            return
        time.sleep(0.05)
