"""PPO with rollouts by actors is PPO in one process, for any number of actors and whatever is lost meanwhile."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from far_env.agents import rollout_actors
from far_env.agents.config import AgentTraining, NetworkConfig, PPOSettings, RewardSettings
from far_env.agents.trainer import train
from far_env.agents.training_callbacks import ValidationCheckpoint
from far_env.distributed.cluster import ActorSettings
from tests.agents.stopping import stopped_after_checkpoints

NETWORK = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2, signals=("lat_cos",))
STAGE = PPOSettings(total_timesteps=64, num_envs=8, n_steps=4, batch_size=16, n_epochs=1, groups=2)


@pytest.fixture(scope="module")
def config(tiny_host_folder):
    """A run with the surrogate and then with the host, in four groups of two rows: two of each workload."""
    return AgentTraining(
        surrogate=STAGE,
        ppo=STAGE,
        network=NETWORK,
        reward=RewardSettings(telescoping=True),
        workload="pan,cuts",
        budget="3,4",
        host=str(tiny_host_folder),
        device="cpu",
        train_clips=8,
        validation_clips=2,
        validate_every=2,
        test_clips=1,
        table=("recent_fill",),
    )


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The folder of that run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    train(dataclasses.replace(config, run_dir=str(folder)))
    return folder


def by_actors(config, cluster, folder, actors):
    return dataclasses.replace(config, run_dir=str(folder), ray=ActorSettings(actors, cluster.address), resume=True)


def state(folder: Path, stage: str = "."):
    return torch.load(folder / stage / "checkpoint.ckpt", weights_only=True)


def logged(folder: Path, stage: str = ".") -> list[dict[str, str]]:
    """What both stages have logged, without durations."""
    lines = [line for path in sorted((folder / stage).glob("progress_*.csv")) for line in csv.DictReader(path.open())]
    return [{key: value for key, value in line.items() if "time" not in key or "timesteps" in key} for line in lines]


def check_same(folder, alone):
    """The weights, the rows' states and the logged numbers, to the last bit."""
    for stage in ("surrogate", "."):
        expected, actual = state(alone, stage), state(folder, stage)
        for key, value in expected["policy"].items():
            assert torch.equal(actual["policy"][key], value), (stage, key)
        assert [row["remaining"].tolist() for row in actual["graphs"]] == [
            row["remaining"].tolist() for row in expected["graphs"]
        ]
        assert len(actual["envs"]) == 4 and actual["best_score"] == expected["best_score"]
        for own, other in zip(actual["envs"], expected["envs"], strict=True):
            assert own["episodes"]["clip_ids"] == other["episodes"]["clip_ids"] and own["generators"] == other["generators"]
        assert logged(folder, stage) == logged(alone, stage) != []
    weights = [(place / "policy.safetensors").read_bytes() for place in (folder, alone)]
    assert weights[0] == weights[1]


def test_actors_play_what_one_process_plays(config, alone, second_node, tmp_path):
    train(by_actors(config, second_node, tmp_path, 2))
    check_same(tmp_path, alone)


def test_killed_actors_lose_nothing(config, alone, second_node, tmp_path, monkeypatch, capsys):
    """One is killed before the first checkpoint of a stage, another one after it."""
    pids, steps = [], []
    check, step_async = rollout_actors.check_same, rollout_actors.ActorVecEnv.step_async

    def remember(here, there):
        check(here, there)
        pids.append(there["pid"])

    def kill_before(self, actions):
        steps.append(self)
        if len(steps) in (3, STAGE.total_timesteps // STAGE.num_envs + 6):
            os.kill(pids[-1], signal.SIGKILL)
        step_async(self, actions)

    monkeypatch.setattr(rollout_actors, "check_same", remember)
    monkeypatch.setattr(rollout_actors.ActorVecEnv, "step_async", kill_before)
    train(by_actors(config, second_node, tmp_path, 2))
    assert len(pids) == 2 + 1 + 2 + 1 and capsys.readouterr().err.count("another one repeats what it did") == 2
    check_same(tmp_path, alone)


def test_a_stopped_run_goes_on_with_another_number_of_actors(config, alone, cluster, tmp_path):
    with stopped_after_checkpoints(2, 5) as saves:
        for actors in (1, 0):
            with pytest.raises(KeyboardInterrupt):
                train(by_actors(config, cluster, tmp_path, actors))
        train(by_actors(config, cluster, tmp_path, 1))
    assert saves == [0, 32, 32, 64, 0, 0, 32, 64]
    for stage in ("surrogate", "."):
        expected, actual = state(alone, stage)["policy"], state(tmp_path, stage)["policy"]
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], atol=1e-4, rtol=1e-3)


def test_more_actors_than_groups_are_named(config, cluster, tmp_path, monkeypatch, capsys):
    single = dataclasses.replace(
        config, ppo=dataclasses.replace(STAGE, groups=1), surrogate=dataclasses.replace(STAGE, total_timesteps=0)
    )
    single = dataclasses.replace(single, workload="pan", budget=4)
    monkeypatch.setattr("far_env.distributed.cluster.check_resources", lambda *_: None)
    monkeypatch.setattr(ValidationCheckpoint, "_on_rollout_start", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(by_actors(single, cluster, tmp_path, 2))
    assert "1 of 2 actors play, one for each group of environments" in capsys.readouterr().err


def test_groups_share_the_environments_evenly(config):
    with pytest.raises(ValueError, match=r"ppo\.num_envs is 8, which 2 workloads with 3 groups each cannot share evenly"):
        assert dataclasses.replace(config, ppo=dataclasses.replace(STAGE, groups=3)).workload_names
