"""Points of a known dimension, and TwoNN from all of their distances at once."""

from __future__ import annotations

import numpy as np


def cloud(seed: int, count: int, dimension: int, width: int) -> np.ndarray:
    """Normal points in `dimension` coordinates, mapped linearly to a larger width."""
    random = np.random.RandomState(seed)  # its streams never change
    points = random.standard_normal((count, dimension))
    return points if width == dimension else points @ random.standard_normal((dimension, width))


def dense(points: np.ndarray, discard_fraction: float = 0.1) -> float:
    """TwoNN from all distances at once."""
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))
    ordered = np.sort(distances, axis=1)
    x = np.sort(np.log(ordered[:, 2] / ordered[:, 1]))[: int(len(points) * (1 - discard_fraction)), None]
    y = -np.log(1 - np.arange(1, len(x) + 1) / len(points))
    return float(np.linalg.lstsq(x, y, rcond=None)[0][0])
