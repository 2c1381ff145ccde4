"""Does a program that a model wrote pass its tests, and can it do no harm while it is tried?"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorapro_hf.options import UsageError

_CONTAINED = Path(__file__).parent / "contained.py"
_USERS = range(61184, 65520)  # systemd too gives these to programs for as long as they run
_NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
_PROBE = "import collections, fractions, heapq, itertools, math, random, re, typing\nopen('note', 'w').write('x')\n"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: of the clock, and rounded up, of the processor.
        memory: bytes of address space of each process.
        file_size: bytes of a file.
        processes: processes and threads at a time. Linux does not count those of root.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    file_size: int = 16 << 20
    processes: int = 16


@dataclass(frozen=True)
class Isolation:
    """How far a program is kept apart.

    Args:
        namespaces: whether it has no network, a file system that is read-only but for an empty folder, and processes
            that end with it, whatever they do.
        own_user: whether it becomes a user of its own, which only root can have it do.
    """

    namespaces: bool
    own_user: bool

    @property
    def missing(self) -> list[str]:
        """What a program is not kept from."""
        found = []
        if not self.namespaces:
            found.append("the network")
            found.append("files that anybody may write" if self.own_user else "your files and processes")
            found.append("leaving processes behind")
        if not self.own_user and os.geteuid() == 0:
            found.append("starting any number of processes")
        return found


@dataclass(frozen=True)
class Verdict:
    """Whether a program reached its end, and otherwise why not."""

    passed: bool
    outcome: str


class Sandbox:
    """Runs programs, each in a process of its own, kept apart as far as this machine permits.

    Args:
        limits: what each program may use.
        isolation: how far it is kept apart; by default as far as possible, which is found out by trying.

    Raises:
        UsageError: this is not Linux, or not even a harmless program runs.
    """

    def __init__(self, limits: Limits | None = None, isolation: Isolation | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise UsageError("Programs run on Linux only, where they can be limited; use a container or another host.")
        self.limits = Limits() if limits is None else limits
        self.isolation = self._strongest() if isolation is None else isolation

    def _strongest(self) -> Isolation:
        own_users = (True, False) if os.geteuid() == 0 else (False,)
        reasons = []
        for isolation in (Isolation(namespaces, own) for namespaces in (True, False) for own in own_users):
            try:
                verdict = self._try(_PROBE, isolation)
            except (OSError, RuntimeError) as error:
                reasons.append(str(error))
                continue
            if verdict.passed:
                return isolation
            reasons.append(verdict.outcome)
        raise UsageError(f"Not even a harmless program runs in the sandbox: {'; '.join(reasons)}")

    def run(self, program: str) -> Verdict:
        """Whether `program` reaches its end without an exception; safe to call from several threads.

        Raises:
            RuntimeError: the sandbox could not be set up, which says nothing about the program.
        """
        return self._try(program, self.isolation)

    def _try(self, program: str, isolation: Isolation) -> Verdict:
        token = secrets.token_hex(16)
        user = secrets.choice(_USERS) if isolation.own_user else None  # each its own: processes are counted by user
        limits = {**vars(self.limits), "seconds": math.ceil(self.limits.seconds)}
        with (
            tempfile.TemporaryDirectory(prefix="lorapro-program-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as answer,
            tempfile.TemporaryFile() as complaint,
        ):
            if user is not None:
                os.chown(folder, user, user)
            order = {"program": program, "folder": folder, "limits": limits, "token": token, "user": user}
            order["namespaces"] = isolation.namespaces
            code = self._execute(json.dumps(order).encode(), isolation, folder, answer.fileno(), complaint.fileno())
            answer.seek(0)
            complaint.seek(0)
            said, trouble = answer.read(), complaint.read().decode(errors="replace").strip()
        if trouble:
            raise RuntimeError(f"The sandbox could not be set up: {trouble[-2000:]}")
        if code is None:
            return Verdict(False, f"timed out after {self.limits.seconds:g} s")
        with suppress(ValueError, KeyError, TypeError):
            report = json.loads(said)
            if report["token"] == token:
                return Verdict(report["outcome"] == "passed", report["outcome"])
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return Verdict(False, f"{ending} before its end")

    def _execute(self, order: bytes, isolation: Isolation, folder: str, answer: int, complaint: int) -> int | None:
        """The exit code, negative for a signal; `None` where the time was up."""
        process = subprocess.Popen(
            _command(isolation),
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=complaint,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.communicate(order, timeout=self.limits.seconds)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a program left behind
            process.wait()


def _command(isolation: Isolation) -> list[str]:
    contained = [sys.executable, "-I", str(_CONTAINED), str(os.getpid())]
    if not isolation.namespaces:
        return contained
    unshare = shutil.which("unshare")
    if unshare is None:
        raise RuntimeError("the program `unshare` (util-linux) is not installed")
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [*contained, unshare, *as_root, *_NAMESPACES, *contained]
