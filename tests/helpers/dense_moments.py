"""Dense moments in every storage, and one step of them in plain float64."""

import torch

from lorapro_hf.kernels.storage import Moments, dynamic_map, moment_tensors

BETAS, EPS = (0.8, 0.95), 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def inputs(K, m, n, r, dtype=torch.float64):
    """left, right, A and B of gradients whose size differs from element to element."""
    left, right = torch.randn(K, 2 * r, m, dtype=torch.float64), torch.randn(K, 2 * r, n, dtype=torch.float64)
    A, B = torch.randn(K, r, n, dtype=torch.float64), torch.randn(K, r, m, dtype=torch.float64)
    return [x.to(dtype) for x in (left, right, A, B)]


def new_moments(shape, storage):
    tensors = moment_tensors(shape, storage)
    return Moments(**{name: torch.zeros(of_it, dtype=dtype) for name, (of_it, dtype) in tensors.items()})


def random_moments(shape, storage):
    """Moments in the middle of a run, in the given storage."""
    M, V = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) + 0.01
    moments = new_moments(shape, storage)
    if storage != torch.uint8:
        moments.exp_avg.copy_(M)
        moments.exp_avg_sq.copy_(V)
        return moments
    # Where the second moment is near zero and the first is not, u would depend on the last bit of the gradient.
    for tensor, lowest in zip(moments[:2], (0, 128), strict=True):
        tensor.copy_(torch.randint(lowest, 256, shape, dtype=torch.uint8))
    for scales in moments[2:]:
        scales.copy_(torch.rand_like(scales) + 0.5)
    return moments


def map_of(signed):
    """The numbers of 256 codes in float64."""
    return dynamic_map(signed).double()


def scales_of(absmax, n):
    """The scale of each element."""
    return absmax.double().repeat_interleave(256, -1)[..., :n]


def exact(moments):
    """What moments stand for, as float64 copies of M and V."""
    M, V, absmax, sq_absmax = moments
    if M.dtype != torch.uint8:
        return M.double().clone(), V.double().clone()
    n = M.shape[-1]
    root = map_of(False)[V.long()] * scales_of(sq_absmax, n)
    return map_of(True)[M.long()] * scales_of(absmax, n), root**2


def copied(moments):
    return Moments(*(None if x is None else x.clone() for x in moments))


def assert_same_moments(one, two):
    for first, second in zip(one, two, strict=True):
        assert first is second is None or torch.equal(first, second)


def dense_step(M, V, left, right, A, B, steps):
    """The new M and V and the products of u, by the formulas."""
    g = left.double().mT @ right.double()
    t = steps.double()[:, None, None]
    M, V = BETAS[0] * M + (1 - BETAS[0]) * g, BETAS[1] * V + (1 - BETAS[1]) * g**2
    u = (M / (1 - BETAS[0] ** t)) / ((V / (1 - BETAS[1] ** t)).sqrt() + EPS)
    K = u @ A.double().mT
    return M, V, (K.mT, B.double() @ u, K.mT @ u)


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm()
