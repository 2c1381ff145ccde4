"""One step of dense moments against plain float64, in every storage, tiling and backend that runs on a CPU."""

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
    map_of,
    new_moments,
    random_moments,
    scales_of,
)
from grids import rest_slow
from lorapro_hf.kernels import dense, native
from lorapro_hf.kernels.dense import choose_backend, dense_update

STORAGES = [torch.float32, torch.bfloat16, torch.uint8]
BACKENDS = pytest.mark.parametrize("backend", ["torch", "auto"])
# (K, m, n, r), among them sizes of 1, rows of several 8-bit blocks and a last block that is not full.
SHAPES = [(3, 20, 33, 4), (2, 13, 600, 2), (2, 1, 7, 1), (2, 7, 1, 1), (1, 1, 1, 1)]
FEW_SHAPES = [*SHAPES[:2], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[2:])]


@pytest.fixture(autouse=True)
def _needs_the_kernels(request):
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("backend") == "auto" and native.native_kernels() is None:
        pytest.skip("there is no C++ compiler")


def update(moments, operands, steps, found_inf=0.0, backend="torch", sequential=True, entries=None, betas=BETAS):
    options = {"betas": betas, "eps": EPS, "sequential": sequential, "entries": entries, "backend": backend}
    return dense_update(moments, *operands, steps, torch.tensor(found_inf), **options)


@BACKENDS
@pytest.mark.parametrize("dtype", rest_slow([torch.float32, torch.float64]))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sequential", rest_slow([True, False]))
def test_four_steps_equal_the_dense_formulas(backend, dtype, shape, sequential):
    K, m, n, r = shape
    moments = random_moments((K, m, n), dtype)
    M, V = exact(moments)
    steps = torch.tensor([0.0, 6.0, 2.0][:K])  # the entries are not equally far
    for _ in range(4):
        steps += 1
        operands = inputs(*shape, dtype)
        M, V, expected = dense_step(M, V, *operands, steps)
        found = update(moments, operands, steps, backend=backend, sequential=sequential)
        assert_near(moments.exp_avg, M, TOLERANCE[dtype])
        assert_near(moments.exp_avg_sq, V, TOLERANCE[dtype])
        assert_near(found.u_A, expected[0], TOLERANCE[dtype])
        assert_near(found.B_u, expected[1], TOLERANCE[dtype])
        if sequential:
            assert_near(found.K_u, expected[2], TOLERANCE[dtype])
        else:
            assert found.K_u is None


def bf16_neighbours(values):
    """The next bfloat16 numbers below and above positive values."""
    bits = values.float().view(torch.int32)
    return ((bits & ~0xFFFF).view(torch.float32), ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32))


@BACKENDS
@pytest.mark.parametrize("shape", FEW_SHAPES)
def test_bfloat16_moments_are_rounded_once(backend, shape):
    """M to the nearest and V to either neighbour of what float64 makes of the stored moments before."""
    K, m, n, _ = shape
    moments, steps = random_moments((K, m, n), torch.bfloat16), torch.tensor([0.0, 6.0, 2.0][:K])
    for _ in range(3):
        steps += 1
        operands = inputs(*shape, torch.float32)
        M, V, expected = dense_step(*exact(moments), *operands, steps)
        found = update(moments, operands, steps, backend=backend)
        slack = 1e-5 * M.abs().max()
        assert ((M - slack).bfloat16() <= moments.exp_avg).all() and (moments.exp_avg <= (M + slack).bfloat16()).all()
        lowest, highest = bf16_neighbours(V * (1 - 1e-5))[0], bf16_neighbours(V * (1 + 1e-5))[1]
        assert (lowest <= moments.exp_avg_sq).all() and (moments.exp_avg_sq <= highest).all()
        for one, two in zip(found, expected, strict=True):
            assert_near(one, two, 1e-5)


def test_bfloat16_second_moments_are_rounded_without_bias():
    shape = (2, 200, 300, 2)
    moments, steps = random_moments(shape[:3], torch.bfloat16), torch.tensor([3.0, 4.0])
    operands = inputs(*shape)
    _, V, _ = dense_step(*exact(moments), *operands, steps)
    update(moments, operands, steps)
    below, above = (x.double() for x in bf16_neighbours(V))
    between = above > below
    assert torch.equal(moments.exp_avg_sq.double()[~between], below[~between])
    fraction = ((V - below) / (above - below))[between]
    up = ((moments.exp_avg_sq.double() - below) / (above - below))[between]
    assert ((up == 0) | (up == 1)).all()
    # 120000 elements: the mean of so many coins has a standard deviation of 0.0012.
    assert abs((up - fraction).mean()) < 0.006
    for low in (0.0, 0.25, 0.5, 0.75):  # the chance of the upper neighbour is the distance from the lower one
        chosen = (fraction >= low) & (fraction < low + 0.25)
        assert chosen.sum() > 20_000 and abs((up - fraction)[chosen].mean()) < 0.015


@BACKENDS
def test_bfloat16_second_moments_fade_without_gradients(backend):
    """Rounded to nearest, each would keep its value for ever: beta2 takes away less than half a unit of it."""
    moments = random_moments((1, 30, 40), torch.bfloat16)
    before = moments.exp_avg_sq.double()
    operands = [torch.zeros_like(x) for x in inputs(1, 30, 40, 2, torch.float32)]
    for step in range(200):
        update(moments, operands, torch.tensor([step + 1.0]), backend=backend, betas=(0.9, 0.999))
    assert (moments.exp_avg_sq.double() / before).mean().item() == pytest.approx(0.999**200, rel=0.01)
    assert moments.exp_avg.abs().max() < 1e-6


def assert_nearest(codes, absmax, values, signed):
    """Codes and scales are those of `values`, a block of 256 columns at a time."""
    n = values.shape[-1]
    blocks = [block.abs().amax(-1) for block in values.split(256, dim=-1)]
    torch.testing.assert_close(absmax.double(), torch.stack(blocks, -1), rtol=1e-5, atol=0)
    relative = values / scales_of(torch.stack(blocks, -1), n)
    entries = map_of(signed)
    away = (entries[codes.long()] - relative).abs()
    nearest = (entries - relative[..., None]).abs().amin(-1)
    assert (away <= nearest + 1e-6).all()


@BACKENDS
@pytest.mark.parametrize("storage", [torch.uint8])
@pytest.mark.parametrize("shape", FEW_SHAPES)
def test_8_bit_moments_are_the_nearest_codes(backend, storage, shape):
    K, m, n, _ = shape
    moments, steps = random_moments((K, m, n), storage), torch.tensor([0.0, 6.0, 2.0][:K])
    for _ in range(3):
        steps += 1
        operands = inputs(*shape, torch.float32)
        M, V, expected = dense_step(*exact(moments), *operands, steps)
        found = update(moments, operands, steps, backend=backend)
        assert_nearest(moments.exp_avg, moments.exp_avg_absmax, M, signed=True)
        assert_nearest(moments.exp_avg_sq, moments.exp_avg_sq_absmax, V.sqrt(), signed=False)
        for one, two in zip(found, expected, strict=True):
            assert_near(one, two, 1e-5)


@pytest.mark.parametrize("storage", [torch.uint8])
def test_elements_without_gradients_do_not_move_in_8_bits(storage):
    left, right, A, B = inputs(2, 9, 300, 2, torch.float32)
    right[..., 7] = 0
    A, moments = torch.eye(300)[[7, 7]].expand(2, 2, 300).contiguous(), new_moments((2, 9, 300), storage)
    for step in (1.0, 2.0, 3.0):
        assert not update(moments, (left, right, A, B), torch.full((2,), step)).u_A.any()


@BACKENDS
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("elements", [2**19, 100])
def test_a_skipped_step_changes_nothing_whatever_the_gradients_hold(backend, storage, elements, monkeypatch):
    monkeypatch.setattr(dense, "_CPU_ELEMENTS", elements)
    moments = random_moments((3, 9, 300), storage)
    before = copied(moments)
    left, right, A, B = inputs(3, 9, 300, 2, torch.float32)
    left[0], right[1] = float("nan"), float("inf")
    for _ in range(2):
        found = update(moments, (left, right, A, B), torch.tensor([1.0, 2.0, 3.0]), found_inf=1.0, backend=backend)
        assert_same_moments(moments, before)
        assert not any(product.any() for product in found)
    update(moments, inputs(3, 9, 300, 2, torch.float32), torch.tensor([1.0, 2.0, 3.0]), backend=backend)
    assert not torch.equal(moments.exp_avg, before.exp_avg)


@BACKENDS
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("entries", rest_slow([[1, 2, 4], [3], [0, 4]]))
@pytest.mark.parametrize("elements", [2**19, 100])
def test_entries_that_take_no_part_stay_as_they_are(backend, storage, entries, elements, monkeypatch):
    monkeypatch.setattr(dense, "_CPU_ELEMENTS", elements)
    moments, steps = random_moments((5, 9, 30), storage), torch.tensor([4.0, 1.0, 7.0, 2.0, 3.0])
    before, operands = copied(moments), inputs(5, 9, 30, 2)
    others = [entry for entry in range(5) if entry not in entries]
    for x in operands:
        x[others] = float("nan")
    alone = copied([None if x is None else x[entries] for x in moments])
    found = update(moments, operands, steps, backend=backend, entries=entries)
    expected = dense_step(*exact(alone), *(x[entries] for x in operands), steps[entries])[2]
    together = update(alone, [x[entries] for x in operands], steps[entries], backend=backend)
    for kept, old, of_alone in zip(moments, before, alone, strict=True):
        if kept is not None:
            assert torch.equal(kept[others], old[others]) and torch.equal(kept[entries], of_alone)
    for product, of_alone, formula in zip(found, together, expected, strict=True):
        assert not product[others].any()
        torch.testing.assert_close(product[entries], of_alone, rtol=1e-12, atol=1e-12)
        assert_near(product[entries], formula, 1e-5)  # the moments go through float32 where they are stored in less


@pytest.mark.parametrize("storage", [torch.float64, *STORAGES[1:]])
@pytest.mark.parametrize(
    "threads", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("elements", rest_slow([700, 9000, 1, 2000, 4000], fast=2))
def test_any_tiling_gives_what_one_tile_gives(storage, threads, elements, monkeypatch):
    """From single rows over parts of a matrix to several matrices a tile, with rows that do not divide evenly."""
    shape = (5, 13, 300, 2)
    operands, steps = inputs(*shape), torch.tensor([4.0, 1.0, 7.0, 2.0, 3.0])
    whole = random_moments(shape[:3], storage)
    tiled = copied(whole)
    expected = update(whole, operands, steps, entries=[0, 1, 3, 4])
    monkeypatch.setattr(dense, "_CPU_ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = update(tiled, operands, steps, entries=[0, 1, 3, 4])
    if storage == torch.float64:
        torch.testing.assert_close(tiled[:2], whole[:2], rtol=1e-12, atol=1e-12)
    else:  # rounding of the products in float64 is lost in float32
        assert_same_moments(tiled, whole)
    for one, two in zip(found, expected, strict=True):
        assert_near(one, two, 1e-11)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("elements", "tallest"), [(1, 1), (100, 3), (400, 13)])
def test_tiles_hold_no_more_than_their_share(threads, elements, tallest, monkeypatch):
    monkeypatch.setattr(dense, "_CPU_ELEMENTS", elements)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tiles = list(dense._tiles([0, 1, 3], 13, 30, torch.device("cpu")))
    rows = [(e, row) for t in tiles for e in range(5)[t.entries] for row in range(13)[t.rows]]
    assert sorted(rows) == [(e, row) for e in (0, 1, 3) for row in range(13)]
    for tile in tiles:
        assert len(range(13)[tile.rows]) // tile.parts <= tallest
        assert len(range(5)[tile.entries]) * tile.parts <= threads
    assert max(len(range(13)[tile.rows]) // tile.parts for tile in tiles) == tallest or threads > 1


def test_backends_are_chosen_by_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for installed in (True, False):
        monkeypatch.setattr(dense, "has_triton", lambda there=installed: there)
        monkeypatch.setattr(native, "native_kernels", lambda there=installed: there or None)
        assert choose_backend("auto", cpu) == ("native" if installed else "torch")
        assert choose_backend("auto", cuda) == ("triton" if installed else "torch")
        assert choose_backend("torch", cuda) == "torch"
        with pytest.raises(RuntimeError, match=r"backend='triton' needs CUDA.*factors are on cpu.*Use backend='auto'"):
            choose_backend("triton", cpu)
    with pytest.raises(RuntimeError, match=r"backend='triton' needs CUDA.*it is not installed.*Use backend='auto'"):
        choose_backend("triton", cuda)
    monkeypatch.setattr(dense, "has_triton", lambda: True)
    assert choose_backend("triton", cuda) == "triton"


def test_triton_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(dense, "find_spec", lambda name: name == "triton" or None)
    found = []
    for value in (None, "0", "1"):
        monkeypatch.delenv("LORAPRO_HF_NO_TRITON", raising=False)
        if value is not None:
            monkeypatch.setenv("LORAPRO_HF_NO_TRITON", value)
        found.append(dense.has_triton.__wrapped__())
    assert found == [True, True, False]
