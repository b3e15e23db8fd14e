"""Probability of improvement, paired tests, families of comparisons, rows of training runs, against slow forms and rliable."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy.stats import permutation_test, trim_mean

from far_env import cli
from far_env.evaluation.comparison import Evaluation, check_runs, pooled_summary, with_runs
from far_env.evaluation.statistics import (
    Interval,
    holm,
    improvement_interval,
    iqm_interval,
    mean_interval,
    sign_flip_p,
)
from far_env.evaluation.table import Comparison, comparisons_of, family_line, markdown_table, results_table


def test_the_probability_of_improvement_counts_pairs():
    rng = np.random.default_rng(0)
    ours, reference = rng.integers(0, 4, size=(2, 30, 3)).astype(float)
    ours[0, 0] = reference[0, 0] = np.inf  # their difference is not a number
    pairs = [(x, y) for x, y in zip(ours.ravel(), reference.ravel(), strict=True) if not np.isinf(x)]
    expected = np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs])
    with np.errstate(invalid="ignore"):
        interval = improvement_interval(ours - reference)
    assert interval.mean == pytest.approx(expected) and interval.low < expected < interval.high
    better = np.where(ours == reference, 0.5, ours > reference)[1:]
    assert improvement_interval(ours[1:] - reference[1:]) == mean_interval(better)
    assert improvement_interval(np.full(9, np.inf)) == Interval(1.0, 1.0, 1.0, 9)


@pytest.mark.parametrize("n", [1, 2, 7, 13])
def test_the_p_value_of_few_clips_is_the_share_of_all_signs(n):
    differences = np.random.default_rng(n).normal(0.5, 1, size=(n, 2))
    means = differences.mean(axis=1)
    all_signs = itertools.product((-1, 1), repeat=n)
    as_far = [abs(np.dot(signs, means)) >= abs(means.sum()) - 1e-9 for signs in all_signs]
    assert sign_flip_p(differences) == pytest.approx(np.mean(as_far))
    assert sign_flip_p(differences) >= 2.0 ** (1 - n)


def test_the_p_value_is_scipys():
    differences = np.random.default_rng(2).standard_t(3, size=60)
    differences += 0.4 - differences.mean()
    options = {"permutation_type": "samples", "n_resamples": 20_000, "vectorized": True, "random_state": 0}
    theirs = permutation_test((differences,), lambda x, axis: np.mean(x, axis=axis), **options).pvalue
    assert 0.01 < theirs < 0.3 and sign_flip_p(differences) == pytest.approx(theirs, abs=0.01)
    assert sign_flip_p(np.full(40, 2.0)) == pytest.approx(1 / 10_001) and sign_flip_p(np.zeros(40)) == 1
    with pytest.raises(ValueError, match="at least one clip"):
        sign_flip_p(np.array([np.nan]))


def test_holm_rejects_what_its_steps_reject():
    """The procedure as Holm states it: from the smallest p value on, as long as it is at most α divided by those left."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 9, 40):
        p_values = (rng.random(size) ** 3).tolist()
        order, rejected = np.argsort(p_values), set()
        for place, index in enumerate(order):
            if p_values[index] > 0.05 / (size - place):
                break
            rejected.add(int(index))
        assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


def test_a_family_is_wrong_in_one_of_twenty_at_most():
    """Nine policies without any difference: some difference is called clear of zero in 5 % of the tables, not in 37 %."""
    rng = np.random.default_rng(4)
    wrong, wrong_alone = 0, 0
    for _ in range(200):
        p_values = [sign_flip_p(column) for column in (rng.standard_t(3, size=(9, 24)) + rng.normal(size=24))]
        wrong += min(holm(p_values)) <= 0.05
        wrong_alone += min(p_values) <= 0.05
    assert wrong / 200 <= 0.09 < 0.15 <= wrong_alone / 200


def test_runs_are_drawn_as_well_as_clips():
    """Training runs that differ by 1 dB: with runs drawn the interval holds the truth, with clips alone it does not."""
    rng = np.random.default_rng(5)
    held, held_clips = [], []
    for _ in range(60):
        values = 5 + rng.normal(size=(40, 1)) + rng.normal(size=(1, 6)).repeat(2, axis=1) + 0.5 * rng.normal(size=(40, 12))
        interval, of_clips = mean_interval(values, runs=6), mean_interval(values)
        assert interval.mean == of_clips.mean
        held.append(interval.low <= 5 <= interval.high)
        held_clips.append(of_clips.low <= 5 <= of_clips.high)
    assert np.mean(held) >= 0.85 and np.mean(held_clips) <= 0.7


def test_an_interval_of_runs_is_that_of_a_slow_bootstrap():
    rng = np.random.default_rng(6)
    strata = [rng.gamma(2, 2, size=(12, 3)) + np.arange(3), rng.gamma(2, 2, size=(9, 3)) - np.arange(3)]
    means, iqms = [], []
    for _ in range(4000):
        runs = rng.integers(3, size=3)  # the same in all strata
        drawn = [stratum[rng.integers(len(stratum), size=len(stratum))][:, runs] for stratum in strata]
        means.append(drawn[0].mean())
        iqms.append(trim_mean(np.concatenate([values.ravel() for values in drawn]), 0.25))
    for interval, slow in ((mean_interval(strata[0], runs=3), means), (iqm_interval(*strata, runs=3), iqms)):
        assert (interval.low, interval.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.12)


def test_definitions_are_those_of_rliable():
    metrics = pytest.importorskip("rliable.metrics", reason="rliable is not installed")
    rng = np.random.default_rng(7)
    scores = rng.gamma(3, 4, size=(5, 60)).round(1)  # runs × tasks; a task is a clip
    reference = np.maximum(scores + rng.normal(0.5, 3, size=scores.shape), 6).round(1)
    assert iqm_interval(scores.T).mean == pytest.approx(metrics.aggregate_iqm(scores))
    for run in range(5):  # played once with the same noise
        better = improvement_interval(scores[run] - reference[run])
        assert better.mean == pytest.approx(metrics.probability_of_improvement(scores[run : run + 1], reference[run : run + 1]))


def evaluation(clips=40) -> Evaluation:
    """Runs "a" and "b" are 2 and 4 dB above the reference, "rule" is not different from it."""
    rng = np.random.default_rng(0)
    reference = rng.normal(25, 4, size=(clips, 2))
    gains = {"recent_fill": 0, "a": 2, "b": 4, "rule": rng.normal(0, 3, size=(clips, 2))}
    scores = {name: {"psnr": reference + gain, "ssim": np.full((clips, 2), 0.5)} for name, gain in gains.items()}
    facts = {"a": {"family": "learned", "sha256": "1"}, "b": {"family": "learned", "sha256": "2"}}
    provenance = {"workload": "pan", "budget": 4, "split": "test", "clips": clips, "noise_seed": "1, 2 + clip id"}
    provenance |= {"ode_steps": 4, "host": "h", "weights": "w", "dtype": "float32", "device": "cpu", "commit": "c"}
    costs = {"a": 1.0, "b": 3.0, "rule": 0.1}
    return Evaluation(list(range(clips)), scores, {}, provenance, costs, alike={"b": "a"}, policies=facts)


def test_a_row_of_runs_is_their_mean():
    table = with_runs(evaluation(), {"mine": ["a", "b"]})
    assert set(table.scores) == {"recent_fill", "rule", "mine"} and table.alike == {}
    scores = evaluation().summary()["policies"]
    summary = table.summary()
    mine = summary["policies"]["mine"]
    assert mine["psnr"]["mean"] == pytest.approx((scores["a"]["psnr"]["mean"] + scores["b"]["psnr"]["mean"]) / 2)
    difference = mine["psnr_minus_recent_fill"]
    assert (difference["low"], difference["mean"], difference["high"]) == pytest.approx((2, 3, 4)), "runs are drawn"
    assert mine["psnr_above_recent_fill"]["mean"] == 1 and summary["runs"] == {"mine": ["a", "b"]}
    assert summary["policy_facts"]["mine"] == {"family": "learned", "note": "mean over 2 training runs: a, b"}
    assert summary["decision_ms"]["mine"] == 2
    text = results_table(table)
    assert "mine: mean over 2 training runs: a, b" in text and "+3.00 [+2.00, +4.00]" in text
    pooled = pooled_summary([table, table])["mine"]
    values = np.concatenate([table.scores["mine"]["psnr"]] * 2)
    assert pooled["psnr_iqm"].mean == pytest.approx(trim_mean(values.ravel(), 0.25))
    change = pooled["psnr_minus_recent_fill_iqm"]
    assert (change.low, change.mean, change.high) == pytest.approx((2, 3, 4)), "a run is drawn at both budgets or at none"
    lacking = with_runs(evaluation(), {"mine": ["a", "c"]})
    assert "mine" not in lacking.scores and lacking.failed["mine"].startswith("c has no scores")


def test_a_table_says_what_stays_clear_of_zero():
    table = evaluation()
    line = "3 comparisons with recent_fill; clear of zero by Holm–Bonferroni at a family-wise 5 % (sign-flip p values): "
    plain = results_table(Evaluation(**{**vars(table), "alike": {}}))
    assert f"\n{line}all but rule" in plain and "IQM" not in plain
    summary = Evaluation(**{**vars(table), "alike": {}}).summary()
    cuts = summary | {"workload": "cuts"}
    assert family_line(comparisons_of([summary, cuts], "recent_fill"), "recent_fill").endswith(
        "all but pan 4 rule, cuts 4 rule"
    )
    assert summary["policies"]["a"]["psnr_minus_recent_fill_p"] == sign_flip_p(table.difference("a", "recent_fill"))


def test_of_many_comparisons_fewer_are_clear():
    def family(p_values, difference):
        comparisons = [Comparison(f"w {i}", "p", difference, p) for i, p in enumerate(p_values)]
        return family_line(comparisons, "r").partition("values): ")[2]

    clear, unclear = Interval(1.0, 0.1, 2.0, 50), Interval(1.0, -0.1, 2.0, 50)
    assert family([0.02], clear) == "all" and family([0.02], unclear) == "none"
    assert family([0.02, 0.02, 0.02], clear) == "none" and family([0.01, 0.03, 0.03], clear) == "w 0 p"
    assert family([0.01, 0.01, 0.2], clear) == "all but w 2 p"


def test_robust_columns_are_those_of_the_summary():
    table = Evaluation(**{**vars(evaluation()), "alike": {}})
    scores = table.summary()["policies"]
    iqm = scores["rule"]["psnr_iqm"]
    assert iqm["mean"] == pytest.approx(trim_mean(table.scores["rule"]["psnr"].ravel(), 0.25))
    expected = f"{iqm['mean']:.2f} [{iqm['low']:.2f}, {iqm['high']:.2f}]"
    better = "{mean:.2f} [{low:.2f}, {high:.2f}]".format(**scores["rule"]["psnr_above_recent_fill"])
    for text in (results_table(table, robust=True), markdown_table([table.summary()], robust=True)):
        (row,) = [line for line in text.splitlines() if "rule " in line and "[" in line]
        assert expected in row and better in row and "PSNR IQM dB [95 %]" in text and "P(better) [95 %]" in text


@pytest.mark.parametrize("rows", [{"mine": ["a"]}, {"mine": ["a", "a"]}, {"mine": "a,b"}, {"mine": [1, 2]}, {"mine": None}])
def test_a_row_needs_several_runs(rows):
    with pytest.raises(ValueError, match="--runs: mine needs a list of two or more different policies, got"):
        check_runs(rows, "--runs")


def test_the_command_takes_runs_and_a_first_clip(tiny_host_folder, capsys):
    common = ["evaluate", "--host", str(tiny_host_folder), "--device", "cpu", "--metrics", "psnr", "--policies", "recent_fill"]
    runs = ["--runs", "{both: ['random_mid:seed=1', 'random_mid:seed=2']}"]
    assert cli.main([*common, *runs, "--clips", "2", "--first-clip", "2048", "--json", "-"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["policies"]) == {"recent_fill", "both"} and (summary["first_clip"], summary["clips"]) == (2048, 2)
    assert cli.main([*common, "--clips", "1", "--first-clip", "2048"]) == 0
    assert "pan, budget 4, 1 test clips from 2048 on, noise seed" in capsys.readouterr().out
    assert cli.main([*common, "--runs", "{uniform: [uniform, random]}"]) == 2
    assert "uniform is the name of a row and of a policy" in capsys.readouterr().err
    assert cli.main([*common, "--clips", "2", "--first-clip", "4095"]) == 2
    assert "clip id 4096 is out of range: pan/test has clips 0 to 4095" in capsys.readouterr().err
