"""Noise by position: the generator's published values, a normal distribution, and the same numbers by both ways."""

from __future__ import annotations

import math

import pytest
import torch

from lorapro_hf.kernels import native, noise
from lorapro_hf.kernels.noise import NoiseKey, standard_normal, with_noise

KEY = NoiseKey(2**62 + 12345, 3, 7)
has_kernels = pytest.mark.skipif(native.native_kernels() is None, reason="no C++ compiler")


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # known answers of Random123
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, seed, words):
    counters = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    assert [int(word) for word in noise._philox(counters, seed)] == [int(word, 16) for word in words.split()]


@has_kernels
@pytest.mark.parametrize("columns", [1, 70, 576])
def test_the_kernel_gives_the_numbers_of_torch(columns, monkeypatch):
    torch.manual_seed(0)
    rows, weight = range(1000, 1300), torch.randn(300, columns)
    numbers = torch.tensor([5, 2**31 + 3, 5])
    of_rows, of_columns = torch.rand(300, 1), torch.rand(1, columns)
    cases = [(weight, of_rows, rows), (weight.bfloat16(), of_columns, rows), (None, of_columns, numbers)]
    cases.append((torch.randn(columns, 300).T, of_rows, rows))  # not contiguous
    by_kernel = [with_noise(weight, scale, KEY, rows, columns) for weight, scale, rows in cases]
    monkeypatch.setattr(native, "native_kernels", lambda: None)
    for (weight, scale, rows), found in zip(cases, by_kernel, strict=True):
        torch.testing.assert_close(found, with_noise(weight, scale, KEY, rows, columns), rtol=1e-6, atol=2e-6)


@has_kernels
def test_no_number_depends_on_threads_tiles_or_columns():
    whole = with_noise(None, torch.ones(400, 1), KEY, range(400), 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        part = with_noise(None, torch.ones(57, 1), KEY, range(300, 357), 130)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(part, whole[300:357, :130])


def test_numbers_are_normal_and_independent():
    z = standard_normal(torch.arange(512), 1024, KEY).double()
    count = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(count)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / count)
    assert (z.square().mean(1) - 1).abs().max() < 5 * math.sqrt(2 / 1024)  # of each row
    values = z.flatten().sort().values
    expected = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (torch.special.ndtr(values) - expected).abs().max() < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov
    assert z.abs().max() < 6
    others = [KEY._replace(window=8), KEY._replace(layer=4), KEY._replace(seed=KEY.seed + 1)]
    others = [standard_normal(torch.arange(512), 1024, key).double() for key in others]
    shifted = [z.roll(1, 0), z.roll(1, 1), z.roll(16, 1), z.roll(32, 1), z.roll(64, 1)]
    for other in (*others, *shifted):
        assert abs((z * other).mean()) < 4 / math.sqrt(count)
        assert abs((z.square() * other.square()).mean() - 1) < 4 * math.sqrt(8 / count)
