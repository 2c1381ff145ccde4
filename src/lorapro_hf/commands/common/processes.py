"""How does a command start another program, so that neither outlives the other?"""

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
GRACE = 30.0  # seconds between a signal and SIGKILL, as torchrun gives its workers
# schedulers of clusters send SIGUSR1 or SIGUSR2 before they end a job
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_PASSED_ON = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


def become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by a program; POSIX only, elsewhere this process would end before the program."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), environment)


def supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program, pass signals on to its process group, and wait until the whole group has ended.

    Processes of the group that still run 30 seconds after a signal has ended the program are killed.

    Returns:
        The exit code of the program; as in a shell, 128 plus the number of the signal that ended it.
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
        # In a session of its own the program gets Ctrl-C from this process only, and once.
        process = subprocess.Popen(command, env=environment, start_new_session=IS_POSIX)
        for number in early:
            _send(process, number)
        code = process.wait()
        if code < 0 and not received:
            _send(process, signal.SIGTERM)
        if received or code < 0:
            _end_group(process)
    if code and received:
        return 128 + received[-1]
    return code if code >= 0 else 128 - code


@contextmanager
def _handled(handler: object) -> Iterator[None]:
    """Handle signals with `handler`, except those that the parent made this process ignore, as `nohup` does."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
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
    """Send a signal to the group of a process; gives whether the group still had members. Signal 0 only asks."""
    if not IS_POSIX:  # the console itself sends Ctrl-C to all its processes
        if number == signal.SIGTERM:
            process.terminate()
        return process.poll() is None
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # PermissionError on macOS if only zombies are left
        return False
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Wait until all processes of a group have ended, and kill those that do not."""
    end = time.monotonic() + GRACE
    while _send(process, 0):
        if time.monotonic() > end:
            _send(process, signal.SIGKILL)
            return
        time.sleep(0.05)
