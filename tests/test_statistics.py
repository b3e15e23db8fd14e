"""Intervals against the normal approximation and against coverage."""

from __future__ import annotations

import numpy as np
import pytest

from far_env.evaluation.evaluate import Evaluation
from far_env.evaluation.statistics import mean_interval


def test_the_interval_is_that_of_the_normal_approximation_for_many_clips():
    values = np.random.default_rng(0).gamma(4, 2, size=400)
    interval = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean()) and interval.n == 400
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    rng = np.random.default_rng(1)
    held = [interval.low <= 3 <= interval.high for interval in (mean_interval(rng.normal(3, 2, 60)) for _ in range(200))]
    assert 0.90 <= np.mean(held) <= 0.99


def test_differences_are_paired():
    hard = np.random.default_rng(0).normal(25, 8, 50)
    scores = {"recent_fill": {"psnr": hard}, "better": {"psnr": hard + 2}}
    summary = Evaluation(list(range(50)), scores, {}, {}).summary()
    difference = summary["policies"]["better"]["psnr_minus_recent_fill"]
    assert (difference["mean"], difference["low"], difference["high"]) == pytest.approx((2, 2, 2))
    assert summary["policies"]["better"]["psnr"]["high"] - summary["policies"]["better"]["psnr"]["low"] > 3


def test_the_interval_of_one_clip_is_its_value_and_of_none_an_error():
    assert mean_interval(np.array([7.0])).low == mean_interval(np.array([7.0])).high == 7
    with pytest.raises(ValueError, match="at least one clip"):
        mean_interval(np.array([]))
