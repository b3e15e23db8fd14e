"""Means with 95 % intervals, by the bootstrap over clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` clips and the bounds of its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of per-clip values (n,) with a percentile bootstrap over clips (Efron 1979), 10,000 resamples.

    Raises:
        ValueError: on an empty array.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one clip")
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[rng.integers(len(values), size=(500, len(values)))].mean(axis=1) for _ in range(NUM_RESAMPLES // 500)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high), len(values))
