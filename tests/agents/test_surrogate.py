"""The surrogate of the host: its estimate against plain loops and against rollouts, and PPO with it."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from far_env.agents.checkpoints import load_scorer
from far_env.agents.config import AgentTraining, NetworkConfig, PPOSettings, RewardSettings
from far_env.agents.histories import TrueHistories
from far_env.agents.learning_curves import curve
from far_env.agents.policies import PolicyAgent
from far_env.agents.surrogate import ESTIMATE, SurrogateRollouts, SurrogateVectorEnv
from far_env.agents.trainer import train
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.evaluation.evaluate import evaluate
from far_env.frame_meta import frame_features
from far_env.policies import load_policy
from far_env.tensor_files import load_tensors
from far_env.workloads import make_workload
from tests.agents.stopping import stopped_after_checkpoints

OPTIONS = {"reward": {"psnr": 1.0}, "num_clips": 20, "autoreset_mode": AutoresetMode.DISABLED}


def make_env(workload, num_envs=2, **options):
    return SurrogateVectorEnv(num_envs, workload, (3,), **{**OPTIONS, **options})


def recent(env):
    """Keep masks of the newest frames."""
    action = np.zeros(env.action_space.shape, dtype=np.int8)
    action[:, -3:] = 1
    return action


@torch.no_grad()
@pytest.mark.parametrize("feedback", ["generated", "true"])
def test_errors_are_what_the_kept_cells_leave_unexplained_and_inherit(tiny_workload, feedback):
    """Where true frames are fed back, there is no error to inherit."""
    tiny_workload = dataclasses.replace(tiny_workload, feedback=feedback)
    clip = tiny_workload.clips.clip("train", 3)
    latents = tiny_workload.host.autoencoder.encode(torch.from_numpy(clip.frames)[None])[0].double()
    rollouts = SurrogateRollouts(tiny_workload, 2)
    rollouts.begin([1], [clip], [0])
    cells = latents.flatten(2).transpose(1, 2).numpy()  # (T, cells, C)
    unit = cells.var(ddof=1) * cells.shape[2]
    kept, errors = list(range(5)), np.zeros(cells.shape[:2])
    for frame in range(5, 16):
        for cell in range(cells.shape[1]):
            squares = ((cells[:frame] - cells[frame, cell]) ** 2).sum(axis=2) / unit
            inherited = 0 if feedback == "true" else 1
            found = [(squares[source].min(), inherited * errors[source, squares[source].argmin()]) for source in kept]
            errors[frame, cell] = max(0.0, min(map(sum, found)) - squares.min() - 2 * 0.04)
        rollouts.advance([1])
        kept.append(frame)
        assert rollouts.frame_numbers(1) == kept and rollouts.step(1) == frame - 4
        expected_features = frame_features(latents[None, kept].float()).numpy()
        np.testing.assert_allclose(rollouts.features([1]), expected_features, atol=1e-6)
        for name, value in TrueHistories.signals(rollouts, [1])[0].items():
            np.testing.assert_allclose(rollouts.signals([1])[0][name], value, atol=1e-5)
        if len(kept) > 3:
            rollouts.retain(1, [1, len(kept) - 2, len(kept) - 1])
            kept = [kept[1], *kept[-2:]]
    assert errors[5:].max() > 0 and rollouts.finished(1)
    np.testing.assert_allclose(rollouts.errors[1], errors, atol=1e-4)


def test_an_episode_observes_true_frames_and_is_rewarded_with_the_estimate(tiny_workload):
    env = make_env(tiny_workload)
    observations, _ = env.reset(options={"clip_id": [4, 7]})
    real = FrameRetentionVectorEnv(2, tiny_workload, (3,), **OPTIONS)
    assert env.single_observation_space == real.single_observation_space and env.observation_space.contains(observations)
    total = np.zeros(2)
    while True:
        observations, rewards, done, _, infos = env.step(recent(env))
        total += rewards
        if done.all():
            break
        assert (total == 0).all()
    errors = env.episodes.rollouts.errors[:, 5:].mean(axis=(1, 2))
    variances = np.array([tiny_workload.clips.clip("train", clip_id).frames[:16].var() for clip_id in (4, 7)])
    expected = -10 * np.log10(variances * (0.01 + errors))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(infos[ESTIMATE], expected, rtol=1e-5)


def test_telescoping_rewards_add_up_and_restored_rows_continue(tiny_workload):
    whole, split, again = (make_env(tiny_workload, telescoping=telescoping_of) for telescoping_of in (False, True, True))
    rewards = {}
    for env in (whole, split):
        env.reset(options={"clip_id": [4, 7]})
        rewards[env], done = [], np.zeros(2, dtype=bool)
        while not done.all():
            if env is split and len(rewards[env]) == 2:
                state = env.state_dict()
            _, earned, done, _, _ = env.step(recent(env))
            rewards[env].append(earned)
    np.testing.assert_allclose(np.sum(rewards[whole], axis=0), np.sum(rewards[split], axis=0), rtol=1e-5)
    again.load_state_dict(state)
    for earned in rewards[split][2:]:
        np.testing.assert_array_equal(again.step(recent(again))[1], earned)


def test_the_estimate_ranks_clips_and_policies_as_the_embedded_host_does():
    workload, clips = make_workload("pan", device="cpu"), range(8)
    policies = {name: load_policy(name) for name in ("recent_fill", "uniform")}
    real = evaluate(workload, 4, policies, clips, split="train", metrics=("psnr",), progress=False)
    estimated = {}
    for name in policies:
        env = SurrogateVectorEnv(8, workload, (4,), **{**OPTIONS, "num_clips": 8})
        observations, infos = env.reset(options={"clip_id": list(clips)})
        agent, done = PolicyAgent(policies[name]), np.zeros(8, dtype=bool)
        while not done.all():
            observations, _, done, _, infos = env.step(agent.predict(observations, infos))
        estimated[name], measured = infos[ESTIMATE], real.scores[name]["psnr"].flatten()
        assert np.corrcoef(estimated[name], measured)[0, 1] > 0.5
        assert abs(estimated[name].mean() - measured.mean()) < 5
    assert estimated["uniform"].mean() > estimated["recent_fill"].mean() + 5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward": {"ssim": 1.0}}, "the surrogate estimates PSNR alone"),
        ({"signals": ("attn_mass",)}, "the surrogate has no attn_mass"),
    ],
)
def test_what_cannot_be_estimated_is_refused(tiny_workload, options, message):
    with pytest.raises(ValueError, match=message):
        make_env(tiny_workload, **options)


SMALL = PPOSettings(total_timesteps=32, num_envs=4, n_steps=4, batch_size=16, n_epochs=1)


@pytest.fixture
def config(tmp_path, tiny_host_folder) -> AgentTraining:
    return AgentTraining(
        network=NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2),
        surrogate=SMALL,
        ppo=dataclasses.replace(SMALL, total_timesteps=16, critic_warmup_updates=9),
        reward=RewardSettings(telescoping=True),
        precision="float32",
        host=str(tiny_host_folder),
        device="cpu",
        train_clips=8,
        validation_clips=2,
        test_clips=2,
        table=(),
        run_dir=str(tmp_path / "run"),
    )


def test_ppo_with_the_host_starts_from_the_surrogates_scorer_and_both_resume(config, tmp_path):
    train(config)
    with_surrogate = load_tensors(tmp_path / "run" / "surrogate" / "checkpoint.ckpt")
    assert with_surrogate["num_timesteps"] == 32
    decisions = [point for point, _ in curve(tmp_path / "run")[1]]
    assert decisions == [0, 32, 32 + 16], "with the surrogate and then with the host"
    alone = dataclasses.replace(config, ppo=PPOSettings(total_timesteps=0), run_dir=str(tmp_path / "alone"))
    with stopped_after_checkpoints(2), pytest.raises(KeyboardInterrupt):
        train(alone)
    train(dataclasses.replace(alone, resume=True))
    best = load_scorer(tmp_path / "alone")[0].state_dict()
    trained = load_tensors(tmp_path / "run" / "checkpoint.ckpt")["policy"]
    for key, value in best.items():
        assert torch.equal(value, with_surrogate["best_weights"][key]), "the resumed stage ended differently"
        assert torch.equal(value, trained[f"mlp_extractor.actor.{key}"]), "PPO did not begin with it"
