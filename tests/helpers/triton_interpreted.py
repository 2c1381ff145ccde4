"""The Triton kernels against independent oracles; `test_triton.py` runs this file under Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the CUDA kernels need Triton, which only CUDA builds of torch bring along")

from lorapro_hf.kernels.storage import dynamic_map
from lorapro_hf.kernels.triton_dense import dense_update
from lorapro_hf.kernels.triton_eigh import MAX_RANK, symmetric_eigh

BETAS, EPS = (0.9, 0.999), 1e-8


class Moments(NamedTuple):
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None

    def clone(self) -> Moments:
        return Moments(*(None if tensor is None else tensor.clone() for tensor in self))


class Factors(NamedTuple):
    left: Tensor
    right: Tensor
    A: Tensor
    Bt: Tensor


def new_factors(count: int, m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> Factors:
    sizes = ((2 * r, m), (2 * r, n), (r, n), (r, m))
    return Factors(*(torch.randn(count, *size, dtype=dtype) for size in sizes))


def exact_factors(count: int, m: int, n: int, r: int) -> Factors:
    """Small integers, whose gradient has no rounding in any order of summation."""
    return Factors(*(torch.randint(-4, 5, factor.shape).float() for factor in new_factors(count, m, n, r)))


def new_moments(count: int, m: int, n: int, dtype: torch.dtype) -> Moments:
    if dtype == torch.uint8:
        codes = torch.zeros(2, count, m, n, dtype=dtype)
        scales = torch.zeros(2, count, m, -(-n // 256))
        return Moments(codes[0], codes[1], scales[0], scales[1])
    return Moments(*torch.zeros(2, count, m, n, dtype=dtype))


def update(moments: Moments, factors: Factors, steps: Tensor, found_inf: float = 0, **options) -> tuple:
    return dense_update(moments, *factors, steps, torch.tensor(found_inf), betas=BETAS, eps=EPS, **options)


def oracle_direction(M: Tensor, V: Tensor, factors: Factors, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New moments in the dtype of M and V, and the float64 Adam direction, all dense."""
    g = factors.left.mT.to(M) @ factors.right.to(M)
    M = BETAS[0] * M + (1 - BETAS[0]) * g
    V = BETAS[1] * V + (1 - BETAS[1]) * (g * g)
    t = steps.double()[:, None, None]
    u = (M / (1 - BETAS[0] ** t)) / (torch.sqrt(V / (1 - BETAS[1] ** t)) + EPS)
    return M, V, u


def oracle_sums(u: Tensor, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    u, A, Bt = u.double(), factors.A.double(), factors.Bt.double()
    K = u @ A.mT
    return K.mT, Bt @ u, K.mT @ u


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = torch.linalg.vector_norm(found.double() - expected) / torch.linalg.vector_norm(expected)
    assert error <= tolerance


# Shapes below, at and above the tiles of 64 x 32, and of 16 x 256 for 8-bit codes; ranks below and above the blocks.
SHAPES = [(1, 3, 5, 1), (2, 64, 32, 8), (2, 71, 45, 8), (1, 40, 50, 20), (1, 70, 40, 64)]


@pytest.mark.parametrize(("count", "m", "n", "r"), SHAPES)
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_several_steps_follow_the_dense_formula(
    count: int, m: int, n: int, r: int, sequential: bool, dtype: torch.dtype, tolerance: float
) -> None:
    moments = new_moments(count, m, n, dtype)
    M, V = moments.exp_avg.double().clone(), moments.exp_avg_sq.double().clone()
    for t in range(1, 3):
        factors, steps = new_factors(count, m, n, r, dtype), torch.full((count,), float(t))
        uAt, Bu, Ku = update(moments, factors, steps, sequential=sequential)
        M, V, u = oracle_direction(M, V, factors, steps)
        expected = oracle_sums(u, factors)
        assert_near(moments.exp_avg, M, tolerance)
        assert_near(moments.exp_avg_sq, V, tolerance)
        assert_near(uAt, expected[0], tolerance)
        assert_near(Bu, expected[1], tolerance)
        if sequential:
            assert_near(Ku, expected[2], tolerance)
        else:
            assert Ku is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("sequential", [False, True])
def test_many_rectangles_add_up_and_repeat_their_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sequential: bool
) -> None:
    monkeypatch.setattr("lorapro_hf.kernels.triton_dense.PROGRAMS", 4)
    count, m, n, r = 1, 70, 270, 2
    factors, steps = new_factors(count, m, n, r), torch.ones(count)
    _, _, u = oracle_direction(*torch.zeros(2, count, m, n, dtype=torch.float64), factors, steps)
    first, again = (update(new_moments(count, m, n, dtype), factors, steps, sequential=sequential) for _ in range(2))
    for found, repeated, expected in zip(first, again, oracle_sums(u, factors), strict=True):
        if found is not None:
            assert_near(found, expected, 1e-5)
            assert torch.equal(found, repeated)


def test_entries_count_their_own_steps() -> None:
    factors, steps = new_factors(3, 9, 11, 2), torch.tensor([1.0, 7.0, 1000.0])
    moments = new_moments(3, 9, 11, torch.float32)
    uAt, Bu, _ = update(moments, factors, steps)
    _, _, u = oracle_direction(*torch.zeros(2, 3, 9, 11, dtype=torch.float64), factors, steps)
    for found, expected in zip((uAt, Bu), oracle_sums(u, factors), strict=False):
        for entry in range(3):
            assert_near(found[entry], expected[entry], 1e-5)


def emulated_bfloat16(M: Tensor, V: Tensor, t: int) -> tuple[Tensor, Tensor]:
    bits = V.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    h = ((bits + t * 0x9E3779B1) * 0x85EBCA6B) & 0xFFFFFFFF
    h ^= h >> 13
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    kept = ((bits + ((h >> 16) & 0xFFFF)) >> 16) & 0xFFFF
    return M.bfloat16(), (kept << 16).to(torch.int32).view(torch.float32).bfloat16()


def emulated_codes(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of every block, by search among the float32 middles of the map (ties to the lower)."""
    entries = dynamic_map(signed)
    middles = (entries[1:] + entries[:-1]) / 2
    if not signed:
        middles[0] = 0  # no root is rounded to 0
    codes, scales = torch.empty_like(x, dtype=torch.uint8), []
    for block in range(0, x.shape[-1], 256):
        part = x[..., block : block + 256]
        scale = part.abs().amax(-1, keepdim=True)
        scaled = torch.where(scale > 0, part / scale, 0)
        codes[..., block : block + 256] = torch.bucketize(scaled, middles).to(torch.uint8)
        scales.append(scale)
    return codes, torch.cat(scales, -1)


def decoded(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    return dynamic_map(signed)[codes.long()] * scales.repeat_interleave(256, -1)[..., : codes.shape[-1]]


@pytest.mark.parametrize("sequential", [False, True])
def test_bfloat16_moments_are_stored_by_the_rule(sequential: bool) -> None:
    count, m, n, r = 2, 66, 37, 3
    moments = new_moments(count, m, n, torch.bfloat16)
    rounded_up = 0
    for t in range(1, 4):
        factors, steps = exact_factors(count, m, n, r), torch.full((count,), float(t))
        M, V, u = oracle_direction(moments.exp_avg.float(), moments.exp_avg_sq.float(), factors, steps)
        found = update(moments, factors, steps, sequential=sequential)
        expected = emulated_bfloat16(M, V, t)
        assert torch.equal(moments.exp_avg, expected[0])
        assert torch.equal(moments.exp_avg_sq, expected[1])
        rounded_up += int((moments.exp_avg_sq.float() > V).sum())
        for sum_found, sum_expected in zip(found, oracle_sums(u, factors), strict=True):
            if sum_found is not None:
                assert_near(sum_found, sum_expected, 1e-5)
    assert 0.3 < rounded_up / (3 * V.numel()) < 0.7


@pytest.mark.parametrize("sequential", [False, True])
def test_8_bit_moments_are_stored_by_the_rule(sequential: bool) -> None:
    count, m, n, r = 1, 19, 300, 3
    moments = new_moments(count, m, n, torch.uint8)
    for t in range(1, 4):
        factors, steps = exact_factors(count, m, n, r), torch.full((count,), float(t))
        M = decoded(moments.exp_avg, moments.exp_avg_absmax, True)
        root = decoded(moments.exp_avg_sq, moments.exp_avg_sq_absmax, False)
        M, V, u = oracle_direction(M, root * root, factors, steps)
        found = update(moments, factors, steps, sequential=sequential)
        codes, scales = emulated_codes(M, True)
        assert torch.equal(moments.exp_avg_absmax, scales)
        assert torch.equal(moments.exp_avg, codes)
        # In float64, since torch's vectorised float32 root is not always the nearest number.
        codes, scales = emulated_codes(torch.sqrt(V.double()).float(), False)
        assert torch.equal(moments.exp_avg_sq_absmax, scales)
        assert torch.equal(moments.exp_avg_sq, codes)
        for sum_found, sum_expected in zip(found, oracle_sums(u, factors), strict=True):
            if sum_found is not None:
                assert_near(sum_found, sum_expected, 1e-5)


def test_every_number_finds_its_nearest_code() -> None:
    """Through a kernel of ours: first moments of a rank-1 gradient can be any row of numbers times one number."""
    for signed in (True, False):
        entries = dynamic_map(signed)
        middles = (entries[1:] + entries[:-1]) / 2
        near = torch.cat([torch.nextafter(middles, torch.tensor(bound)) for bound in (-2.0, 2.0)])
        numbers = torch.cat([entries, near, torch.rand(255), torch.logspace(-9, 0, 255)])
        # A 1 in each block fixes its scale at 1.
        rows = torch.cat([torch.ones(-(-len(numbers) // 255), 1), torch.zeros(-(-len(numbers) // 255), 255)], dim=1)
        rows[:, 1:] = torch.cat([numbers, torch.zeros(rows[:, 1:].numel() - len(numbers))]).view_as(rows[:, 1:])
        m = len(rows)
        moments = new_moments(1, m, 256, torch.uint8)
        left = torch.cat([torch.eye(m), torch.zeros(m, m)])[None]
        right = torch.cat([rows, torch.zeros(m, 256)])[None]
        factors = Factors(left, right, torch.zeros(1, m, 256), torch.zeros(1, m, m))
        options = {"betas": (0.0, 0.0), "eps": EPS}
        dense_update(moments, *factors, torch.ones(1), torch.zeros(()), **options)
        values = rows if signed else torch.sqrt((rows * rows).double()).float()
        codes = moments.exp_avg if signed else moments.exp_avg_sq
        assert torch.equal(codes[0], emulated_codes(values, signed)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("case", ["found_inf", "entries", "nobody"])
def test_what_takes_no_part_stays_as_it_is(dtype: torch.dtype, sequential: bool, case: str) -> None:
    count, m, n, r = 3, 20, 40, 20
    moments = new_moments(count, m, n, dtype)
    update(moments, new_factors(count, m, n, r), torch.ones(count))
    before, whole = moments.clone(), moments.clone()
    factors, steps = new_factors(count, m, n, r), torch.full((count,), 2.0)
    entries = {"found_inf": None, "entries": [2, 0], "nobody": []}[case]
    if case == "found_inf":
        factors.left[0, 0, 0] = torch.nan
    found = update(moments, factors, steps, float(case == "found_inf"), sequential=sequential, entries=entries)
    all_found = update(whole, factors, steps, sequential=sequential)
    taking_part = entries or []
    for entry, (old, new, everybody) in itertools.product(range(count), zip(before, moments, whole, strict=True)):
        if old is not None:
            assert torch.equal(new[entry], (everybody if entry in taking_part else old)[entry])
    for part, everybody in zip(found, all_found, strict=True):
        assert (part is None) == (not sequential and everybody is None)
        for entry in range(count if part is not None else 0):
            expected = everybody[entry] if entry in taking_part else torch.zeros_like(everybody[entry])
            assert torch.equal(part[entry], expected)


def test_a_nan_gradient_does_not_vanish_into_codes() -> None:
    moments, factors = new_moments(1, 4, 300, torch.uint8), new_factors(1, 4, 300, 2)
    factors.left[0, 0, 1] = torch.nan
    update(moments, factors, torch.ones(1))
    assert torch.equal(moments.exp_avg_absmax.isnan()[0].all(-1), torch.tensor([False, True, False, False]))


@pytest.mark.parametrize(
    ("dtypes", "fitting"),
    [
        ((torch.float16, torch.float16), False),
        ((torch.float32, torch.bfloat16), False),
        ((torch.float32, torch.float32), True),
    ],
)
def test_moments_that_do_not_fit_are_named(dtypes: tuple[torch.dtype, torch.dtype], fitting: bool) -> None:
    moments = Moments(*(torch.zeros(1, 4, 5, dtype=dtype) for dtype in dtypes))
    message = "do not go with"
    if fitting:
        moments, message = moments._replace(exp_avg=torch.zeros(1, 5, 4).mT), "contiguous"
    with pytest.raises(ValueError, match=message):
        update(moments, new_factors(1, 4, 5, 1), torch.ones(1))


def spectra(r: int) -> Tensor:
    """Eigenvalues `(K, r)` that make trouble: spread, repeated, nearly equal, zero."""
    place = torch.linspace(0, 1, r, dtype=torch.float64)
    return torch.stack(
        [
            10 ** (-14 * place),
            1 + place,
            1 + 1e-9 * place,
            (torch.arange(r) % 2).double() + 1,
            (torch.arange(r) < 1).double(),
            (torch.arange(r) < r // 2).double() * (1 + place),
            torch.zeros(r, dtype=torch.float64),
        ]
    )


@pytest.mark.parametrize("r", [1, 2, 3, 8, 16])
def test_eigenpairs_rebuild_the_matrices(r: int) -> None:
    expected = spectra(r)[: None if r <= 3 else 3 if r == 16 else 5]
    Q = torch.linalg.qr(torch.randn(len(expected), r, r, dtype=torch.float64))[0]
    check_eigenpairs(Q @ torch.diag_embed(expected) @ Q.mT)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_eigenpairs_of_any_scale(scale: float) -> None:
    rows = torch.randn(1, 5, 9, dtype=torch.float64)
    check_eigenpairs(rows @ rows.mT * scale)


def check_eigenpairs(G: Tensor) -> None:
    G = (G + G.mT) / 2
    r = G.shape[-1]
    values, vectors = symmetric_eigh(G)
    expected = torch.linalg.eigvalsh(G)
    size = expected[:, -1:].abs()
    assert (values.diff(dim=-1) >= 0).all()
    assert ((values - expected).abs() <= 2e-15 * r * size).all()
    assert ((vectors * values[:, None] @ vectors.mT - G).abs() <= 2e-15 * r * size[..., None]).all()
    assert torch.allclose(vectors.mT @ vectors, torch.eye(r, dtype=torch.float64).expand_as(G), rtol=0, atol=2e-14)


@pytest.mark.parametrize("spoiler", [torch.nan, torch.inf])
def test_a_spoiled_matrix_gets_nan_and_spoils_no_other(spoiler: float) -> None:
    G = torch.eye(3).repeat(2, 1, 1) * torch.tensor([3.0, 1.0, 2.0])
    G[0, 1, 1] = spoiler
    values, vectors = symmetric_eigh(G)
    assert values.dtype == vectors.dtype == torch.float32
    assert values[0].isnan().all() and vectors[0].isnan().all()
    assert torch.equal(values[1], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(vectors[1].abs(), torch.eye(3)[:, [1, 2, 0]])


def test_too_large_a_rank_is_named() -> None:
    with pytest.raises(ValueError, match=r"torch\.linalg\.eigh"):
        symmetric_eigh(torch.eye(MAX_RANK + 1)[None])
