"""The command ``far-env extended``: its table against its numbers, its numbers against rollouts, resuming, errors."""

from __future__ import annotations

import json

import pytest
import torch

from far_env import cli
from far_env.evaluation.extended import RESULTS_FILE, Part, quality_figure
from far_env.evaluation.statistics import mean_interval
from far_env.host.weights import load_host, save_host
from far_env.metrics import psnr
from far_env.policies import load_policy
from far_env.rollout.extended import play_extended
from far_env.rollout.reference import reference_rollout
from far_env.workloads import make_workload
from tests.conftest import TINY_DCAE, TINY_FAR_LONG


@pytest.fixture(scope="module")
def host(tmp_path_factory, tiny_long_host):
    """A folder with the tiny FAR-Long, and two ODE steps."""
    folder = tmp_path_factory.mktemp("tiny_long")
    configs = {"transformer": TINY_FAR_LONG, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(folder, tiny_long_host.transformer, tiny_long_host.autoencoder, configs, frame_size=64, num_steps=2)
    return folder


def run(capsys, host, out, *args):
    place = ["--workload", "pan", "--host", str(host), "--device", "cpu", "--out", str(out)]
    status = cli.main(["extended", *place, *args])
    return status, capsys.readouterr()


def test_numbers_are_the_rollouts_and_a_stopped_run_goes_on(capsys, host, tmp_path, monkeypatch):
    args = [
        "--clips",
        "3",
        "--tokens",
        "40,64",
        "--policies",
        "recent_fill,packforcing_coarse,full_history",
        "--batch-size",
        "2",
    ]
    played = []

    def stop_at_third(*call, **options):
        played.append(call[4])
        if len(played) == 5:  # two batches per part
            raise KeyboardInterrupt
        return play_extended(*call, **options)

    with monkeypatch.context() as patch:
        patch.setattr("far_env.evaluation.extended.play_extended", stop_at_third)
        status, captured = run(capsys, host, tmp_path, *args)
        assert status == 130 and "the same command resumes" in captured.err
        assert len(json.loads((tmp_path / RESULTS_FILE).read_text())["parts"]) == 2
        status, captured = run(capsys, host, tmp_path, *args)
        assert status == 0 and played == [40] * 2 + [64] * 2 + [40] + [40] * 2 + [64] * 2, "finished parts are not played again"

    content = json.loads((tmp_path / RESULTS_FILE).read_text())
    parts = {(part.policy, part.token_budget): part for part in (Part(**values) for values in content["parts"])}
    assert len(parts) == 5 and content["settings"]["weights"] == load_host(host, "cpu").weights_hash
    workload = make_workload("pan", host=host, device="cpu")
    clip = workload.clips.clip("test", 2)
    truth = torch.from_numpy(clip.frames[5:])
    (rollout,) = play_extended(workload, [clip], [44], load_policy("packforcing_coarse"), 64)
    frames = workload.host.autoencoder.decode(rollout.latents[None])[0]
    part = parts["packforcing_coarse", 64]
    assert part.psnr[2] == pytest.approx(psnr(frames, truth).item(), abs=1e-3)
    assert part.tokens[2] == pytest.approx(sum(rollout.tokens) / 11)
    full = parts["full_history", None]
    expected = reference_rollout(workload, clip, None, 9999, 44).frames
    assert full.psnr[2] == pytest.approx(psnr(expected, truth).item(), abs=1e-3)
    # a window of six: five fine frames of 16 tokens, 0 to 10 coarse ones of 4
    assert full.tokens == [pytest.approx(5 * 16 + 5 * 4)] * 3

    rows = [line.split() for line in captured.out.splitlines()]
    row = next(row for row in rows if row[:2] == ["packforcing_coarse", "64"])
    interval = mean_interval(part.scores())
    assert row[2:6] == [f"{part.mean_tokens():.1f}", f"{interval.mean:.2f}", f"[{interval.low:.2f},", f"{interval.high:.2f}]"]
    difference = mean_interval(part.scores() - parts["recent_fill", 64].scores())
    assert row[6] == f"{difference.mean:+.2f}"
    assert "not the benchmark" in captured.out
    assert (tmp_path / "extended.png").stat().st_size > 1000 and "<svg" in (tmp_path / "extended.svg").read_text()
    assert len(json.loads((tmp_path / "run.json").read_text())) == 2


def test_the_figure_shows_means_and_intervals_where_the_tokens_are():
    parts = [Part("a", 64, {}, [20.0, 22.0], [50.0, 54.0]), Part("a", 32, {}, [18.0, 18.0], [30.0, 30.0])]
    parts.append(Part("full_history", None, {}, [25.0, None], [100.0, 100.0]))
    (axes,) = quality_figure(parts, "title").axes
    (line,) = (container[0] for container in axes.containers)
    assert line.get_xydata().tolist() == [[30, 18], [52, 21]]
    (level,) = (curve for curve in axes.lines if curve.get_label() == "full_history")
    assert set(level.get_ydata()) == {25}


def test_bad_input_is_one_sentence_before_any_rollout(capsys, host, tiny_host_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("far_env.evaluation.extended.play_extended", None)
    small = ["--clips", "1", "--policies", "recent_fill"]
    for args, where, fragment in (
        (["--tokens", "15"], host, "hold the newest frame, which has 16 tokens"),
        (["--tokens", "some"], host, "--tokens takes whole numbers from 0 on, got 'some'"),
        (["--tokens", ","], host, "--tokens names no token budget"),
        (["--seed", "-1"], host, "from 0 on"),
        (["--clips", "0"], host, "clips must be above 0"),
        (["--policies", "far_coars"], host, "no policy 'far_coars'"),
        (["--clips", "100000000"], host, "out of range"),
        ([], tiny_host_folder, "has no coarse frames"),
    ):
        status, captured = run(capsys, where, tmp_path / "out", *small, *args)
        assert status == 2 and fragment in captured.err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_folders_of_other_runs_are_refused(capsys, host, tmp_path):
    small = ["--clips", "1", "--tokens", "64", "--policies", "full_history"]
    (tmp_path / RESULTS_FILE).write_text("{")
    status, captured = run(capsys, host, tmp_path, *small)
    assert status == 2 and "is damaged" in captured.err
    (tmp_path / RESULTS_FILE).unlink()
    assert run(capsys, host, tmp_path, *small)[0] == 0
    status, captured = run(capsys, host, tmp_path, *small, "--seed", "7")
    assert status == 2 and "was made with noise_seed 42, not 7; choose another folder" in captured.err
