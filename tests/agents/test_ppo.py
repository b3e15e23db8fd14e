"""PPO's update against that of sb3-contrib, with the same rollouts."""

from __future__ import annotations

import pytest
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecMonitor

from far_env.agents.config import NetworkConfig
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.agents.eviction_policy import EvictionPolicy
from far_env.agents.ppo import ResumablePPO
from far_env.agents.surrogate import SurrogateVectorEnv

SHOWN = ("entropy_loss", "policy_gradient_loss", "value_loss", "approx_kl", "clip_fraction", "loss", "explained_variance")


@pytest.mark.parametrize("frozen", [False, True], ids=["both learn", "the critic learns alone"])
def test_an_update_is_that_of_sb3_bit_for_bit(tiny_workload, frozen):
    learned, logged = [], []
    for algorithm in (MaskablePPO, ResumablePPO):
        envs = [SurrogateVectorEnv(4, tiny_workload, 2, num_clips=8, telescoping=True, autoreset_mode="SAME_STEP")]
        network = NetworkConfig(width=8, edge_width=4, num_layers=1, num_heads=2)
        options = {"n_steps": 8, "batch_size": 12, "n_epochs": 2, "ent_coef": 0.1, "learning_rate": 0.01, "max_grad_norm": 0.1}
        env = VecMonitor(EvictionVecEnv(envs, network))
        model = algorithm(EvictionPolicy, env, policy_kwargs={"network": network}, seed=0, device="cpu", **options)
        model.policy.scorer.requires_grad_(not frozen)
        model.learn(2 * 4 * 8)
        learned.append(model.policy.state_dict())
        logged.append({name: model.logger.name_to_value[f"train/{name}"] for name in SHOWN})
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())
    assert logged[0] == pytest.approx(logged[1], rel=1e-5) and logged[0]["value_loss"] > 0
