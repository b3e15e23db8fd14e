"""``far-env evaluate --memory tokens``: its records against rollouts, resuming, validation, report, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from far_env import cli
from far_env.evaluation.report import report_data
from far_env.evaluation.results_folder import load
from far_env.evaluation.statistics import mean_interval
from far_env.host.weights import save_host
from far_env.metrics import psnr
from far_env.policies import load_token_policy
from far_env.rollout.reference import reference_rollout
from far_env.rollout.streaming import play_streaming
from far_env.workloads import make_workload
from tests.conftest import TINY_DCAE, TINY_FAR_LONG


@pytest.fixture(scope="module")
def host(tmp_path_factory, tiny_long_host):
    """A folder with the tiny FAR-Long, and two ODE steps."""
    folder = tmp_path_factory.mktemp("tiny_long")
    configs = {"transformer": TINY_FAR_LONG, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(folder, tiny_long_host.transformer, tiny_long_host.autoencoder, configs, frame_size=64, num_steps=2)
    return folder


def evaluate(capsys, host, out, *args):
    place = ["--workload", "pan", "--host", str(host), "--device", "cpu", "--metrics", "psnr", "--memory", "tokens"]
    place += ["--show-clips", "1"]
    status = cli.main(["evaluate", *place, *([] if out is None else ["--out", str(out)]), *args])
    return status, capsys.readouterr()


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory):
    """Three clips of four policies under two budgets."""
    out = tmp_path_factory.mktemp("results") / "tokens"
    policies = "recent_fill,h2o:f_recent=0.25,packforcing_coarse,full_history"
    args = ["--workload", "pan", "--host", str(host), "--device", "cpu", "--metrics", "psnr", "--memory", "tokens"]
    args += ["--out", str(out), "--clips", "3", "--batch-size", "2", "--show-clips", "1", "--policies", policies]
    assert cli.main(["evaluate", *args, "--budget", "48,64"]) == 0
    return out


@pytest.mark.parametrize("name", ["h2o:f_recent=0.25", "packforcing_coarse", "full_history"])
def test_a_record_is_the_rollout(folder, host, name):
    results = load(folder)
    assert results.settings.memory == "tokens" and results.settings.made_with["pan"]["max_gap"] == 1
    budget = 9999 if name == "full_history" else 64
    record = next(r for r in results.records if (r.policy, r.budget, r.clip) == (name, budget, 2))
    workload = make_workload("pan", host=host, device="cpu")
    clip, policy = workload.clips.clip("test", 2), load_token_policy(name)
    (rollout,) = play_streaming(workload, [clip], [44], policy, None if policy is None else 64)
    with torch.no_grad():
        frames = workload.host.autoencoder.decode(rollout.latents[None])[0]
    truth = torch.from_numpy(clip.frames[5:])
    assert record.metrics["psnr"] == pytest.approx(psnr(frames, truth).item(), abs=1e-3)
    plan = [(d.step, list(d.full), list(d.coarse), d.tokens) for d in rollout.decisions if d.step >= 0]
    assert [(e["step"], e["kept"], e["demoted"], e["tokens"]) for e in record.plan] == plan
    assert record.facts["memory"] == "tokens" and (record.decision_ms is None) == (policy is None)
    if policy is None:  # within the window, the specification
        expected = reference_rollout(workload, clip, None, 9999, 44).latents[0]
        torch.testing.assert_close(rollout.latents[0], expected, atol=1e-4, rtol=0)
    else:
        assert record.plan and max(entry["tokens"] for entry in record.plan) <= 64


def test_the_table_names_tokens_and_the_same_command_adds_episodes(capsys, folder, host):
    before = (folder / "records.jsonl").read_text()
    assert before.count("\n") == 3 * (3 * 2 + 1)
    status, captured = evaluate(
        capsys, host, folder, "--clips", "3", "--policies", "recent_fill,h2o:f_recent=0.25", "--budget", "64"
    )
    assert status == 0 and "budget 64 tokens" in captured.out
    assert (folder / "records.jsonl").read_text() == before, "nothing is played twice"
    scores = {
        name: np.array([r.metrics["psnr"] for r in load(folder).records if (r.policy, r.budget) == (name, 64)])
        for name in ("recent_fill", "h2o:f_recent=0.25")
    }
    difference = mean_interval((scores["h2o:f_recent=0.25"] - scores["recent_fill"])[:, None])
    assert f"{difference.mean:+.2f}" in next(line for line in captured.out.splitlines() if line.startswith("h2o"))


def test_records_are_validated_by_playing_their_policies_again(capsys, folder, tmp_path):
    assert cli.main(["validate", str(folder), "--sample", "8", "--device", "cpu"]) == 0
    assert "8 match" in capsys.readouterr().out
    copy = tmp_path / "changed"
    copy.mkdir()
    (copy / "evaluation.json").write_bytes((folder / "evaluation.json").read_bytes())
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["policy"].startswith("h2o") and line["budget"] == 48][:2]
    chosen[0]["metrics"]["psnr"] += 0.1
    chosen[1]["plan"][-1]["kept"] = chosen[1]["plan"][-1]["kept"][1:]
    (copy / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    assert cli.main(["validate", str(copy), "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "its psnr is" in out and "keeps other tokens" in out and "2 differ" in out


def test_the_report_shows_budgets_of_tokens(folder):
    data = report_data(load(folder), progress=False)
    assert data["memory"] == "tokens" and {group["budget"] for group in data["groups"]} == {48, 64}
    assert any(run["plan"] for clip in data["clips"] for run in clip["runs"])


def test_folders_of_frames_and_of_tokens_are_not_mixed(capsys, folder, host, tmp_path):
    place = ["--workload", "pan", "--host", str(host), "--device", "cpu", "--metrics", "psnr", "--clips", "1"]
    frames = ["evaluate", *place, "--policies", "recent_fill", "--out"]
    assert cli.main([*frames, str(folder)]) == 2
    assert "holds an evaluation with memory tokens, not frames" in capsys.readouterr().err
    assert cli.main([*frames, str(tmp_path / "frames")]) == 0
    settings = json.loads((tmp_path / "frames" / "evaluation.json").read_text())
    assert settings.pop("memory") == "frames"
    (tmp_path / "frames" / "evaluation.json").write_text(json.dumps(settings))  # as written before there was a choice
    assert load(tmp_path / "frames").settings.memory == "frames"
    status, captured = evaluate(capsys, host, folder, "--policies", "recent_fill", "--budget", "64", "--max-gap", "3")
    assert status == 2 and "max_gap of pan 1, not 3" in captured.err


def test_bad_input_is_one_sentence(capsys, host, tmp_path):
    out, policy = tmp_path / "out", ["--policies", "recent_fill"]
    for args, fragment in (
        (["--budget", "15", *policy], "hold the newest frame, which has 16 tokens"),
        (["--budget", "9999", *policy], "below 9999"),
        (["--budget", "tight_history_budget", *policy], "--budget takes whole numbers"),
        (["--budget", "64", "--policies", "k_center"], "no token policy 'k_center'"),
        (["--budget", "64", "--intervene", "swap", *policy], "replace whole frames"),
        (["--budget", "64", "--max-gap", "-1", *policy], "--max-gap"),
        (["--budget", "64", *policy, "--memory", "bytes"], "bytes"),
    ):
        status, captured = evaluate(capsys, host, out, "--clips", "1", *args)
        assert status == 2 and fragment in captured.err.splitlines()[-1]
        assert not (out / "records.jsonl").exists()
    assert cli.main(["extended"]) == 2
    assert "far-env evaluate --memory tokens" in capsys.readouterr().err


def test_a_policy_that_needs_coarse_frames_has_no_row_on_a_far(capsys, tiny_host_folder):
    args = ["--clips", "1", "--budget", "64", "--policies", "far_two_level,recent_fill"]
    place = ["--workload", "pan", "--host", str(tiny_host_folder), "--device", "cpu", "--metrics", "psnr", "--memory", "tokens"]
    assert cli.main(["evaluate", *place, *args]) == 2
    captured = capsys.readouterr()
    assert "needs a host with coarse frames" in captured.err and "recent_fill" in captured.out
