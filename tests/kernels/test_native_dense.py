"""The C++ kernel of dense moments: every rank and storage, the same bits in any order of work, and torch without it."""

import logging

import pytest
import torch

from dense_moments import (
    BETAS,
    EPS,
    TOLERANCE,
    assert_near,
    assert_same_moments,
    copied,
    dense_step,
    exact,
    inputs,
    new_moments,
    random_moments,
)
from lorapro_hf.kernels import native
from lorapro_hf.kernels.dense import dense_update
from lorapro_hf.kernels.storage import dynamic_thresholds, tables_on

STORAGES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8]


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    if native.native_kernels() is None:
        pytest.skip("there is no C++ compiler")


def update(moments, operands, steps, backend="auto", **options):
    options = {"betas": BETAS, "eps": EPS, "sequential": True} | options
    return dense_update(moments, *operands, steps, torch.tensor(0.0), **options, backend=backend)


# (K, m, n, r): tiles, row blocks and spans that are not full; one row, one column.
SHAPES = [(1, 150, 300, 8), (2, 21, 256, 24), (1, 3, 5, 3), (1, 1, 600, 64), (1, 70, 1, 1), (1, 700, 1000, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_equals_the_dense_formulas(dtype, shape):
    *of_moments, r = shape
    moments = random_moments(of_moments, dtype)
    M, V = exact(moments)
    for step in (1.0, 2.0, 3.0):
        steps, operands = torch.full(shape[:1], step), inputs(*shape, dtype)
        M, V, expected = dense_step(M, V, *operands, steps)
        found = update(moments, operands, steps, sequential=r != 8)
        for one, two in zip((moments.exp_avg, moments.exp_avg_sq, *found), (M, V, *expected), strict=True):
            assert one is None or assert_near(one, two, TOLERANCE[dtype]) is None


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_stores_the_moments_that_torch_stores(storage):
    """But for single elements beside a border, which another rounding of the gradient takes across."""
    ours, dtype = random_moments((2, 37, 600), storage), torch.float64 if storage == torch.float64 else torch.float32
    torchs = copied(ours)
    operands, steps = inputs(2, 37, 600, 4, dtype), torch.tensor([1.0, 5.0])
    found, expected = update(ours, operands, steps), update(torchs, operands, steps, "torch")
    for one, two in zip(found, expected, strict=True):
        assert_near(one, two.double(), TOLERANCE[dtype])
    for one, two in zip(ours, torchs, strict=True):
        if one is not None and one.dtype.itemsize < 4:
            # The dither depends on the last bit.
            assert (one == two).float().mean() > (0.8 if storage == torch.bfloat16 else 0.999)
            whole_numbers = torch.int16 if one.dtype == torch.bfloat16 else torch.uint8
            assert (one.view(whole_numbers).int() - two.view(whole_numbers).int()).abs().max() <= 1
        elif one is not None:
            torch.testing.assert_close(one, two)


def stored(rows, storage, backend, betas=(0.0, 0.0)):
    """The moments after a step whose gradients are exactly the rows."""
    m, n = rows.shape
    left = torch.cat([torch.eye(m), torch.zeros(m, m)])[None]
    right = torch.cat([rows, torch.zeros(m, n)])[None]
    moments = new_moments((1, m, n), storage)
    others = torch.ones(1, m, n), torch.ones(1, m, m)
    update(moments, (left, right, *others), torch.tensor([3.0]), backend, betas=betas)
    return moments


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_exactly_those_of_torch_and_of_a_search(signed):
    """Borders themselves, the numbers beside them, zeros, and a block of zeros."""
    borders = dynamic_thresholds(signed)[1:-1]
    values = torch.cat([torch.nextafter(borders, torch.tensor(x)) for x in (-2.0, 2.0)] + [borders, torch.zeros(2)])
    values = torch.cat([values, 10 ** (-9 * torch.rand(300)) * torch.randn(300).sign()])
    rows = torch.ones(len(values) // 255 + 1, 256)  # a 1 in each block makes the scale 1
    rows[:, 1:] = torch.nn.functional.pad(values, (0, 255 - len(values) % 255)).view(-1, 255)
    rows = torch.cat([torch.cat([rows, 3 * rows[:, :44]], 1), torch.zeros(1, 300)])
    ours, torchs = stored(rows, torch.uint8, "auto"), stored(rows, torch.uint8, "torch")
    assert_same_moments(ours, torchs)
    number = rows if signed else rows.square().sqrt()
    largest = torch.stack([block.abs().amax(1) for block in number.split(256, 1)], 1)
    codes, scales = (ours.exp_avg, ours.exp_avg_absmax) if signed else (ours.exp_avg_sq, ours.exp_avg_sq_absmax)
    assert torch.equal(scales[0], largest)
    scaled = number / largest.clamp(min=1e-30).repeat_interleave(256, 1)[:, :300]
    assert torch.equal(codes[0].long(), torch.bucketize(scaled, borders.contiguous()))


def test_equal_moments_become_equal_bfloat16_numbers():
    rows = torch.cat([torch.randn(5, 700), torch.zeros(5, 9), torch.tensor([[1 + 2.0**-8, 1e-30, 3e38]] * 5)], 1)
    assert_same_moments(stored(rows, torch.bfloat16, "auto"), stored(rows, torch.bfloat16, "torch"))


def test_the_root_of_the_second_moment_is_not_rounded_to_zero():
    moments = stored(torch.tensor([[1.0, 1e-12, 0.0]]), torch.uint8, "auto")
    assert moments.exp_avg_sq[0, 0].tolist() == [255, 1, 0]
    assert (tables_on(torch.device("cpu"))[2] == 0).nonzero().item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_number_that_is_not_finite_spoils_its_block_alone(value, backend):
    rows = torch.ones(2, 300)
    rows[1, 3] = value
    left = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None]
    moments = new_moments((1, 2, 300), torch.uint8)
    operands = left, torch.stack([rows[1], rows[0]])[None], torch.ones(1, 1, 300), torch.ones(1, 1, 2)
    update(moments, operands, torch.tensor([1.0]), backend)
    for scales in moments[2:]:
        assert scales[0, 0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("sequential", [True, False])
def test_threads_and_company_do_not_change_a_bit(storage, sequential, monkeypatch):
    """One thread or several, entries together, alone, or in batches: as after a resume on another machine."""
    shape, dtype = (3, 600, 1100), torch.float64 if storage == torch.float64 else torch.float32
    start, steps = random_moments(shape, storage), torch.tensor([4.0, 1.0, 7.0])
    operands = inputs(*shape, 3, dtype)

    def run(threads, calls):
        moments, products = copied(start), []
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        for entries in calls:
            products.append(update(moments, operands, steps, sequential=sequential, entries=entries))
        return moments, [sum(x) if x[0] is not None else None for x in zip(*products, strict=True)]

    expected = run(1, [None])
    for threads, calls in ((2, [None]), (3, [[0, 2], [1]]), (1, [[2], [1], [0]])):
        moments, products = run(threads, calls)
        assert_same_moments(moments, expected[0])
        assert_same_moments(products, expected[1])


def test_eps_of_zero_is_right_beside_the_last_column():
    moments, operands, steps = random_moments((1, 5, 7), torch.float64), inputs(1, 5, 7, 2), torch.ones(1)
    torchs = copied(moments)
    for one, two in zip(
        update(moments, operands, steps, eps=0.0), update(torchs, operands, steps, "torch", eps=0.0), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_without_a_compiler_torch_takes_the_step(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels = native.cache(native.native_kernels.__wrapped__)
    monkeypatch.setattr(native, "native_kernels", kernels)
    operands, steps = inputs(2, 9, 30, 2, torch.float32), torch.ones(2)
    moments, torchs = new_moments((2, 9, 30), torch.uint8), new_moments((2, 9, 30), torch.uint8)
    with caplog.at_level(logging.WARNING):
        found = [update(moments, operands, steps) for _ in range(2)][-1]
    expected = [update(torchs, operands, steps, "torch") for _ in range(2)][-1]
    assert_same_moments(moments, torchs)
    assert_same_moments(found, expected)
    assert len(caplog.records) == 1
    assert "/bin/false failed" in caplog.text
