"""Intervals against the normal approximation, against coverage and against SciPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import bootstrap, trim_mean

from far_env.evaluation.comparison import Evaluation, pooled_summary, tabulate
from far_env.evaluation.records import Record, Results, Settings
from far_env.evaluation.statistics import (
    iqm_interval,
    mean_interval,
    mean_intervals,
)
from far_env.evaluation.table import markdown_table, pooled_table, results_table


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
    for nothing in (np.array([]), np.array([np.nan]), np.zeros((0, 2))):
        for interval in (
            mean_interval,
            iqm_interval,
            lambda values: mean_intervals(values.reshape(len(values), 2 - len(values))),
        ):
            with pytest.raises(ValueError, match="at least one clip"):
                interval(nothing)


def test_the_interval_is_scipys():
    values = np.random.default_rng(3).gamma(2, 3, size=80)
    ours = mean_interval(values)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=0).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)
    ours = iqm_interval(values)
    theirs = bootstrap((values,), lambda x, axis: trim_mean(x, 0.25, axis=axis), method="percentile", random_state=0)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.05)


def test_the_interquartile_mean_is_the_trimmed_mean():
    rng = np.random.default_rng(0)
    for size in (*range(1, 20), 50, 101):
        values = np.exp(rng.normal(size=(size, 1 + size % 3)))
        assert iqm_interval(values).mean == pytest.approx(trim_mean(values.ravel(), 0.25))
    strata = [rng.normal(size=(7, 2)), rng.normal(5, 1, size=(12, 1)), rng.normal(size=9)]
    together = np.concatenate([stratum.ravel() for stratum in strata])
    pooled = iqm_interval(*strata)
    assert pooled.mean == pytest.approx(trim_mean(together, 0.25)) and pooled.n == 28
    assert pooled.low < pooled.mean < pooled.high


def test_strata_keep_their_sizes():
    """Were clips drawn from the pool of both, the shares of the two would vary and the interval be wide."""
    easy, hard = np.full(20, 40.0), np.full(20, 10.0)
    pooled = iqm_interval(easy, hard)
    assert (pooled.low, pooled.mean, pooled.high) == (25, 25, 25)
    assert iqm_interval(np.concatenate([easy, hard])).high > 30


def test_repeats_of_a_clip_are_drawn_together():
    """With noise seeds as repeats the interval covers the truth; were episodes drawn one by one it would be too narrow."""
    rng = np.random.default_rng(2)
    for spread_of_clips, spread_of_noise in ((3, 1), (0, 2)):
        held, held_apart = [], []
        for _ in range(80):
            values = 5 + spread_of_clips * rng.normal(size=(40, 1)) + spread_of_noise * rng.normal(size=(40, 4))
            interval, apart = mean_interval(values), mean_interval(values.ravel())
            held.append(interval.low <= 5 <= interval.high)
            held_apart.append(apart.low <= 5 <= apart.high)
        assert np.mean(held) >= 0.86
        if spread_of_clips:
            assert np.mean(held_apart) < 0.8


def test_missing_values_are_left_out():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 3))
    values[4], values[7, 1], values[9, 2] = np.nan, np.inf, np.nan
    finite = values[np.isfinite(values)]
    assert mean_interval(values).mean == pytest.approx(finite.mean()) and mean_interval(values).n == 29
    assert iqm_interval(values).mean == pytest.approx(trim_mean(finite, 0.25))
    columns = mean_intervals(values)
    assert [column.n for column in columns] == [29, 28, 28]
    for column, column_values in zip(columns, values.T, strict=True):
        alone = mean_interval(column_values)
        assert column.mean == pytest.approx(alone.mean)
        assert (column.low, column.high) == pytest.approx((alone.low, alone.high), abs=0.03)


def test_columns_are_intervals_of_their_own():
    values = np.random.default_rng(5).normal(size=(50, 4))
    for column, column_values in zip(mean_intervals(values), values.T, strict=True):
        alone = mean_interval(column_values)
        assert (column.mean, column.low, column.high) == pytest.approx((alone.mean, alone.low, alone.high))


def made_up(clips=6, seeds=(1, 2)) -> Results:
    """Two workloads; policy "good" at budgets 4 and 8 is 3 and 5 dB above "recent_fill", and full history 6."""
    rng = np.random.default_rng(0)
    gains = {("recent_fill", 4): 0, ("recent_fill", 8): 1, ("good", 4): 3, ("good", 8): 6, ("full_history", 9999): 7}
    records = []
    for workload in ("pan", "cuts"):
        for clip in range(clips):
            for seed in seeds:
                base = 20 + rng.normal(0, 5)
                for (policy, budget), gain in gains.items():
                    frames = [base + gain - drop for drop in (0, 1, 5)]
                    cost = None if policy == "full_history" else 0.1 * budget + clip
                    numbers = {"metrics": {"psnr": base + gain}, "psnr_per_frame": frames, "decision_ms": cost}
                    who = {"workload": workload, "budget": budget, "policy": policy, "clip": clip, "seed": seed}
                    facts = {"host": "h", "weights": "w", "ode_steps": 4, "dtype": "float32", "device": "cpu", "commit": "c"}
                    records.append(Record(**who, **numbers, plan=[], clip_sha256="", latents_sha256="", facts=facts))
    sizes = {"pan": 5, "cuts": 5}
    settings = Settings(
        workloads=["pan", "cuts"],
        budgets=[4, 8, 9999],
        policies={"recent_fill": {}, "good": {}, "full_history": {}},
        seeds=list(seeds),
        split="test",
        clips=list(range(clips)),
        metrics=["psnr"],
        unavailable={"lpips": "no weights"},
        num_context=sizes,
        num_predict={"pan": 3, "cuts": 3},
        frame_size=sizes,
    )
    return Results(settings, records)


def test_pooled_numbers_are_those_of_all_cells():
    results = made_up()
    tables = [tabulate(results, workload, budget) for workload in ("pan", "cuts") for budget in (4, 8)]
    pooled = pooled_summary(tables)
    episodes = [r.metrics["psnr"] for r in results.records if r.policy == "good"]
    assert pooled["good"]["psnr_iqm"].mean == pytest.approx(trim_mean(episodes, 0.25)) and pooled["good"]["psnr_iqm"].n == 12
    # Gains are 3 at budget 4 and 5 at budget 8, the same share of both in every resample: the middle half's mean is 4.
    gain = pooled["good"]["psnr_minus_recent_fill_iqm"]
    assert (gain.low, gain.mean, gain.high) == pytest.approx((4, 4, 4))
    assert "psnr_minus_recent_fill_iqm" not in pooled["recent_fill"]
    table = pooled_table(tables)
    assert table.splitlines()[2].startswith("full_history") and "+4.00 [+4.00, +4.00]" in table
    assert table.endswith("interquartile means over pan 4, pan 8, cuts 4, cuts 8")


def test_tables_show_costs_and_differing_facts():
    results = made_up()
    results.records[0].facts["commit"] = "another"
    table = results_table(tabulate(results, "pan", 4))
    (row,) = [line for line in table.splitlines() if line.startswith("good")]
    assert row.split()[-1] == "2.900" and "+3.00 [+3.00, +3.00]" in row
    (row,) = [line for line in table.splitlines() if line.startswith("full_history")]
    assert row.rstrip().endswith("+7.00]")
    assert "noise seed 1, 2 + clip id" in table and "commit another, c" in table and "no lpips column: no weights" in table


def test_policies_that_decide_alike_share_a_row_and_remarks_are_shown():
    results = made_up()
    twins = [dataclasses.replace(record, policy="twin") for record in results.records if record.policy == "recent_fill"]
    twins[-1] = dataclasses.replace(twins[-1], metrics={"psnr": 1.0})  # at budget 8 on cuts alone
    results.records.extend(twins)
    results.settings.policies.update(twin={"remark": "reconstruction"})
    tables = {(name, budget): tabulate(results, name, budget) for name in ("pan", "cuts") for budget in (4, 8)}
    assert tables["pan", 4].alike == {"twin": "recent_fill"} and tables["cuts", 8].alike == {}
    rows = [line.split("  ")[0] for line in results_table(tables["pan", 4]).splitlines()[2:5]]
    assert rows == ["full_history", "good", "recent_fill = twin (reconstruction)"]
    rows = [line.split("  ")[0] for line in results_table(tables["cuts", 8]).splitlines()[2:6]]
    assert rows == ["full_history", "good", "recent_fill", "twin (reconstruction)"]
    assert "recent_fill = twin (reconstruction)" in pooled_table([tables["pan", 4], tables["pan", 8]])
    assert "recent_fill = twin" not in pooled_table(list(tables.values()))
    summaries = [table.summary() for table in tables.values()]
    for summary in summaries:
        for scores in summary["policies"].values():
            scores["ssim"] = scores["psnr"]
    lines = markdown_table(summaries).splitlines()
    assert sum("| recent_fill = twin (reconstruction) |" in line for line in lines) == 3 and len(lines) == 2 + 3 + 3 + 3 + 4
