"""Do the eigensolver and the step of dense moments by themselves give what float64 gives?"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_parts.record import Record, distance
from lorapro_hf.functional.bases import symmetric_eigh
from lorapro_hf.kernels.dense import dense_update, has_triton
from lorapro_hf.kernels.storage import BLOCK, Moments, dynamic_map, moment_tensors

BETAS, EPS = (0.9, 0.999), 1e-8
RANKS = (1, 2, 3, 8, 16, 32, 64)
PRODUCT_LIMITS = {torch.float64: 1e-12}  # of other storages 1e-5


class Shape(NamedTuple):
    """Weights, rows, columns and rank."""

    count: int
    m: int
    n: int
    r: int


UNEVEN, WIDE, BEYOND, REAL = (
    Shape(3, 70, 270, 3),
    Shape(2, 192, 544, 64),
    Shape(1, 128, 160, 80),
    Shape(2, 4096, 11008, 64),
)


def check_kernels(record: Record) -> None:
    """Check both kernels, and that Triton compiles them where it is there."""
    if record.on_cuda:
        if has_triton():
            record.attempt("compiled kernels", partial(_check_compiled, record))
        else:
            record.not_done("the Triton kernels: triton is not installed, or turned off; torch took their place")
    for rank in RANKS[:4] if record.is_tiny else RANKS:
        record.attempt(f"eigensolver, r={rank}", partial(check_eigh, record, rank))
    uneven = UNEVEN._replace(m=9) if record.is_tiny else UNEVEN
    cases = list(itertools.product((uneven,), (torch.float32, torch.bfloat16, torch.uint8, torch.float64)))
    if not record.is_tiny:
        cases += [(WIDE, torch.float32), (WIDE, torch.bfloat16), (BEYOND, torch.float32)]
    if record.on_cuda:
        cases.append((REAL, torch.float32))
    for (shape, storage), sequential in itertools.product(cases, (False, True)):
        kind = "sequential" if sequential else "linear"
        name = f"dense moments {'x'.join(map(str, shape[:3]))}, r={shape.r}, {str(storage)[6:]}, {kind}"
        record.attempt(name, partial(check_dense, record, name, shape, storage, sequential))


def _check_compiled(record: Record) -> None:
    from triton.runtime.jit import JITFunction

    from lorapro_hf.kernels import triton_eigh, triton_tiles

    for kernel in (triton_tiles.dense_kernel, triton_eigh.jacobi_kernel):
        record.check(f"{kernel.__name__} is interpreted", float(not isinstance(kernel, JITFunction)), 0)


def check_eigh(record: Record, rank: int) -> None:
    """Spread, repeated, nearly equal and absent eigenvalues."""
    place, index = torch.linspace(0, 1, rank, dtype=torch.float64), torch.arange(rank)
    spectra = torch.stack(
        [
            10 ** (-14 * place),
            1 + place,
            1 + 1e-9 * place,
            (index % 2).double() + 1,
            (index < 1).double(),
            (index < rank // 2).double() * (1 + place),
            torch.zeros_like(place),
        ]
    )
    generator = torch.Generator().manual_seed(rank)
    Q = torch.linalg.qr(torch.randn(len(spectra), rank, rank, generator=generator, dtype=torch.float64))[0]
    G = Q @ torch.diag_embed(spectra) @ Q.mT
    G = (G + G.mT) / 2
    values, vectors = (tensor.cpu() for tensor in symmetric_eigh(G.to(record.device)))
    size = torch.linalg.eigvalsh(G)[:, -1].abs().clamp_min(1e-300)
    rebuilt = (vectors * values[:, None]) @ vectors.mT - G
    errors = {
        "eigenvalues": ((values - torch.linalg.eigvalsh(G)).abs().amax(-1) / size).max(),
        "rebuilt matrices": (rebuilt.abs().amax((-2, -1)) / size).max(),
        "orthonormality": (vectors.mT @ vectors - torch.eye(rank, dtype=torch.float64)).abs().max(),
    }
    for name, error in errors.items():
        record.check(f"eigensolver, r={rank}: {name}", float(error), 4e-15 * max(rank, 8))
    spoiled = G.clone()
    spoiled[0, 0, 0] = torch.nan
    values = symmetric_eigh(spoiled.to(record.device))[0].cpu()
    wrong = (~values[0].isnan()).sum() + values[1:].isnan().sum()
    record.check(f"eigensolver, r={rank}: NaN stays in its matrix", float(wrong), 0)


def check_dense(record: Record, name: str, shape: Shape, storage: torch.dtype, sequential: bool) -> None:
    """Two steps from zero, one of some entries only, and one that is skipped."""
    count, m, n, r = shape
    dtype = torch.float64 if storage == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(m)
    moments = Moments(
        **{
            key: torch.zeros(size, dtype=kind, device=record.device)
            for key, (size, kind) in moment_tensors((count, m, n), storage).items()
        }
    )
    limit, products = PRODUCT_LIMITS.get(storage, 1e-5), 0.0
    for t in (1.0, 2.0, 3.0):
        entries = [2, 0] if t == 3.0 and count > 2 else None
        chosen = list(range(count)) if entries is None else entries
        sizes = ((2 * r, m), (2 * r, n), (r, n), (r, m))
        left, right, A, B = (torch.randn(count, *size, generator=generator).to(record.device, dtype) for size in sizes)
        steps = torch.full((count,), t, device=record.device)
        before = _exact(moments)
        options = {"betas": BETAS, "eps": EPS, "sequential": sequential, "entries": entries}
        found = dense_update(moments, left, right, A, B, steps, torch.zeros((), device=record.device), **options)
        M, V, expected = _step(before, left, right, A, B, t)
        for one, other in zip(found, expected, strict=True):
            if one is not None:
                products = max(products, distance(one[chosen], other[chosen]))
        _check_storage(record, f"{name}, step {t:.0f}", moments, M, V, chosen)
        del M, V, expected, before
    record.check(f"{name}: products", products, limit)
    kept = [None if tensor is None else tensor.clone() for tensor in moments]
    left[0, 0, 0] = torch.nan
    dense_update(moments, left, right, A, B, steps, torch.ones((), device=record.device), **options)
    changed = sum(not torch.equal(a, b) for a, b in zip(kept, moments, strict=True) if a is not None and b is not None)
    record.check(f"{name}: moments that a skipped step changes", float(changed), 0)


def _step(before: tuple[Tensor, Tensor], left: Tensor, right: Tensor, A: Tensor, B: Tensor, t: float) -> tuple:
    """Both moments and the three products by the formulas, in float64."""
    g = left.double().mT @ right.double()
    M = BETAS[0] * before[0] + (1 - BETAS[0]) * g
    V = BETAS[1] * before[1] + (1 - BETAS[1]) * g**2
    u = (M / (1 - BETAS[0] ** t)) / ((V / (1 - BETAS[1] ** t)).sqrt() + EPS)
    K = u @ A.double().mT
    return M, V, (K.mT, B.double() @ u, K.mT @ u)


def _exact(moments: Moments) -> tuple[Tensor, Tensor]:
    """The numbers that stored moments stand for, in float64."""
    if moments.exp_avg.dtype != torch.uint8:
        return moments.exp_avg.double().clone(), moments.exp_avg_sq.double().clone()
    M, root = (
        dynamic_map(signed).double().to(codes.device)[codes.long()] * _scales(absmax, codes.shape[-1])
        for codes, absmax, signed in ((moments[0], moments[2], True), (moments[1], moments[3], False))
    )
    return M, root**2


def _scales(absmax: Tensor, n: int) -> Tensor:
    return absmax.double().repeat_interleave(BLOCK, -1)[..., :n]


def _check_storage(record: Record, name: str, moments: Moments, M: Tensor, V: Tensor, chosen: list[int]) -> None:
    """Are the new moments stored by the rule of their storage?"""
    stored_M, stored_V = (each[chosen] for each in _exact(moments))
    M, V = M[chosen], V[chosen]
    if moments.exp_avg.dtype == torch.uint8:
        for values, absmax, signed, which in ((M, moments[2], True, 0), (V.sqrt(), moments[3], False, 1)):
            assert absmax is not None
            relative = values / _scales(absmax[chosen], values.shape[-1])
            codes = dynamic_map(signed).double().to(values.device)
            away = (codes[moments[which][chosen].long()] - relative).abs()
            nearest = (codes - relative[..., None]).abs().amin(-1)
            record.check(f"{name}: distance of codes beyond the nearest", float((away - nearest).max()), 2e-6)
        return
    if moments.exp_avg.dtype == torch.bfloat16:
        for kind, stored, exact, limit in (("first", stored_M, M, 2**-7.9), ("second", stored_V, V, 2**-6.9)):
            away = ((stored - exact).abs() - 1e-5 * exact.abs().max()).clamp_min(0)
            record.check(f"{name}: {kind} moment", float((away / exact.abs().clamp_min(1e-30)).max()), limit)
        record.check(f"{name}: bias of the second moment", float((stored_V.sum() / V.sum() - 1).abs()), 1e-3)
        return
    limit = PRODUCT_LIMITS.get(moments.exp_avg.dtype, 1e-5)
    record.check(f"{name}: moments", max(distance(stored_M, M), distance(stored_V, V)), limit)
