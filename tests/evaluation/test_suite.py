"""The benchmark's settings and score: the formula by hand, and the command on a tiny host from clips to the kept records."""

from __future__ import annotations

import json
import math

import pytest
import torch

from far_env import cli
from far_env.evaluation.suite import ANCHORS, SCORES, SETTINGS, score_line, setting_score, suite_score
from far_env.rollout.noise import harness_noise, rollout_noise
from tests.clips.test_video import write_video

PUBLISHED = {  # the task's leaderboard of April 2026, ucf-short: quality and memory of its four baselines
    "recent_window": (71.5873, 1.0),
    "packcache": (79.9276, 4.95),
    "causalcache_vdm": (79.4309, 2.7),
    "flowcache": (88.3286, 11.0),
}


def numbers(quality, memory):
    return {"temporal_quality_main": quality, "peak_kv_memory_mb": memory}


def test_a_setting_counts_from_the_worst_baseline_to_the_bound_with_a_half_at_the_best():
    baselines = [numbers(*values) for values in PUBLISHED.values()]
    # Best in quality, worst in memory: 2 of 2.5 at a half, and nothing.
    assert setting_score(numbers(88.3286, 11.0), baselines) == pytest.approx(2 * 0.5 / 2.5)
    assert setting_score(numbers(71.5873, 1.0), baselines) == pytest.approx(0.5 * 0.5 / 2.5)
    assert setting_score(numbers(100, 0), baselines) == 1 and setting_score(numbers(60, 20), baselines) == 0
    share, best = (80 - 71.5873) / (100 - 71.5873), (88.3286 - 71.5873) / (100 - 71.5873)
    expected = (
        2 * share ** (math.log(0.5) / math.log(best)) + 0.5 * ((11 - 3) / 11) ** (math.log(0.5) / math.log(10 / 11))
    ) / 2.5
    assert setting_score(numbers(80, 3), baselines) == pytest.approx(expected)


def test_memory_that_depends_on_the_budget_alone_counts_nothing():
    baselines = [numbers(quality, 0.0625) for quality in (18, 19, 20, 21)]
    assert setting_score(numbers(21, 0.0625), baselines) == pytest.approx(0.4)
    assert 0.4 < setting_score(numbers(25, 0.0625), baselines) < 0.8


def test_the_suites_score_is_a_geometric_mean_with_a_floor():
    assert suite_score([0.4, 0.2, 0.1]) == pytest.approx(0.008 ** (1 / 3))
    assert suite_score([0.4, 0.0, 0.1]) == pytest.approx((0.4 * 0.01 * 0.1) ** (1 / 3))
    assert suite_score([0, 0, 0]) == 0


def test_a_score_needs_all_numbers():
    results = {name: {setting.name: numbers(20 + i, 0.06) for setting in SETTINGS} for i, name in enumerate(ANCHORS)}
    line = score_line("flowcache", results)
    assert line.startswith("SUITE_SCORE: policy=flowcache card=40.00 script=40.00 ucf-short=40.00")
    del results["packcache"]["ucf-short"]["temporal_quality_main"]
    with pytest.raises(
        ValueError, match="no score of the suite for flowcache: packcache has no temporal_quality_main in ucf-s"
    ):
        score_line("flowcache", results)


def test_the_harness_noise_is_the_portable_one_in_float32_on_a_cpu_and_another_in_bfloat16():
    portable = rollout_noise(43, 3, (4, 2, 2))
    torch.testing.assert_close(harness_noise(43, 3, (4, 2, 2), torch.device("cpu"), torch.float32), portable, atol=0, rtol=0)
    half = harness_noise(43, 3, (4, 2, 2), torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(43)
    again = [torch.randn((1, 1, 4, 2, 2), dtype=torch.bfloat16) for _ in range(3)]
    assert half.dtype == torch.bfloat16 and torch.equal(half, torch.cat(again)[:, 0])


@pytest.fixture
def folders(tmp_path, monkeypatch, tiny_host, tiny_long_host):
    """Videos of both data sets, and the tiny hosts under the names of the released ones."""
    for i in range(2):
        write_video(tmp_path / "ucf" / f"{i}.mp4", 18)
        write_video(tmp_path / "dmlab" / f"{i}.avi", 73)
    hosts = {"far_b_ucf101": tiny_host, "far_b_long_dmlab": tiny_long_host}
    monkeypatch.setattr("far_env.workloads.load_host", lambda name, *_: hosts[name])
    return [
        "--data-dir",
        f"{tmp_path / 'ucf'},{tmp_path / 'dmlab'}",
        "--steps",
        "1",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]


def run(capsys, *args):
    status = cli.main(["benchmark", *args])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_the_suite_plays_all_settings_prints_scores_and_resumes(capsys, folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    status, lines, err = run(capsys, "--suite", "--policy", "recent_fill", *folders, "--out", str(out))
    assert status == 0
    metrics = [line for line in lines if line.startswith("TEST_METRICS: ")]
    assert len(metrics) == len(SETTINGS) * (1 + len(ANCHORS)) and all("n_clips=2" in line for line in metrics)
    assert lines[0] == "recent_fill, ucf-short: ucf101_short_prediction, 8 frames"
    (score,) = [line for line in lines if line.startswith("SUITE_SCORE: ")]
    assert score.startswith("SUITE_SCORE: policy=recent_fill card=") and all(f" {name}=" in score for name in SCORES)
    assert err.count("no lpips") == 1 and "ucf101_short_prediction: noise portable, 1 ODE steps in float32 on cpu" in err
    assert "the benchmark plays 50 clips, 2 are available" in err
    assert "with so few videos the benchmark would play made clips of plain colours" in err
    record = json.loads((out / "recent_fill" / "ucf-short.json").read_text())
    assert record["line"] in metrics and sorted(name for name, _ in record["made_with"]["clips"]) == ["0.mp4", "1.mp4"]
    assert record["made_with"]["noise"] == "portable" and len(record["score"]["by_clip"]) == 2

    monkeypatch.setattr("far_env.evaluation.benchmark.run_benchmark", lambda *_, **__: pytest.fail("it is played again"))
    assert run(capsys, "--suite", "--policy", "recent_fill", *folders, "--out", str(out))[1] == lines
    status, _, err = run(capsys, "--suite", "--policy", "recent_fill", *folders, "--out", str(out), "--noise", "harness")
    assert status == 2 and "ucf-short.json was made with another value of noise; choose another folder" in err


def test_lenient_runs_leave_out_the_clips_on_which_a_policy_fails(capsys, folders, tmp_path):
    policy = tmp_path / "policy.py"
    policy.write_text(
        "class VideoTemporalKVPolicy:\n    clips = 0\n"
        "    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):\n"
        "        self.clips += rollout_state.step == 3\n"
        "        if self.clips == FAILING: raise RuntimeError('lost')\n"
        "        return TemporalCachePlan([ChunkDecision(m.chunk_id, 'keep') for m in chunk_meta_list])\n"
    )
    text, place = policy.read_text(), folders[1].split(",")[0]
    args = ["--policy", str(policy), "--budget", "8", "--data-dir", place, *folders[2:]]
    policy.write_text(text.replace("FAILING", "1"))
    status, _, err = run(capsys, *args)
    assert status == 2 and "on clip 0, step 3: raised RuntimeError: lost" in err
    status, lines, err = run(capsys, *args, "--lenient")
    assert status == 0 and "n_clips=1" in lines[0]
    assert "clip 0 failed: policy" in err and "1 of 2 clips failed and are left out of the means" in err
    policy.write_text(text.replace("FAILING", "self.clips"))
    assert run(capsys, *args, "--lenient")[0] == 2, "nothing is left"


def test_the_clips_that_are_played_can_be_listed(capsys, folders, tmp_path):
    listed, place = tmp_path / "clips.json", folders[1].split(",")[0]
    status, lines, _ = run(capsys, "--policy", "recent_fill", "--data-dir", place, "--list-clips", str(listed))
    assert status == 0 and lines == [f"2 clips of ucf101_short_prediction listed in {listed}"]
    content = json.loads(listed.read_text())
    assert sorted(clip["path"] for clip in content["clips"]) == ["0.mp4", "1.mp4"] and content["num_frames"] == 16


def test_what_does_not_fit_is_one_sentence(capsys, folders, tmp_path):
    for args, message in (
        (["--suite", "--policy", "full_history"], "the suite has budgets, under which full_history is no policy"),
        (["--policy", "recent_fill", "--steps", "0"], "--steps needs at least 1 ODE step, got 0"),
        (["--suite", "--policy", "recent_fill", "--data-dir", "a,b,c"], "--data-dir takes one or two values"),
        (["--policy", "recent_fill", "--noise", "cpu"], "noise"),
        (
            ["--policy", "recent_fill", "--data-dir", str(tmp_path / "ucf"), "--file-order", "gone"],
            "the list gone cannot be read",
        ),
    ):
        status, _, err = run(capsys, *args)
        assert status == 2 and message in err and "Traceback" not in err
