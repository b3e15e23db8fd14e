"""Training agents: reproducible, resumable, and able to learn."""

from __future__ import annotations

import csv
import dataclasses
import json
import re

import pytest
import torch

from far_env import tensor_files
from far_env.agents.checkpoints import load_scorer
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings, RewardSettings
from far_env.agents.trainer import make_workloads, train
from far_env.agents.training_logs import log_writers
from far_env.config import load_yaml, save_yaml
from far_env.host import precision
from far_env.policies import load_policy
from far_env.provenance import run_facts, save_facts
from tests.agents.stopping import stopped_after_checkpoints
from tests.damage import assert_sentence


@pytest.fixture
def config(tiny_host_folder, tmp_path) -> AgentTraining:
    return AgentTraining(
        ppo=PPOSettings(total_timesteps=96, num_envs=4, n_steps=8, batch_size=16, n_epochs=2),
        network=NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2),
        host=str(tiny_host_folder),
        device="cpu",
        run_dir=str(tmp_path / "run"),
        train_clips=8,
        validation_clips=3,
        validate_every=1,
        test_clips=3,
        table=("recent_fill", "full_history"),
    )


def weights_of(config: AgentTraining) -> dict[str, torch.Tensor]:
    from pathlib import Path

    return torch.load(Path(config.run_dir) / "checkpoint.ckpt", weights_only=True)["policy"]


def test_two_runs_with_one_seed_agree_and_another_seed_differs(config, tmp_path, capsys):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_config = dataclasses.replace(config, run_dir=str(tmp_path / name), seed=seed)
        train(run_config)
        runs.append(weights_of(run_config))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not all(torch.equal(runs[0][key], runs[2][key]) for key in runs[0])
    printed = capsys.readouterr().out
    assert "learned" in printed and "PSNR − recent_fill [95 %]" in printed and "far-env export" in printed


def test_a_run_leaves_everything_its_folder_should_hold(config, tmp_path, capsys):
    train(config)
    log = capsys.readouterr().err
    assert re.search(r"PPO with the host: 96/96 decisions, .* decisions/s, validation psnr \d+\.\d\d\n", log)
    assert "validation: 3/3 clips" in log
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"policy.safetensors", "policy.json", "config.yaml", "results.json", "results.txt", "comparison.png"} <= names
    assert {"checkpoint.ckpt", "progress_00000000.csv", "run.json"} <= names and any(
        name.startswith("events") for name in names
    )
    assert not any(name.endswith(".part") for name in names)
    (results,) = json.loads((folder / "results.json").read_text())["tables"]
    assert set(results["policies"]) == {"learned", "recent_fill", "full_history"}
    assert results["policies"]["learned"]["psnr_minus_recent_fill"]["n"] == 3
    network, facts = load_scorer(folder)
    assert facts["network"] == {**dataclasses.asdict(config.network), "signals": []}
    assert "pan, budget 4" in facts["trained_on"]
    assert load_policy(str(folder)).scorer.weights.keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        train(config)


@pytest.mark.parametrize(
    "size",
    [{}, {"dropped_frames": False}, {"signals": ("lat_cos", "denoise_gap", "expected_mass")}],
    ids=lambda size: "+".join(size) or "default",
)
def test_a_resumed_run_continues_counters_and_ends_as_the_whole_one(config, tmp_path, monkeypatch, size):
    config = dataclasses.replace(config, network=dataclasses.replace(config.network, **size))
    whole = dataclasses.replace(config, run_dir=str(tmp_path / "whole"))
    train(whole)
    with stopped_after_checkpoints(2) as saves, pytest.raises(KeyboardInterrupt):
        train(config)
    assert saves == [0, 32]
    first = (tmp_path / "run" / "progress_00000000.csv").read_text()
    train(dataclasses.replace(config, resume=True))
    state = torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)
    assert state["num_timesteps"] == 96 and state["n_updates"] == 6
    assert (tmp_path / "run" / "progress_00000000.csv").read_text() == first
    columns = list(csv.DictReader((tmp_path / "run" / "progress_00000032.csv").open()))
    assert [float(line["time/iterations"]) for line in columns if line["time/iterations"]] == [2, 3]
    assert [line["validation/psnr"] for line in columns][-1], "the last validation is logged too"
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())) == 2
    expected, actual = weights_of(whole), weights_of(config)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        train(dataclasses.replace(config, resume=True, seed=5))
    # a finished run trains no further, but shows its table again
    train(dataclasses.replace(config, resume=True))
    assert torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)["num_timesteps"] == 96
    monkeypatch.setitem(state, "hosts", ["00000000"])
    torch.save(state, tmp_path / "run" / "checkpoint.ckpt")
    with pytest.raises(ValueError, match="was made with host 00000000"):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: dataclasses.replace(c, validation_clips=0), "validation_clips must be above 0, got 0"),
        (
            lambda c: dataclasses.replace(c, ppo=PPOSettings(total_timesteps=-1)),
            "total_timesteps cannot be negative, got -1",
        ),
        (lambda c: dataclasses.replace(c, reward=RewardSettings(scale=-1.0)), "scale must be above 0"),
        (lambda c: dataclasses.replace(c, test_clips=5000), "test_clips is 5000, but pan/test has 4096"),
        (lambda c: dataclasses.replace(c, budget="full_history_budget"), "leaves nothing to decide"),
        (lambda c: dataclasses.replace(c, workload="pam"), "did you mean 'pan'"),
    ],
)
def test_settings_that_would_fail_later_are_refused_before_anything_is_written(config, make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(make(config))
    assert not (tmp_path / "run").exists()


def test_ppo_begins_with_what_imitation_learned_and_a_cold_critic_leaves_it_alone(config, tmp_path):
    run_config = dataclasses.replace(
        config,
        imitation=ImitationSettings(true_clips=4, rounds=("rollouts 4",), epochs=1),
        ppo=dataclasses.replace(config.ppo, critic_warmup_updates=3),
    )
    train(run_config)
    alone = dataclasses.replace(run_config, ppo=PPOSettings(total_timesteps=0), run_dir=str(tmp_path / "alone"))
    train(alone)
    imitated, trained = load_scorer(tmp_path / "alone")[0].state_dict(), weights_of(run_config)
    for key, value in imitated.items():
        torch.testing.assert_close(trained[f"mlp_extractor.actor.{key}"], value)
    with pytest.raises(ValueError, match="nothing would be learned"):
        dataclasses.replace(config, ppo=PPOSettings(total_timesteps=0))


def test_weights_whose_gradients_are_small_against_adams_epsilon_hardly_move(config, tmp_path):
    changes = {"usual": {}, "large": {"adam_epsilon": 1e4}, "still": {"learning_rate": 1e-12}}
    weights = {}
    for name, values in changes.items():
        run_config = dataclasses.replace(
            config, ppo=dataclasses.replace(config.ppo, **values), run_dir=str(tmp_path / name), test_clips=1
        )
        train(run_config)
        weights[name] = weights_of(run_config)
    moved = {name: max(float((own[key] - weights["still"][key]).abs().max()) for key in own) for name, own in weights.items()}
    assert moved["large"] < 1e-6 and moved["usual"] > 1e-3


def test_all_stages_and_tables_follow_the_feedback_of_the_configuration(config, tmp_path):
    stages = {"imitation": ImitationSettings(true_clips=4, rounds=("rollouts 2",), epochs=1), "surrogate": config.ppo}
    save_yaml(dataclasses.replace(config, **stages, clip_options={"objects": 2}), tmp_path / "config.yaml")
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("feedback: true\n")
    text = (tmp_path / "config.yaml").read_text().replace("feedback: null\n", "")
    (tmp_path / "config.yaml").write_text(text)
    run_config = load_yaml(AgentTraining, tmp_path / "config.yaml")
    train(run_config)
    folder = tmp_path / "run"
    results = (folder / "results.txt").read_text()
    assert "3 test clips with objects 2, " in results and "ODE steps, true frames fed back; host" in results
    assert json.loads((folder / "policy.json").read_text())["trained_on"].endswith(
        "first 8 train clips with objects 2, seed 0, true frames fed back"
    )
    assert json.loads((folder / "expert_data" / "index.json").read_text())["feedback"] == ["true"]
    assert load_yaml(AgentTraining, folder / "config.yaml").feedback == "true"
    with pytest.raises(ValueError, match=r"holds a run with other settings \(feedback\)"):
        train(dataclasses.replace(run_config, feedback="generated", resume=True))


def test_an_lpips_reward_counts_negatively():
    assert RewardSettings(metric="lpips").sign == -1 and RewardSettings(metric="psnr").sign == 1


def test_every_line_of_a_log_says_after_how_many_decisions_it_was_written(config, tmp_path):
    train(config)
    lines = list(csv.DictReader((tmp_path / "run" / "progress_00000000.csv").open()))
    assert [int(line["time/total_timesteps"]) for line in lines] == [0, 32, 32, 64, 64, 96, 96]
    validated = [(line["validation/timesteps"], line["time/total_timesteps"]) for line in lines if line["validation/psnr"]]
    assert validated == [(str(decisions), str(decisions)) for decisions in (0, 32, 64, 96)]
    assert lines[-1]["train/n_updates"] == "6", "of the last update too"


def test_a_session_hides_what_earlier_ones_logged_after_their_checkpoint(tmp_path):
    header = "time/total_timesteps,value\n"
    texts = {"00000000": "0,1\n32,2\n64,3\n", "00000032": "64,5\n64,6\n96,7\n", "00000064": "96,8\n"}
    for begun, text in texts.items():
        (tmp_path / f"progress_{begun}.csv").write_text(header + text)
    log, events = log_writers(tmp_path, 64, 64)
    log.write({"value": 9, "time/total_timesteps": 96}, {"value": (), "time/total_timesteps": ()})
    events.close()
    found = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert found == {
        "progress_00000000.csv": header + "0,1\n32,2\n64,3\n",
        "progress_00000032.csv": header + "64,5\n64,6\n",
        "progress_00000064.csv": "value,time/total_timesteps\n9,96\n",
    }
    log_writers(tmp_path, 0, -1)[1].close()
    assert not any(tmp_path.glob("*.csv")), "without a checkpoint the stage begins again"


@pytest.mark.parametrize("line", [b"32,\xff", b"many,2", b"32,2,3", b"32," + b"9" * 200_000], ids=lambda line: repr(line[:8]))
def test_a_damaged_log_of_an_earlier_session_is_refused_in_one_sentence(tmp_path, line):
    path = tmp_path / "progress_00000000.csv"
    path.write_bytes(b"time/total_timesteps,value\n" + line + b"\n")
    with pytest.raises(ValueError, match="restore it, or delete it to go on without it") as refused:
        log_writers(tmp_path, 32, 32)
    assert_sentence(refused.value, path)
    log_writers(tmp_path, 0, -1)[1].close()
    assert not path.exists(), "without a checkpoint it is not needed"


def test_a_run_stopped_in_its_first_stages_is_not_continued_with_other_settings(config, tmp_path):
    own = dataclasses.replace(config, surrogate=config.ppo, ppo=PPOSettings(total_timesteps=0))
    with stopped_after_checkpoints(1), pytest.raises(KeyboardInterrupt):
        train(own)
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        train(own)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        train(dataclasses.replace(own, resume=True, seed=5))


def test_a_run_stopped_between_the_two_files_of_its_scorer_writes_both(config, tmp_path, monkeypatch):
    def stop(state, path):
        raise KeyboardInterrupt

    original = tensor_files.save_weights
    monkeypatch.setattr(tensor_files, "save_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert not (tmp_path / "run" / "policy.safetensors").exists()
    monkeypatch.setattr(tensor_files, "save_weights", original)
    train(dataclasses.replace(config, resume=True))
    best = torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)["best_weights"]
    assert all(torch.equal(value, best[key]) for key, value in load_scorer(tmp_path / "run")[0].state_dict().items())


def test_a_resumed_run_keeps_the_precision_that_its_first_session_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "_layer_seconds", lambda dtype, training: 1.0)  # no dtype is faster: float32
    own = dataclasses.replace(config, precision="auto")
    assert make_workloads(own)[0].host.dtype == torch.float32
    (tmp_path / "run").mkdir()
    save_facts(tmp_path / "run", run_facts(torch.device("cpu"), torch.bfloat16))
    save_facts(tmp_path / "run", run_facts(torch.device("cpu"), torch.float32))
    assert make_workloads(own)[0].host.dtype == torch.bfloat16
    assert make_workloads(config)[0].host.dtype == torch.float32, "a precision that was asked for is used"
