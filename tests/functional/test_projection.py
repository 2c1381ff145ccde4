"""The facts about the projection, against the dense float64 oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids import rest_slow
from lorapro_hf.config import X_MODES
from lorapro_hf.functional import reference
from lorapro_hf.functional.projection import equivalent_gradient, project_lora_gradients

pytestmark = pytest.mark.filterwarnings("error")


def factors(m, n, r, seed, rank_A=None, rank_B=None, dtype=torch.float64):
    """Random A, B of the given ranks (full by default, 0 for a zero factor) and a random full gradient."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, rank):
        rank = min(rows, columns) if rank is None else min(rank, rows, columns)
        left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        return (torch.linalg.qr(left).Q @ torch.linalg.qr(right.T).Q.T if rank else left @ right).to(dtype)

    spread = torch.rand(2, generator=generator, dtype=torch.float64) * 4 + 0.5
    A, B = matrix(r, n, rank_A) * spread[0], matrix(m, r, rank_B) * spread[1]
    g = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return A.to(dtype), B.to(dtype), g.to(dtype)


def project(A, B, g, s, **options):
    return project_lora_gradients(A, B, s * B.mT @ g, s * g @ A.mT, s, **options)


def kron(left, right):
    return torch.einsum("ij,kl->ikjl", left, right).reshape(len(left) * len(right), -1)


shapes = st.fixed_dictionaries(
    {
        "m": st.integers(1, 24),
        "n": st.integers(1, 24),
        "r": st.integers(1, 10),
        "seed": st.integers(0, 2**31),
        "rank_A": st.one_of(st.none(), st.integers(0, 6)),
        "rank_B": st.one_of(st.none(), st.integers(0, 6)),
    }
)
scalings = st.floats(0.05, 20)


@given(shape=shapes, s=scalings, x_mode=st.sampled_from(X_MODES))
def test_matches_dense_formula(shape, s, x_mode):
    A, B, g = factors(**shape)
    h_A, h_B = project(A, B, g, s, x_mode=x_mode)
    ref_A, ref_B = reference.factor_gradients(g, A, B, s, x_mode)
    torch.testing.assert_close(h_A, ref_A, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(h_B, ref_B, rtol=1e-8, atol=1e-8)


@given(shape=shapes, s=scalings)
def test_equivalent_gradient_is_the_projector_formula_for_every_x(shape, s):
    A, B, g = factors(**shape)
    expected = reference.projected_gradient(g, A, B)
    for x_mode in X_MODES:
        found = equivalent_gradient(A, B, *project(A, B, g, s, x_mode=x_mode), s)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@given(shape=shapes, s=scalings)
def test_is_the_least_squares_optimum(shape, s):
    shape = {**shape, "m": min(shape["m"], 8), "n": min(shape["n"], 8), "r": min(shape["r"], 4)}
    A, B, g = factors(**shape)
    m, n = g.shape
    eye_m, eye_n = torch.eye(m, dtype=g.dtype), torch.eye(n, dtype=g.dtype)
    # vec(s (B h_A + h_B A)) is linear in (vec h_A, vec h_B); row-major vec.
    design = s * torch.cat([kron(B, eye_n), kron(eye_m, A.mT)], dim=1)
    solution = torch.linalg.lstsq(design, g.reshape(-1, 1), driver="gelsd", rcond=1e-10).solution
    best = (design @ solution).reshape(m, n)
    found = equivalent_gradient(A, B, *project(A, B, g, s), s)
    torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-7)


@given(shape=shapes, s=scalings)
def test_descends_and_is_a_projection(shape, s):
    A, B, g = factors(**shape)
    found = equivalent_gradient(A, B, *project(A, B, g, s), s)
    torch.testing.assert_close((g * found).sum(), (found * found).sum(), rtol=1e-8, atol=1e-8)
    again = equivalent_gradient(A, B, *project(A, B, found, s), s)
    torch.testing.assert_close(again, found, rtol=1e-8, atol=1e-8)


@given(shape=shapes, s=scalings, seed=st.integers(0, 2**31))
def test_invariant_under_change_of_factors(shape, s, seed):
    A, B, g = factors(**shape)
    r = len(A)
    M = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=g.dtype)).Q
    M = M * torch.linspace(0.5, 2, r, dtype=g.dtype)
    A2, B2 = M @ A, B @ torch.linalg.inv(M)
    one = equivalent_gradient(A, B, *project(A, B, g, s), s)
    two = equivalent_gradient(A2, B2, *project(A2, B2, g, s), s)
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("x_mode", ["sylvester", "symmetric"])
def test_x_minimises_its_objective(x_mode):
    A, B, g = factors(9, 7, 3, seed=3)
    s = 1.7
    grad_A, grad_B = s * B.T @ g, s * g @ A.T

    def objective(h_A, h_B):
        if x_mode == "sylvester":
            return ((h_A - grad_A) ** 2).sum() + ((h_B - grad_B) ** 2).sum()
        return ((B @ h_A - h_B @ A) ** 2).sum()

    h_A, h_B = project(A, B, g, s, x_mode=x_mode)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        Z = 1e-2 * torch.randn(3, 3, generator=generator, dtype=g.dtype)
        assert objective(h_A, h_B) < objective(h_A + Z @ A, h_B - B @ Z)


@pytest.mark.parametrize("x_mode", X_MODES)
def test_zero_B_gives_the_first_step_of_the_paper(x_mode):
    A, B, g = factors(9, 7, 3, seed=4, rank_B=0)
    s = 0.5
    h_A, h_B = project(A, B, g, s, x_mode=x_mode)
    assert torch.equal(h_A, torch.zeros_like(A))
    torch.testing.assert_close(h_B, (s * g @ A.T) @ torch.linalg.inv(A @ A.T) / s**2)


@pytest.mark.parametrize("x_mode", X_MODES)
def test_batches_are_independent(x_mode):
    members = [factors(9, 7, 3, seed=i, rank_B=i % 4) for i in range(6)]
    A, B, g = (torch.stack(tensors).unflatten(0, (2, 3)) for tensors in zip(*members, strict=True))
    s = torch.linspace(0.5, 3, 6, dtype=torch.float64).view(2, 3)
    h_A, h_B = project_lora_gradients(
        A, B, s[..., None, None] * B.mT @ g, s[..., None, None] * g @ A.mT, s, x_mode=x_mode
    )
    for i, (A1, B1, g1) in enumerate(members):
        one_A, one_B = project(A1, B1, g1, s.flatten()[i].item(), x_mode=x_mode)
        torch.testing.assert_close(h_A.flatten(0, 1)[i], one_A)
        torch.testing.assert_close(h_B.flatten(0, 1)[i], one_B)
    total = equivalent_gradient(A, B, h_A, h_B, s)
    assert total.shape == g.shape


@pytest.mark.parametrize("x_mode", X_MODES)
@pytest.mark.parametrize("rank_B", rest_slow([2, None, 0]))
def test_float32_is_close_to_float64(x_mode, rank_B):
    A, B, g = factors(96, 64, 8, seed=5, rank_B=rank_B)
    h_A, h_B = project(A.float(), B.float(), g.float(), 2.0, x_mode=x_mode)
    assert h_A.dtype == h_B.dtype == torch.float32
    for found, expected in zip((h_A, h_B), reference.factor_gradients(g, A, B, 2.0, x_mode), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_float32_stays_accurate_when_ill_conditioned():
    A, B, g = factors(96, 64, 8, seed=6)
    B = B * torch.logspace(0, -2.5, 8, dtype=torch.float64)
    expected = reference.projected_gradient(g, A, B.float().double())
    found = equivalent_gradient(A.float(), B.float(), *project(A.float(), B.float(), g.float(), 2.0), 2.0)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_scale_of_the_factors_does_not_matter():
    A, B, g = factors(9, 7, 3, seed=7, dtype=torch.float32)
    tiny_A, tiny_B = A * 1e-18, B * 1e-18
    found = equivalent_gradient(tiny_A, tiny_B, *project(tiny_A, tiny_B, g, 1.0), 1.0)
    torch.testing.assert_close(found.double(), reference.projected_gradient(g, A, B), rtol=1e-4, atol=1e-4)


def test_directions_whose_inverse_overflows_count_as_absent():
    A, B, g = factors(9, 7, 3, seed=8, dtype=torch.float32)
    h_A, h_B = project(A, B * 1e-41, g, 1.0)
    assert not h_A.any()
    torch.testing.assert_close(h_B, project(A, torch.zeros_like(B), g, 1.0)[1])


def test_bfloat16_computes_in_float32_and_casts_back():
    A, B, g = factors(16, 12, 4, seed=8, dtype=torch.bfloat16)
    grad_A, grad_B = 2 * B.T @ g, 2 * g @ A.T
    h_A, h_B = project_lora_gradients(A, B, grad_A, grad_B, 2.0)
    wide_A, wide_B = project_lora_gradients(A.float(), B.float(), grad_A.float(), grad_B.float(), 2.0)
    assert h_A.dtype == h_B.dtype == torch.bfloat16
    assert torch.equal(h_A, wide_A.bfloat16()) and torch.equal(h_B, wide_B.bfloat16())


def test_autocast_does_not_lower_the_precision():
    A, B, g = factors(16, 12, 4, seed=9, dtype=torch.float32)
    outside = project(A, B, g, 2.0)
    grad_A, grad_B = 2.0 * B.T @ g, 2.0 * g @ A.T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = project_lora_gradients(A, B, grad_A, grad_B, 2.0)
    assert all(torch.equal(one, two) for one, two in zip(outside, inside, strict=True))


def test_rtol_drops_weak_directions():
    A, B, g = factors(9, 7, 3, seed=10)
    U, S, Vh = torch.linalg.svd(B, full_matrices=False)
    weak = torch.tensor([1.0, 1.0, 1e-2], dtype=g.dtype)
    found = equivalent_gradient(A, (U * weak) @ Vh, *project(A, (U * weak) @ Vh, g, 1.0, rtol=1e-3), 1.0)
    kept = reference.projected_gradient(g, A, (U * weak * (weak > 0.1)) @ Vh)
    torch.testing.assert_close(found, kept)


def test_no_tensor_larger_than_the_factors_is_made():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    A, B, g = factors(200, 150, 4, seed=11, dtype=torch.float32)
    grad_A, grad_B = 2 * B.T @ g, 2 * g @ A.T
    with Record():
        project_lora_gradients(A, B, grad_A, grad_B, 2.0)
    assert max(sizes) == 200 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_mode": "simetric"}, "valid values are 'sylvester', 'zero', 'symmetric'"),
        ({"scaling": 0.0}, "scaling is 0"),
        ({"B": torch.ones(4, 2)}, "no factor pair"),
        ({"grad_A": torch.ones(3, 4)}, "must be shaped like A"),
        ({"scaling": torch.ones(2)}, r"scaling \(2,\) must have the batch dimensions of the factors, \(\)"),
        ({"A": torch.full((3, 5), float("nan"))}, "the factor A holds NaN or Inf"),
    ],
)
def test_bad_input(change, message):
    inputs = {"A": torch.ones(3, 5), "B": torch.ones(4, 3), "grad_A": torch.ones(3, 5), "grad_B": torch.ones(4, 3)}
    inputs = {**inputs, "scaling": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        project_lora_gradients(**inputs)
