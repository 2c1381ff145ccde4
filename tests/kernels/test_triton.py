"""The Triton kernels without a GPU: right under the interpreter, and accepted by the compiler for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorapro_hf.kernels.storage import dynamic_map, dynamic_thresholds

HELPERS = Path(__file__).parents[1] / "helpers"

# Whether Triton interprets is settled when it is imported, which another test may have caused: hence the processes.
AHEAD_OF_TIME = """
import itertools, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorapro_hf.kernels import triton_dense, triton_eigh
from lorapro_hf.kernels.triton_tiles import dense_kernel

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.uint8: "*u8"}

def compiled(kernel, signature, constants, options):
    # Paths of what is known at compile time, by position and, in tuples, by element.
    for name, value in constants.items():
        is_tuple = isinstance(value, tuple)
        signature[name] = ("constexpr",) * len(value) if is_tuple else "constexpr"
    known = {}
    for position, name in enumerate(kernel.arg_names):
        kinds, value = signature[name], constants.get(name)
        if isinstance(kinds, tuple):
            known |= {(position, i): value and value[i] for i, kind in enumerate(kinds) if kind == "constexpr"}
        elif kinds == "constexpr":
            known[(position,)] = value
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, known)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**options, "enable_fp_fusion": True})
    assert ".target sm_90" in made.asm["ptx"] and made.asm["cubin"]
    return made

def dense(storage, factors, rank, q, row_side, store, entries):
    launch = triton_dense.plan(storage, factors, (4, 4096, 4096), rank, q, store=store)
    constants = {name: value for name, value in launch.options.items() if name.isupper()}
    options = {name: value for name, value in launch.options.items() if name.islower()}
    extra = "*fp32" if storage == torch.uint8 else "constexpr"
    kind, kept = TYPES[factors], TYPES[storage]
    signature = {
        "moments": (kept, kept, extra, extra),
        "tables": (extra,) * 4,
        "factors": (kind,) * 4,
        "sums": (kind,) * 2,
        "scalars": ("*fp32", kind, "*fp32", "*i64" if entries else "constexpr"),
        **dict.fromkeys(("entries", "m", "n", "row_span", "column_span"), "i32"),
    }
    constants |= {"RANK": rank, "Q": q, "BETAS": (0.9, 0.999), "ROW_SIDE": row_side, "STORE": store}
    made = compiled(dense_kernel, signature, constants, options)
    # What an H100 or H200 gives to one program.
    assert made.metadata.shared <= 227 * 1024
    print("compiled", storage, rank, q, row_side, store, entries)
"""
VARIANTS = {
    "linear": """
for storage in (torch.float32, torch.bfloat16, torch.uint8):
    dense(storage, torch.float32, 8, 8, True, True, storage == torch.bfloat16)
dense(torch.float32, torch.float32, 64, 64, True, True, False)
""",
    "sequential": """
for storage in (torch.float32, torch.uint8):
    dense(storage, torch.float32, 8, 0, True, False, False)
    dense(storage, torch.float32, 8, 16, False, True, False)
""",
    "eigh": """
for block in (2, 8, 32):
    signature = {"matrices": "*fp64", "values": "*fp64", "vectors": "*fp64", "rank": "i32"}
    compiled(triton_eigh.jacobi_kernel, signature, {"BLOCK": block, "MOST": 40}, {"num_warps": 1 if block <= 8 else 8})
    print("compiled", block)
""",
}


def run(*arguments: str, tmp_path: Path, interpret: bool) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=HELPERS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="the CUDA kernels need Triton, which is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["eigen or spoiled or rank", "not (eigen or spoiled or rank)"], ids=["eigh", "dense"])
def test_interpreted_kernels_agree_with_their_oracles(part: str, tmp_path: Path) -> None:
    report = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        part,
        "triton_interpreted.py",
        tmp_path=tmp_path,
        interpret=True,
    )
    assert " passed" in report and "skipped" not in report


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_for_hopper(variant: str, tmp_path: Path) -> None:
    report = run("-c", AHEAD_OF_TIME + VARIANTS[variant], tmp_path=tmp_path, interpret=False)
    assert "compiled" in report


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_thresholds_lie_between_their_entries(signed: bool) -> None:
    entries, thresholds = dynamic_map(signed), dynamic_thresholds(signed)
    assert (thresholds[:-1] < entries).all() and (entries <= thresholds[1:]).all()
