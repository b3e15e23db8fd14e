"""Means, interquartile means and their 95 % intervals, by the bootstrap over clips.

Values are per clip (n,), or per clip and repetition, such as noise seeds (n, repeats). Clips are drawn with
replacement, each with all its repeats, which is right whatever the shares of clip and noise in the variance (Davison & Hinkley
1997, §3.8). Workload × budget cells that are pooled are strata, each drawing as many clips as it has (arXiv 2108.13264);
budgets of one workload draw the same clips, because the results of a clip under two budgets are correlated. Values that are not
finite (missing episodes, the PSNR of frames equal to the truth) are left out; ``n`` counts the clips that remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NUM_RESAMPLES = 10_000
_CHUNK = 500
_Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Ascending values (N,) and how often each was drawn (R, N) to the statistic of every resample (R,)."""


@dataclass(frozen=True)
class Interval:
    """A mean (or interquartile mean) over ``n`` clips and the bounds of its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of values (n,) or (n, repeats) with a percentile bootstrap over clips (Efron 1979), 10,000 resamples.

    Raises:
        ValueError: without a finite value.
    """
    return _pooled([values], seed, _mean)


def mean_intervals(values: np.ndarray, seed: int = 0) -> list[Interval]:
    """`mean_interval` of every column of per-clip values (n, columns), all on the same resamples.

    Raises:
        ValueError: if a column has no finite value.
    """
    values = np.asarray(values, dtype=np.float64)
    is_finite = np.isfinite(values)
    if not len(values) or not is_finite.any(axis=0).all():
        raise ValueError("an interval needs at least one clip")
    sums, counts = np.where(is_finite, values, 0), is_finite.astype(np.float64)
    draws = _draws(len(values), seed, 0)
    with np.errstate(invalid="ignore"):
        chunks = (draws[first : first + _CHUNK].astype(np.float64) for first in range(0, NUM_RESAMPLES, _CHUNK))
        means = np.concatenate([(chunk @ sums) / (chunk @ counts) for chunk in chunks])
    percentile = np.nanpercentile if np.isnan(means).any() else np.percentile  # which is several times faster
    low, high = percentile(means, [2.5, 97.5], axis=0)
    columns = zip(sums.sum(axis=0) / counts.sum(axis=0), low, high, is_finite.sum(axis=0), strict=True)
    return [Interval(float(m), float(a), float(b), int(n)) for m, a, b, n in columns]


def iqm_interval(*strata: np.ndarray, seed: int = 0) -> Interval:
    """Interquartile mean of all episodes of one workload or several, each (n,) or (n, repeats), with its interval.

    That is the mean of the middle half: a quarter (rounded down) is cut off at each end (Agarwal et al., arXiv 2108.13264). A
    clip's seeds and budgets are its repeats.

    Raises:
        ValueError: without a finite value.
    """
    return _pooled(strata, seed, _interquartile_mean)


def _pooled(strata: Sequence[np.ndarray], seed: int, statistic: _Statistic) -> Interval:
    values, owners, draws, num_clips = [], [], [], 0
    for number, stratum in enumerate(strata):
        matrix = np.asarray(stratum, dtype=np.float64)
        matrix = matrix[:, None] if matrix.ndim == 1 else matrix
        is_finite = np.isfinite(matrix)
        matrix, is_finite = matrix[is_finite.any(axis=1)], is_finite[is_finite.any(axis=1)]
        if not len(matrix):
            continue
        values.append(matrix[is_finite])
        owners.append(num_clips + np.nonzero(is_finite)[0])
        draws.append(_draws(len(matrix), seed, number))
        num_clips += len(matrix)
    if num_clips == 0:
        raise ValueError("an interval needs at least one clip")
    order = np.argsort(np.concatenate(values), kind="stable")
    ordered, owner = np.concatenate(values)[order], np.concatenate(owners)[order]
    drawn = draws[0] if len(draws) == 1 else np.concatenate(draws, axis=1)
    parts = (drawn[first : first + _CHUNK, owner].astype(np.float64) for first in range(0, NUM_RESAMPLES, _CHUNK))
    low, high = np.percentile(np.concatenate([statistic(ordered, part) for part in parts]), [2.5, 97.5])
    return Interval(float(statistic(ordered, np.ones((1, len(ordered))))[0]), float(low), float(high), num_clips)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)


def _interquartile_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    upto = np.cumsum(weights, axis=1)
    total = upto[:, -1:]
    cut = np.floor(total / 4)
    inside = np.minimum(upto, total - cut) - np.maximum(upto - weights, cut)
    return _mean(values, inside.clip(min=0))


@lru_cache(maxsize=2)
def _draws(n: int, seed: int, stratum: int) -> np.ndarray:
    """Number of times that each of ``n`` clips is drawn in each resample, (10,000, n), in as few bytes as ``n`` allows."""
    kind = np.min_scalar_type(n)
    rng = np.random.default_rng((seed, stratum))
    rows = n * np.arange(_CHUNK)[:, None]
    chunks = [
        np.bincount((rng.integers(n, size=(_CHUNK, n)) + rows).ravel(), minlength=_CHUNK * n).astype(kind)
        for _ in range(0, NUM_RESAMPLES, _CHUNK)
    ]
    return np.concatenate(chunks).reshape(NUM_RESAMPLES, n)
