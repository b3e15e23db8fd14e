"""Agents that learn under several budgets and in several workloads at once."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from far_env.agents.checkpoints import load_scorer
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings
from far_env.agents.expert_data import load_expert_data
from far_env.agents.graph_decisions import GraphDecisions
from far_env.agents.imitation import imitation_loss, last_round
from far_env.agents.network import network_with_weights
from far_env.agents.ppo import PPOStage
from far_env.agents.trainer import EXPERT_DATA_FOLDER, make_workloads, train
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.workloads import make_workload, resolve_budgets
from tests.agents.stopping import stopped_after_checkpoints


def test_budgets_are_one_or_several():
    assert resolve_budgets(4) == (4,) == resolve_budgets("4") == resolve_budgets([4, "4"])
    assert resolve_budgets("8, 2,tight_history_budget,2") == (2, 4, 8)
    for wrong, message in (
        ([], "a budget is needed"),
        ("4,0", "at least 1 frame"),
        ("4,,8", "unknown budget"),
        ([2.5], "whole"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_budgets(wrong)


def test_each_episode_draws_a_budget(tiny_workload):
    env = FrameRetentionEnv(tiny_workload, [2, 4, 8])
    drawn = Counter()
    for seed in range(30):
        obs, info = env.reset(seed=seed)
        budget = info["max_frames"]
        drawn[budget] += 1
        assert len(obs["mask"]) == 9 and obs["budget"][0] == pytest.approx(budget / 9)
        assert obs["mask"].sum() == max(budget, 5) + 1
        obs, _, _, _, info = env.step(np.ones(9, dtype=np.int8))
        assert info["max_frames"] == budget and obs["mask"].sum() == budget + 1
    assert set(drawn) == {2, 4, 8} and min(drawn.values()) > 3
    # one budget does not change the draws of clips
    assert FrameRetentionEnv(tiny_workload, 4).reset(seed=3)[1]["clip_id"] == env.reset(seed=3)[1]["clip_id"]
    assert env.reset(options={"budget": 8})[1]["max_frames"] == 8
    with pytest.raises(ValueError, match="budget 5 is none of those that the environment was made with: 2, 4, 8"):
        env.reset(options={"budget": 5})


def test_rows_with_other_budgets_are_the_episodes_of_their_own(tiny_workload):
    """Rewards, states in the middle of episodes, and observations."""
    options = {"telescoping": True, "metrics": ("psnr",)}
    many = FrameRetentionVectorEnv(2, tiny_workload, [2, 8], autoreset_mode="DISABLED", **options)
    many.reset(options={"clip_id": [1, 2], "budget": [2, 8]})
    action = np.array([1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=np.int8)
    totals = np.zeros(2)
    ends = {}
    for count in range(12):
        state = many.state_dict()
        many.load_state_dict(state)
        if many._done.any():
            rows = many._done.copy()
            many.reset(options={"reset_mask": rows, "clip_id": [1, 2], "budget": [2, 8]})
        _, rewards, dones, _, infos = many.step(np.stack([action, action]))
        for row in np.flatnonzero(dones):
            ends.setdefault(int(row), (totals[row] + rewards[row], float(infos["psnr"][row]), count))
        totals = np.where(dones, 0, totals + rewards)
        if len(ends) == 2:
            break
    for row, (budget, clip_id) in enumerate(((2, 1), (8, 2))):
        single = FrameRetentionEnv(tiny_workload, [2, 8], **options)
        single.reset(options={"clip_id": clip_id, "budget": budget})
        total, done = 0.0, False
        while not done:
            _, reward, done, _, info = single.step(action)
            total += reward
        assert total == pytest.approx(info["psnr"], abs=1e-3)
        assert ends[row][:2] == pytest.approx((total, info["psnr"]), abs=1e-3)


@pytest.fixture
def config(tiny_host_folder, tmp_path) -> AgentTraining:
    return AgentTraining(
        workload="pan,cuts",
        budget="2,6",
        ppo=PPOSettings(total_timesteps=96, num_envs=4, n_steps=8, batch_size=16, n_epochs=2),
        imitation=ImitationSettings(true_clips=4, rounds=("rollouts 4",), epochs=1),
        network=NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2),
        host=str(tiny_host_folder),
        device="cpu",
        run_dir=str(tmp_path / "run"),
        train_clips=8,
        validation_clips=4,
        validate_every=1,
        test_clips=2,
        table=("recent_fill",),
    )


def test_one_scorer_learns_in_two_worlds_under_two_budgets_and_resumes(config, tmp_path):
    whole = dataclasses.replace(config, run_dir=str(tmp_path / "whole"))
    train(whole)
    results = json.loads((tmp_path / "whole" / "results.json").read_text())["tables"]
    assert [(result["workload"], result["budget"]) for result in results] == [("pan", 2), ("pan", 6), ("cuts", 2), ("cuts", 6)]
    header = (tmp_path / "whole" / "progress_00000000.csv").read_text().split("\n")[0]
    assert all(f"validation/psnr_{world}_{budget}" in header for world in ("pan", "cuts") for budget in (2, 6))
    checkpoint = torch.load(tmp_path / "whole" / "checkpoint.ckpt", weights_only=True)

    with stopped_after_checkpoints(2), pytest.raises(KeyboardInterrupt):
        train(config)
    train(dataclasses.replace(config, resume=True))
    resumed = torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)
    for key, value in checkpoint["policy"].items():
        torch.testing.assert_close(resumed["policy"][key], value, atol=1e-4, rtol=1e-3)
    assert load_scorer(tmp_path / "run")[1]["trained_on"] == "pan, cuts, budget 2, 6, first 8 train clips, seed 0"


def test_what_a_stage_does_not_play_is_imitated_between_its_updates(config, tmp_path):
    """It is learned there, and a stopped run ends as one that was not stopped."""
    settings = dataclasses.replace(config.ppo, workload="cuts", imitation_steps=12, critic_warmup_updates=1)
    config = dataclasses.replace(config, ppo=settings)
    whole = dataclasses.replace(config, run_dir=str(tmp_path / "whole"))
    without = dataclasses.replace(
        config, run_dir=str(tmp_path / "without"), ppo=dataclasses.replace(settings, imitation_steps=0)
    )
    for run in (whole, without):
        train(run)
    workloads = make_workloads(config)
    [(number, part)] = last_round(config, workloads, (2, 6), ["pan"])
    assert (number, part.workload.name, part.kind) == (1, "pan", "rollouts")
    data = load_expert_data(part.path(tmp_path / "whole" / EXPERT_DATA_FOLDER, number))
    decisions = GraphDecisions(data, config.network)
    batch = decisions.batch(np.arange(len(decisions.calls)))

    def loss(name):
        saved = torch.load(tmp_path / name / "checkpoint.ckpt", weights_only=True)["policy"]
        prefix = "mlp_extractor.actor."
        actor = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        return imitation_loss(network_with_weights(config.network, actor), batch, config.imitation).item()

    assert loss("whole") < loss("without") - 0.05

    with stopped_after_checkpoints(3), pytest.raises(KeyboardInterrupt):
        train(config)
    train(dataclasses.replace(config, resume=True))
    ends = [torch.load(tmp_path / name / "checkpoint.ckpt", weights_only=True) for name in ("whole", "run")]
    for key, value in ends[0]["policy"].items():
        torch.testing.assert_close(ends[1]["policy"][key], value, atol=1e-4, rtol=1e-3)

    few = dataclasses.replace(config, imitation=ImitationSettings(true_clips=1, epochs=1), run_dir=str(tmp_path / "few"))
    with pytest.raises(ValueError, match="the last round of imitation has no clips of pan; give it more clips"):
        train(few)

    for wrong in (
        dataclasses.replace(config, imitation=ImitationSettings(true_clips=0)),
        dataclasses.replace(config, ppo=dataclasses.replace(settings, workload=None)),
    ):
        with pytest.raises(ValueError, match=r"ppo\.imitation_steps is 12, for which there must be imitation before"):
            make_workloads(wrong)


def test_rows_are_shared_evenly(config):
    with pytest.raises(ValueError, match="validation_clips is 1, fewer than the 2 budgets that share them"):
        train(dataclasses.replace(config, validation_clips=1))
    with pytest.raises(ValueError, match="num_envs is 5, which 2 workloads cannot share evenly"):
        train(dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, num_envs=5)))
    assert [workload.name for workload in make_workloads(config)] == ["pan", "cuts"]
    assert make_workload("pan", host=config.host).num_predict == 11


def test_a_stage_of_ppo_may_use_some_of_the_workloads(config, tmp_path):
    some = dataclasses.replace(config.ppo, workload="cuts", num_envs=3)
    chosen = dataclasses.replace(config, ppo=some)
    workloads = make_workloads(chosen)
    stage = PPOStage("PPO", chosen, workloads, (2, 6), some, FrameRetentionVectorEnv, tmp_path, tmp_path)
    assert [(env.episodes.workload.name, env.num_envs) for env in stage.make_envs()] == [("cuts", 3)]
    both = dataclasses.replace(stage, config=config, settings=config.ppo)
    assert [(env.episodes.workload.name, env.num_envs) for env in both.make_envs()] == [("pan", 2), ("cuts", 2)]
    with pytest.raises(ValueError, match=r"ppo\.workload names orbit, which pan,cuts does not contain"):
        make_workloads(dataclasses.replace(config, ppo=dataclasses.replace(some, workload="cuts,orbit")))
    with pytest.raises(ValueError, match=r"surrogate\.num_envs is 3, which 2 workloads cannot share evenly"):
        make_workloads(dataclasses.replace(config, surrogate=dataclasses.replace(config.ppo, num_envs=3)))
