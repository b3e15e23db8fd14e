"""Several continuations of a clip: their seeds, that they are those of single rollouts, and the best and mean of the tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from far_env import cli
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.evaluate import evaluate_grid
from far_env.metrics import psnr
from far_env.rollout.noise import rollout_noise, seeds_text, trajectory, trajectory_seeds
from far_env.rollout.reference import reference_rollout
from tests.evaluation.test_records import policies

METRICS = ("psnr", "ssim", "far_psnr")
SEEDS, TRAJECTORIES, CLIPS = (0, 2), 3, 2


def played(workload, folder=None, trajectories=TRAJECTORIES, **options):
    seeds = [seed for first in SEEDS for seed in trajectory_seeds(first, trajectories)]
    options = {"metrics": METRICS, "batch_size": 4, "progress": False, "memo_bytes": 0} | options
    return evaluate_grid([workload], [4], policies("recent_fill"), range(CLIPS), seeds=seeds, out=folder, **options)


@pytest.fixture(scope="module")
def results(tiny_workload):
    return played(tiny_workload)


def test_no_two_trajectories_share_their_noise():
    seeds = [seed + clip for seed in trajectory_seeds(42, 100) for clip in range(0, 20_000, 3000)]
    assert len(set(seeds)) == len(seeds)
    assert trajectory_seeds(42, 1) == [42] and trajectory_seeds(42, 3)[:2] == trajectory_seeds(42, 2)
    assert [trajectory(seed + 19_999) for seed in trajectory_seeds(42, 3)] == [0, 1, 2]
    first, second = (rollout_noise(seed, 1, (4, 8, 8)) for seed in trajectory_seeds(42, 2))
    assert abs(np.corrcoef(first.flatten(), second.flatten())[0, 1]) < 0.2


def test_seeds_of_trajectories_are_named_by_the_seed_that_they_belong_to():
    assert seeds_text([42]) == "42" and seeds_text([0, 2, 4, 6]) == "0, 2, 4, 6"
    assert seeds_text(trajectory_seeds(42, 100)) == "42 (100 trajectories)"
    assert seeds_text(trajectory_seeds(0, 3) + trajectory_seeds(2, 3)) == "0, 2 (3 trajectories each)"
    ragged = [*trajectory_seeds(0, 3), 2]
    assert seeds_text(ragged) == ", ".join(map(str, ragged))


def test_a_trajectory_is_the_rollout_of_its_seed(results, tiny_workload):
    (record,) = [record for record in results.records if (record.clip, record.seed) == (1, 2_000_002)]
    clip = tiny_workload.clips.clip("test", 1)
    expected = reference_rollout(tiny_workload, clip, policies("recent_fill")["recent_fill"], 4, 2_000_003)
    truth = torch.from_numpy(clip.frames[5:])
    assert record.metrics["psnr"] == pytest.approx(psnr(expected.frames, truth).item(), abs=1e-3)


def test_trajectories_do_not_depend_on_the_batch(results, tiny_workload):
    alone = {(r.clip, r.seed): r.latents_sha256 for r in played(tiny_workload, batch_size=1).records}
    assert alone == {(r.clip, r.seed): r.latents_sha256 for r in results.records}
    assert len(set(alone.values())) == CLIPS * len(SEEDS) * TRAJECTORIES


def test_best_and_mean_are_those_of_the_records(results, tiny_workload):
    table = tabulate(results, tiny_workload.name, 4, range(CLIPS), SEEDS, trajectories=TRAJECTORIES)
    values = {metric: np.zeros((CLIPS, len(SEEDS), TRAJECTORIES)) for metric in METRICS}
    for record in results.records:
        for metric in METRICS:
            values[metric][record.clip, SEEDS.index(record.seed % 1_000_000), record.seed // 1_000_000] = record.metrics[metric]
        assert record.metrics["far_psnr"] == pytest.approx(np.mean(record.psnr_per_frame), abs=1e-4)
    summary = table.summary()["policies"]["recent_fill"]
    for metric in METRICS:
        assert values[metric].std(axis=2).min() > 0
        assert summary[metric]["mean"] == pytest.approx(values[metric].mean())
        assert summary[f"best_{metric}"]["mean"] == pytest.approx(values[metric].max(axis=2).mean())


def test_of_a_distance_the_best_is_the_lowest(results, tiny_workload, random_alexnet):
    table = tabulate(played(tiny_workload, metrics=("lpips",)), tiny_workload.name, 4, range(CLIPS), SEEDS, None, TRAJECTORIES)
    scores = table.scores["recent_fill"]["lpips"]
    np.testing.assert_array_equal(table.best("recent_fill", "lpips")[:, 1], scores[:, TRAJECTORIES:].min(axis=1))


def test_a_large_seed_is_not_taken_for_a_trajectory(tiny_workload, tmp_path):
    evaluate_grid(
        [tiny_workload], [4], policies("recent_fill"), [0], seeds=[1_000_007], out=tmp_path, show_clips=1, progress=False
    )
    assert [path.name for path in tmp_path.rglob("s*.png")] == ["s1000007_c0.png"]


def evaluate(capsys, host, *args):
    place = ["--host", str(host), "--device", "cpu", "--clips", "2", "--metrics", "psnr,far_psnr", "--policies", "recent_fill"]
    status = cli.main(["evaluate", *place, *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_states_their_number_and_more_can_be_added(capsys, tiny_host_folder, tmp_path):
    args = ("--seeds", "0,2", "--out", str(tmp_path / "results"))
    assert evaluate(capsys, tiny_host_folder, *args, "--trajectories", "2")[0] == 0
    before = (tmp_path / "results" / "records.jsonl").read_text()
    status, out, _ = evaluate(capsys, tiny_host_folder, *args, "--trajectories", "3")
    records = (tmp_path / "results" / "records.jsonl").read_text()
    assert status == 0 and records.startswith(before) and len(records.splitlines()) == 12
    assert "PSNR dB, mean" in out and "best of 3" in out and "noise seed 0, 2 (3 trajectories each) + clip id" in out
    _, out, _ = evaluate(capsys, tiny_host_folder, *args, "--trajectories", "3", "--json", "-")
    summary = json.loads(out)
    row = summary["policies"]["recent_fill"]
    assert summary["trajectories"] == 3 and row["best_psnr"]["mean"] > row["psnr"]["mean"]
    assert row["far_psnr"]["mean"] > row["psnr"]["mean"], "a mean of logarithms is above the logarithm of a mean"
    pictures = {path.name for path in (tmp_path / "results" / "frames").rglob("s*.png")}
    assert pictures == {f"s{seed}_c{clip}.png" for seed in (0, 2) for clip in (0, 1)}, "one of each clip's trajectories"
    assert cli.main(["validate", str(tmp_path / "results"), "--host", str(tiny_host_folder), "--device", "cpu"]) == 0
    assert "12 match" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "results"), "--out", str(tmp_path / "report.html")]) == 0
    assert '"seedsText":"0, 2 (3 trajectories each)"' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--trajectories", "0"), "the number of trajectories must be at least 1, got 0"),
        (("--trajectories", "2", "--seeds", "1000000"), "noise seeds must be below 1,000,000, got 1000000"),
        (("--metrics", "far_pnsr"), "did you mean 'far_psnr'?"),
    ],
)
def test_what_cannot_be_is_refused(capsys, tiny_host_folder, args, sentence):
    status, _, error = evaluate(capsys, tiny_host_folder, *args)
    assert status == 2 and sentence in error
