"""A command and the program that it has started end together, whichever of them a signal reaches."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from grids import rest_slow
from signals import listen

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither groups of processes nor these signals"),
]

# As accelerate's launcher of a single process: it waits, and a signal ends it alone.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait())
"""
# a blocked signal waits until it is asked for, so that none is lost between "ready" and the waiting
WORKER = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("ready", os.getppid(), flush=True)
signal.sigwait({signal.SIGINT})
sys.exit("interrupted")
"""
STUBBORN = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)];" + WORKER
FINISHING = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("ready", flush=True)
signal.sigwait({signal.SIGTERM})
os._exit(0)
"""
COMMAND = """
import os, sys
from lorapro_hf.commands.common import processes
processes.GRACE = float(sys.argv[1])
sys.exit(processes.supervise([sys.executable, "-c", *sys.argv[2:]], os.environ))
"""


def start(*program: str, grace: float = 600.0, ignored: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    """The command that supervises a program, as soon as that has begun."""

    def prepare() -> None:
        listen()
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(grace), *program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def ready(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    line = process.stdout.readline().split()
    assert line[:1] == ["ready"]
    return line


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and errors, once nobody is left who could write."""
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("name", rest_slow(["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"], fast=2))
def test_a_signal_ends_the_program_and_what_it_has_started(name: str) -> None:
    number = signal.Signals[name]
    process = start(LAUNCHER, WORKER)
    ready(process)
    process.send_signal(number)
    code, errors = ended(process)
    assert code == 128 + number
    assert ("interrupted" in errors) == (name == "SIGINT")


def test_a_program_that_ignores_signals_is_killed() -> None:
    process = start(LAUNCHER, STUBBORN, grace=0.1)
    ready(process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 128 + signal.SIGTERM


def test_a_program_that_comes_to_its_end_after_a_signal_has_succeeded() -> None:
    process = start(FINISHING)
    ready(process)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")


def test_what_a_killed_program_has_started_ends_too() -> None:
    process = start(LAUNCHER, WORKER)
    _, launcher = ready(process)
    subprocess.run(["kill", "-KILL", launcher], check=True)
    assert ended(process)[0] == 128 + signal.SIGKILL


def test_a_signal_that_is_ignored_stays_so() -> None:
    process = start(FINISHING, ignored=(signal.SIGHUP,))
    ready(process)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")


@pytest.mark.parametrize(("code", "expected"), [("0", 0), ("3", 3)])
def test_the_exit_code_is_that_of_the_program(code: str, expected: int) -> None:
    assert ended(start(f"raise SystemExit({code})"))[0] == expected
