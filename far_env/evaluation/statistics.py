"""Means, interquartile means and probabilities of improvement with 95 % intervals by the bootstrap over clips; paired tests.

Values are per clip (n,), or per clip and repetition, such as noise seeds (n, repeats). Clips are drawn with
replacement, each with all its repeats, which is right whatever the shares of clip and noise in the variance (Davison & Hinkley
1997, §3.8). Workload × budget cells that are pooled are strata, each drawing as many clips as it has (arXiv 2108.13264);
budgets of one workload draw the same clips, because the results of a clip under two budgets are correlated. Where the repeats
are of several training runs, runs are drawn with replacement too, independently of the clips, and an episode counts as often as
its clip times as often as its run (Owen, arXiv 0712.1111). Values that are not finite (missing episodes, the PSNR of frames
equal to the truth) are left out; ``n`` counts the clips that remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NUM_RESAMPLES = 10_000
_CHUNK = 500
_MOST_ENUMERATED = 13
_RUNS = 2**31
"""The number of the stratum from which the draws of training runs are made; strata of clips are numbered from 0 on."""
_Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Ascending values (N,) and how often each was drawn (R, N) to the statistic of every resample (R,)."""


@dataclass(frozen=True)
class Interval:
    """A mean (or interquartile mean) over ``n`` clips and the bounds of its 95 % percentile-bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, seed: int = 0, runs: int = 1) -> Interval:
    """Mean of values (n,) or (n, repeats) with a percentile bootstrap over clips (Efron 1979), 10,000 resamples.

    Args:
        runs: number of training runs that the repeats are of, those of one run together.

    Raises:
        ValueError: without a finite value.
    """
    return _pooled([values], seed, _mean, runs)


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


def iqm_interval(*strata: np.ndarray, seed: int = 0, runs: int = 1) -> Interval:
    """Interquartile mean of all episodes of one workload or several, each (n,) or (n, repeats), with its interval.

    That is the mean of the middle half: a quarter (rounded down) is cut off at each end (Agarwal et al., arXiv 2108.13264). A
    clip's seeds and budgets are its repeats; ``runs`` is as in `mean_interval`.

    Raises:
        ValueError: without a finite value.
    """
    return _pooled(strata, seed, _interquartile_mean, runs)


def improvement_interval(*strata: np.ndarray, seed: int = 0, runs: int = 1) -> Interval:
    """Probability of improvement, from paired differences (n,) or (n, repeats) that are positive where a policy is better.

    That is the share of episodes in which the policy is better than the reference on the same clip with the same noise, and
    half of those with equal scores. With clips as tasks that are played once it is the probability of improvement of arXiv
    2108.13264; which compares all pairs of runs of a task, because its runs are not paired.

    Raises:
        ValueError: without a difference that is a number.
    """
    better = [np.heaviside(np.asarray(stratum, dtype=np.float64), 0.5) for stratum in strata]  # NaN stays
    return _pooled(better, seed, _mean, runs)


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p value of paired differences (n,) or (n, repeats), by a permutation test (Fisher 1935, §21).

    If a policy and the reference were exchangeable, the difference of each clip (the mean over its repeats) would have either
    sign with equal probability. p is the share of all choices of signs whose mean is at least as far from zero as the
    measured one. Of more than 13 clips, 10,000 choices are drawn, and the measured one is counted too, so that the test stays
    valid (Phipson & Smyth 2010).

    Raises:
        ValueError: without a finite difference.
    """
    matrix = np.asarray(differences, dtype=np.float64)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    is_finite = np.isfinite(matrix)
    counts = is_finite.sum(axis=1)
    means = np.where(is_finite, matrix, 0).sum(axis=1)[counts > 0] / counts[counts > 0]
    if not len(means):
        raise ValueError("a test needs at least one clip")
    return sign_flip_ps(means[:, None], seed)[0]


def sign_flip_ps(differences: np.ndarray, seed: int = 0) -> list[float]:
    """`sign_flip_p` of every column of finite per-clip differences (n, columns), n at least 1."""
    is_drawn = len(differences) > _MOST_ENUMERATED
    signs = _signs(len(differences), seed)
    # Choices with the same mean may differ in the last digits.
    measured = np.abs(differences.sum(axis=0)) * (1 - 1e-9) - 1e-12
    counts = np.zeros(differences.shape[1], dtype=np.int64)
    for first in range(0, len(signs), _CHUNK):
        counts += (np.abs(signs[first : first + _CHUNK].astype(np.float64) @ differences) >= measured).sum(axis=0)
    return ((counts + is_drawn) / (len(signs) + is_drawn)).tolist()


def holm(p_values: Sequence[float]) -> list[float]:
    """p values that are adjusted for their number (Holm 1979): those of at most α are significant at a family-wise level of α.

    The k-th smallest of m is multiplied by m − k + 1; none becomes smaller than the one before it, or larger than 1.
    """
    adjusted, highest = [1.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, (len(p_values) - place) * p_values[index])
        adjusted[index] = min(1.0, highest)
    return adjusted


def _pooled(strata: Sequence[np.ndarray], seed: int, statistic: _Statistic, runs: int = 1) -> Interval:
    values, owners, runs_of, draws, num_clips = [], [], [], [], 0
    for number, stratum in enumerate(strata):
        matrix = np.asarray(stratum, dtype=np.float64)
        matrix = matrix[:, None] if matrix.ndim == 1 else matrix
        is_finite = np.isfinite(matrix)
        matrix, is_finite = matrix[is_finite.any(axis=1)], is_finite[is_finite.any(axis=1)]
        if not len(matrix):
            continue
        clip, column = np.nonzero(is_finite)
        values.append(matrix[is_finite])
        owners.append(num_clips + clip)
        runs_of.append(column // (matrix.shape[1] // runs))
        draws.append(_draws(len(matrix), seed, number))
        num_clips += len(matrix)
    if num_clips == 0:
        raise ValueError("an interval needs at least one clip")
    order = np.argsort(np.concatenate(values), kind="stable")
    ordered, owner = np.concatenate(values)[order], np.concatenate(owners)[order]
    drawn = draws[0] if len(draws) == 1 else np.concatenate(draws, axis=1)
    run, drawn_runs = np.concatenate(runs_of)[order], None if runs == 1 else _draws(runs, seed, _RUNS)
    chunks = []
    for first in range(0, NUM_RESAMPLES, _CHUNK):
        weights = drawn[first : first + _CHUNK, owner].astype(np.float64)
        if drawn_runs is not None:
            weights = weights * drawn_runs[first : first + _CHUNK, run]
        chunks.append(statistic(ordered, weights))
    low, high = np.percentile(np.concatenate(chunks), [2.5, 97.5])
    return Interval(float(statistic(ordered, np.ones((1, len(ordered))))[0]), float(low), float(high), num_clips)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)


def _interquartile_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    upto = np.cumsum(weights, axis=1)
    total = upto[:, -1:].copy()
    cut = np.floor(total / 4)
    # How much of the first k values is in the middle half, and from that the sum of it, by summation by parts.
    np.clip(upto, cut, total - cut, out=upto)
    steps = np.append(values[:-1] - values[1:], values[-1])
    return (upto @ steps - cut[:, 0] * values[0]) / (total - 2 * cut)[:, 0]


@lru_cache(maxsize=2)
def _signs(n: int, seed: int) -> np.ndarray:
    """All choices of ``n`` signs, or 10,000 that are drawn, int8 (choices, n)."""
    if n <= _MOST_ENUMERATED:
        return (1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)).astype(np.int8)
    rng, shape = np.random.default_rng((seed, n)), (_CHUNK, n)
    chunks = [rng.choice([-1, 1], size=shape).astype(np.int8) for _ in range(0, NUM_RESAMPLES, _CHUNK)]
    return np.concatenate(chunks)


@lru_cache(maxsize=4)
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
