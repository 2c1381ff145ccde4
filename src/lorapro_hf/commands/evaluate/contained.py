"""What happens to an untrusted program? Started by `sandbox.py` as a process of its own, with an order on stdin.

The order is JSON: `program`, `folder` (its working directory), `limits` (seconds of CPU; bytes of memory and of a file;
number of processes), `namespaces` (whether this process has namespaces of its own), `user` (the number of the user to
become, or `null`) and `token`, which the answer on stdout repeats. The first argument is the number of the process that
starts it, with which it ends; a command may follow, which it then becomes instead, before it reads anything.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import types
from typing import Any

_MOUNT_SETATTR = 442  # the same on every architecture
_AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = -100, 0x8000, 1
_NO_SUID_NO_DEV = 2 | 4
_DEATH_SIGNAL = 1
_KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 8, 38
_CAPABILITIES_VERSION = 0x20080522
_READ_EVERYTHING = 1 << 2  # CAP_DAC_READ_SEARCH


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def end_with_parent() -> None:
    """Have the kernel kill this process as soon as its parent ends, however that comes about."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "cannot be tied to the parent")


def seal_file_system(folder: str, size: int) -> None:
    """Make everything read-only but `folder`, which becomes an empty file system of `size` bytes in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY)  # to set, to clear, propagation, user namespace
    result = libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    _check(result, "cannot make the file system read-only")
    options = f"size={size},mode=0777".encode()
    _check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _NO_SUID_NO_DEV, options), f"cannot mount {folder}")


def limit(limits: dict[str, int]) -> None:
    """Bound what this process and those that it starts may use."""
    bounds = {
        resource.RLIMIT_CPU: limits["seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file_size"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        _, most = resource.getrlimit(kind)
        bound = bound if most == resource.RLIM_INFINITY else min(bound, most)
        resource.setrlimit(kind, (bound, bound))


def give_up_privileges(user: int | None) -> None:
    """Become `user`, if there is one, and lose every capability for good.

    A process that was root still reads every file, since Python itself may lie where only root can see it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    kept = 0
    if user is not None:
        _check(libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0), "cannot keep capabilities")
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        kept = _READ_EVERYTHING
    # effective, permitted and inheritable capabilities, the first 32 and then the rest
    header, capabilities = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)(kept, kept)
    _check(libc.capset(ctypes.byref(header), ctypes.byref(capabilities)), "cannot give up capabilities")
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "cannot forbid new privileges")


def run(program: str) -> str:
    """`passed` if `program` reaches its end, else the exception."""
    module = types.ModuleType("__program__")  # not __main__: only what the tests call runs
    sys.modules[module.__name__] = module
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:500]
    return "passed"


def main() -> None:
    """Follow the order on stdin, or become the command that was given."""
    parent, *command = sys.argv[1:]
    end_with_parent()
    is_first = os.getpid() == 1  # of a namespace, whose parent is outside and has no number in it
    if not is_first and os.getppid() != int(parent):
        sys.exit("the evaluation has ended")
    if command:
        os.execv(command[0], command)
    order: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    if order["namespaces"]:
        seal_file_system(order["folder"], order["limits"]["file_size"] * 4)
    os.chdir(order["folder"])
    limit(order["limits"])
    give_up_privileges(order["user"])
    end_with_parent()  # again: the kernel forgets it when a process becomes another user
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    token = order.pop("token")
    outcome = run(order.pop("program"))
    os.write(answer, json.dumps({"token": token, "outcome": outcome}).encode())
    os._exit(0)  # neither its threads nor what it registered for its exit


if __name__ == "__main__":
    main()
