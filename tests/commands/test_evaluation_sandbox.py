"""What a program can do in the sandbox, and what it is judged to be."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lorapro_hf.commands.evaluate import sandbox as module
from lorapro_hf.commands.evaluate.sandbox import Isolation, Limits, Sandbox
from lorapro_hf.options import UsageError
from signals import listen

# For programs that come to their end, however busy the machine is, and for programs that never do. The latter is no
# whole number, as the limit of the processor's time is rounded up and must not be reached first.
ENOUGH, BRIEF = 60.0, 1.5
HANG = 240  # seconds after which a test fails that waits for something


def sandbox_for(seconds: float, isolation: Isolation | None = None) -> Sandbox:
    return Sandbox(Limits(seconds=seconds, memory=512 << 20, file_size=1 << 20), isolation)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_for(ENOUGH)


@pytest.fixture(scope="module", params=["as far as possible", "without namespaces"])
def either(request: pytest.FixtureRequest, sandbox: Sandbox) -> Sandbox:
    if request.param == "as far as possible":
        return sandbox
    return Sandbox(sandbox.limits, Isolation(namespaces=False, own_user=sandbox.isolation.own_user))


PROGRAMS = {
    "right": ("def f(x):\n    return x + 1\nassert f(1) == 2", "passed"),
    "prints a lot": ("print('x' * (1 << 22))", "passed"),
    "leaves a thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(900,)).start()", "passed"),
    "not main": ("if __name__ == '__main__':\n    raise ValueError", "passed"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nA(1)", "passed"),
    "wrong": ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    "no Python": ("def f(:", "SyntaxError"),
    "loops": ("while True: pass", "timed out after 1.5 s"),
    "sleeps": ("import time; time.sleep(900)", "timed out after 1.5 s"),
    "eats memory": ("x = [bytearray(1 << 26) for _ in range(64)]", "MemoryError"),
    "writes a large file": ("with open('big', 'wb') as f: f.write(b'x' * (2 << 20))", "File too large"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "exits at once": ("import os; os._exit(0)", "exited with code 0 before its end"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV before its end"),
    "answers for itself": (
        'import os\nos.write(3, b\'{"token": 1, "outcome": "passed"}\'); os._exit(0)',
        "exited with",
    ),
    "reads stdin": ("input()", "EOFError"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_verdict_of_a_program(name: str, sandbox: Sandbox) -> None:
    program, outcome = PROGRAMS[name]
    box = sandbox_for(BRIEF, sandbox.isolation) if outcome.startswith("timed out") else sandbox
    verdict = box.run(program)
    assert verdict.passed == (outcome == "passed") and outcome in verdict.outcome


def test_environment_is_empty_and_folder_is_gone_afterwards(either: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    verdict = either.run(
        "import os\nopen('note', 'w').write('x')\nassert os.listdir('.') == ['note']\n"
        "raise ValueError(os.getcwd() + ' ' + ' '.join(sorted(os.environ)))"
    )
    folder, *names = verdict.outcome.removeprefix("ValueError: ").split()
    assert folder.startswith("/") and not Path(folder).exists()
    assert set(names) <= {"HOME", "TMPDIR", "LANG", "LC_CTYPE", "OMP_NUM_THREADS"}


def left_over(folder: Path) -> list[int]:
    """The processes whose temporary files belong into `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if str(folder) in (entry / "environ").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
    return found


def wait_until_all_are_gone(folder: Path) -> None:
    """Those that have been killed need a moment."""
    deadline = time.monotonic() + HANG
    while found := left_over(folder):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_forks_are_bounded_and_end_with_the_program(
    either: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "starting any number of processes" in either.isolation.missing:
        pytest.skip("this system does not limit the processes of root")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    forks = "import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(900)"
    assert "Resource temporarily unavailable" in either.run(forks).outcome
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert "timed out" in sandbox_for(BRIEF, either.isolation).run(bomb).outcome
    wait_until_all_are_gone(tmp_path)


DAEMON = """
import os, time
heard, said = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(said, b"up")
        time.sleep(900)
    os._exit(0)
assert os.read(heard, 2) == b"up"
os.waitpid(child, 0)  # only the daemon is left
"""


def test_daemons_end_with_the_program(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sandbox.isolation.namespaces:
        pytest.skip("this system permits no namespaces")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert sandbox.run(DAEMON).passed
    wait_until_all_are_gone(tmp_path)
    # what this test looks for would be found: without namespaces it lives on
    weaker = sandbox_for(ENOUGH, Isolation(namespaces=False, own_user=sandbox.isolation.own_user))
    assert weaker.run(DAEMON).passed
    alive = left_over(tmp_path)
    for number in alive:
        os.kill(number, signal.SIGKILL)
    assert len(alive) == 1


def test_nothing_outside_can_be_written_or_reached(sandbox: Sandbox, tmp_path: Path) -> None:
    if not sandbox.isolation.namespaces:
        pytest.skip("this system permits no namespaces")
    tmp_path.chmod(0o777)
    target = tmp_path / "note"
    assert "Read-only file system" in sandbox.run(f"open({str(target)!r}, 'w')").outcome
    assert not target.exists()
    fills = "for i in range(20):\n    open(f'f{i}', 'wb').write(b'x' * 1000000)"
    assert "No space left" in sandbox.run(fills).outcome
    network = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "Network is unreachable" in sandbox.run(network).outcome


def test_what_is_missing_is_said() -> None:
    assert Isolation(namespaces=True, own_user=True).missing == []
    assert Isolation(namespaces=False, own_user=True).missing[:2] == ["the network", "files that anybody may write"]
    assert len(Isolation(namespaces=False, own_user=False).missing) == (4 if os.geteuid() == 0 else 3)


def test_without_unshare_the_sandbox_steps_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    weaker = Sandbox(Limits(seconds=ENOUGH))
    assert not weaker.isolation.namespaces and "the network" in weaker.isolation.missing
    assert weaker.run("assert True").passed


def test_a_sandbox_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CONTAINED", tmp_path / "nowhere.py")
    with pytest.raises(UsageError, match=r"Not even a harmless program runs in the sandbox: .*nowhere\.py"):
        Sandbox()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UsageError, match="Linux only"):
        Sandbox()


def test_trouble_of_the_sandbox_is_no_verdict(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_CONTAINED", tmp_path / "nowhere.py")
    with pytest.raises(RuntimeError, match="could not be set up"):
        sandbox.run("assert True")


def test_a_program_that_leaves_its_session_ends_too(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sandbox.isolation.namespaces:
        pytest.skip("this system permits no namespaces")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    leaves = "import os, time\nos.setsid()\nos.fork()\ntime.sleep(900)"
    assert "timed out" in sandbox_for(BRIEF, sandbox.isolation).run(leaves).outcome
    wait_until_all_are_gone(tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_program_ends_with_the_evaluation_however_that_ends(name: str, either: Sandbox, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # which may be written to in a file system that is read-only
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    program = f"import os, time\nos.write(os.open({str(pipe)!r}, os.O_WRONLY), b'up')\ntime.sleep(900)"
    code = (
        "import sys, tempfile\nfrom lorapro_hf.commands.evaluate.sandbox import *\ntempfile.tempdir = sys.argv[1]\n"
        f"print(Sandbox(Limits(seconds=900), {either.isolation!r}).run({program!r}))\n"
    )
    heard = os.open(pipe, os.O_RDWR)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], preexec_fn=listen)
    try:
        assert select.select([heard], [], [], HANG)[0], "the program has not begun"
        assert left_over(tmp_path)
        process.send_signal(signal.Signals[name])
        process.wait(timeout=HANG)
    finally:
        process.kill()
        os.close(heard)
    wait_until_all_are_gone(tmp_path)


def test_ctrl_c_ends_a_running_program(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys, tempfile, threading, time\n"
        "from lorapro_hf.commands.evaluate.sandbox import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # shells let background jobs ignore it
        "tempfile.tempdir = sys.argv[1]\n"
        "box = Sandbox(Limits(seconds=900), Isolation(namespaces=False, own_user=False))\n"  # whose folder can be seen
        "def press():\n"
        "    while not list(pathlib.Path(sys.argv[1]).glob('*/running')): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=press, daemon=True).start()\n"
        'try: box.run(\'open("running", "w").close(); import time; time.sleep(900)\')\n'
        "except KeyboardInterrupt: print('stopped')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG)
    assert done.stdout.strip() == "stopped", done.stderr
    wait_until_all_are_gone(tmp_path)
