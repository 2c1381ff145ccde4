"""How many coordinates do points in a wide space need? TwoNN reads it from the two nearest neighbours of each."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_POINTS = 20
_ROWS = 512  # points whose distances to all others are in memory at a time
_CANDIDATES = 3  # neighbours whose distances are computed again, without the cancellation of squares


def intrinsic_dimension(points: Tensor, discard_fraction: float = 0.1) -> float:
    """Estimate the dimension of the manifold on which points lie (TwoNN, Facco et al. 2017, arXiv 1803.06992).

    The ratio mu of a point's distances to its second and its first neighbour has the distribution F(mu) = 1 - mu^(-d).
    So d is the slope of the line through the origin, fitted by least squares to -log(1 - F) over log(mu), where F = i/N
    for the i-th smallest of N ratios. Its standard error is about d / sqrt(N).

    Equal points count once. Distances are computed in float64 on the points' device, and those of 512 points are in
    memory at a time, beside two copies of the points.

    Args:
        points: shape (N, width), of any real dtype.
        discard_fraction: the share of the largest ratios that the fit leaves out, between 0 and 1.

    Raises:
        ValueError: the shape is another, a value is not finite, there are fewer than 20 distinct points, the fit keeps
            fewer than two ratios, or each point has two neighbours at the same distance.
    """
    if points.dim() != 2 or points.is_complex():
        raise ValueError(f"points must be real and of shape (N, width), not {points.dtype} of {tuple(points.shape)}.")
    if not 0 < discard_fraction < 1:
        raise ValueError(f"discard_fraction={discard_fraction!r} must lie between 0 and 1, such as 0.1.")
    if not bool(points.isfinite().all()):
        raise ValueError("points hold NaN or Inf: compute them in a wider dtype, or leave these rows out.")
    points = points.detach().cpu() if points.device.type == "mps" else points.detach()  # MPS has no float64
    distinct = torch.unique(points, dim=0)
    count = len(distinct)
    kept = int(count * (1 - discard_fraction))
    if count < MIN_POINTS or kept < 2:
        lower = f", or lower discard_fraction={discard_fraction:g}" if kept < 2 <= MIN_POINTS <= count else ""
        raise ValueError(
            f"{count} distinct points, of which {kept} are kept, are too few: give at least {MIN_POINTS} distinct "
            f"points (several hundred for a standard error of a few percent){lower}."
        )
    x = _log_ratios(distinct).sort().values[:kept]
    if not bool(x.any()):
        raise ValueError(
            "each point has two nearest neighbours at the same distance, as in a grid or among one-hot vectors: the "
            "fit has no slope. Give points with continuous coordinates."
        )
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=x.dtype, device=x.device) / count)
    return float(x @ y / (x @ x))


def _log_ratios(points: Tensor) -> Tensor:
    """The logarithms of the ratios of distances to the second and the first neighbour, in float64."""
    parts = points.split(_ROWS)
    centre = points.mean(dim=0, dtype=torch.float64)
    squares = torch.cat([(part.double() - centre).square().sum(dim=1) for part in parts])
    ratios = []
    for number, part in enumerate(parts):
        rows = part.double() - centre
        # squared distances without |row|^2, which does not change the order
        distances = torch.cat([rows @ (other.double() - centre).mT for other in parts], dim=1).mul_(-2).add_(squares)
        distances.diagonal(number * _ROWS).fill_(torch.inf)  # a point is no neighbour of its own
        nearest = distances.topk(_CANDIDATES, largest=False).indices
        exact = torch.stack([(points[each].double() - part.double()).norm(dim=1) for each in nearest.mT])
        first, second = exact.sort(dim=0).values[:2]
        ratios.append((second / first).log())
    return torch.cat(ratios)
