"""How are the C++ kernels for the CPU built, found and called?

The sources lie beside this file. A C++ compiler builds them on first use, once for each machine type and version, into
a folder of the user's cache. Without a compiler the same computations run in torch.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# The order of sums is that of the source: the compiler may fuse a product and a sum, and nothing else.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast")
# By the instructions that torch uses on this machine.
_INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
}
_SECONDS = 300.0  # after which a compiler that hangs is given up


@cache
def native_kernels() -> ctypes.CDLL | None:
    """The library of `*.cpp` of this folder, or `None` where it cannot be built or `LORAPRO_HF_NO_NATIVE=1` is set.

    Built on Linux alone, where torch and compiler share one OpenMP library. The reason for `None` is logged once.
    """
    if os.environ.get("LORAPRO_HF_NO_NATIVE", "0") not in ("", "0") or not sys.platform.startswith("linux"):
        return None
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    reason = "no C++ compiler was found"
    if compiler is not None:
        try:
            return ctypes.CDLL(str(_library(compiler)))
        except subprocess.CalledProcessError as error:
            reason = f"{compiler} failed: {_message(error.stderr)}"
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            reason = str(error)
    logger.warning(
        "steps on this CPU run in torch, more slowly than in compiled kernels: %s. Install g++ 9 or newer, or set CXX; "
        "LORAPRO_HF_NO_NATIVE=1 hides this line.",
        reason,
    )
    return None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where the elements of a contiguous tensor begin; null for `None`."""
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _library(compiler: str) -> Path:
    here, start = Path(__file__).parent, shlex.split(compiler)
    sources = sorted(here.glob("*.cpp"))
    command = [*start, *_FLAGS, *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ())]
    version = _run([*start, "--version"])
    of_all = hashlib.sha256(repr((command, version, platform.machine(), torch.__version__)).encode())
    for source in (*sources, *sorted(here.glob("*.hpp"))):
        of_all.update(source.read_bytes())
    folder = _folder()
    library = folder / f"kernels-{of_all.hexdigest()[:16]}.so"
    if not library.exists():
        logger.info("building the C++ kernels for this CPU once, in %s", folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
            with ThreadPoolExecutor() as pool:  # list() raises the first error
                each = zip(sources, objects, strict=True)
                list(pool.map(lambda one: _run([*command, "-c", str(one[0]), "-o", str(one[1])]), each))
            built = Path(scratch) / library.name
            _run([*command, "-shared", *map(str, objects), "-o", str(built)])
            built.replace(library)  # at once: other processes may build it too
    return library


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS
    ).stdout


def _message(printed: str) -> str:
    """The first error that a compiler has printed."""
    lines = printed.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def _folder() -> Path:
    """The folder of the user's cache, or one of this process if that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorapro_hf"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # the latter for a user without a home
        folder = Path(tempfile.mkdtemp(prefix="lorapro_hf-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
