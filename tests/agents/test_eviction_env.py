"""Single evictions as actions: the same episodes as with keep masks, and PPO's policy as it acts in evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from far_env.agents.config import NetworkConfig
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.agents.eviction_policy import EvictionPolicy
from far_env.agents.observation import FrameGraph, signal_arrays
from far_env.agents.policies import AgentPolicy, numpy_scorer
from far_env.clips.worlds import WORLDS
from far_env.envs.episodes import EpisodeBatch
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.rollout.play import play
from far_env.tensor_files import load_tensors, save_tensors
from far_env.workload import Workload
from tests.agents.test_network import in_numpy, random_network

SMALL = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)
BUDGETS = {"tiny_pan": [2, 4], "tiny_cuts": [3]}
OPTIONS = {"telescoping": True, "metrics": ("psnr",), "num_clips": 16}


@pytest.fixture
def workloads(tiny_workload, tiny_host) -> list[Workload]:
    """Two with other lengths; histories of eleven frames are cut to three in the second."""
    cuts = Workload("tiny_cuts", WORLDS["cuts"], tiny_host, num_context=10, num_predict=6, num_steps=3)
    return [tiny_workload, cuts]


def make_env(workloads, config=SMALL, rows=(2, 1), **options) -> EvictionVecEnv:
    envs = [
        FrameRetentionVectorEnv(
            count,
            workload,
            BUDGETS[workload.name],
            autoreset_mode="SAME_STEP",
            signals=config.signals,
            **{**OPTIONS, **options},
        )
        for count, workload in zip(rows, workloads, strict=True)
    ]
    return EvictionVecEnv(envs, config)


def random_actions(env: EvictionVecEnv, rng: np.random.Generator) -> np.ndarray:
    """One node that may be dropped in each row."""
    return np.array([rng.choice(np.flatnonzero(mask)) for mask in env.action_masks()])


class Row:
    """A row by itself: a single environment that gets keep masks, and a graph that receives what a policy would."""

    def __init__(self, workload: Workload, config: NetworkConfig, seed: int) -> None:
        self.env = FrameRetentionEnv(workload, BUDGETS[workload.name], signals=config.signals, **OPTIONS)
        self.config = config
        self.begin(self.env.reset(seed=seed))

    def begin(self, result: tuple[dict, dict]) -> None:
        self.graph = FrameGraph(self.config.dropped_frames)
        self.observe(*result)

    def observe(self, obs: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        self.obs, self.info, count = obs, info, int(obs["mask"].sum())
        signals = {}
        for name in self.config.signals:  # lat_cos and attn_mass, which are known of all
            signals[name] = obs[name][-count:, -count:] if obs[name].ndim > 1 else obs[name][-count:]
        features = info["frame_features"][-count:]
        self.graph.observe_frames(features, info["step"], *signal_arrays(signals, self.config.signals))
        self.left = list(range(count))

    def arrays(self) -> dict[str, np.ndarray]:
        return self.graph.arrays(self.info["total_steps"] - self.info["step"] - 1, self.info["max_frames"])

    def drop(self, node: int) -> tuple[float, bool, dict]:
        """Reward, whether the episode ended, and the info at its end."""
        self.left.remove(self.graph.births.index(self.graph.numbers[node]))
        if len(self.left) > self.info["max_frames"]:
            return 0.0, False, {}
        slots = len(self.obs["mask"])
        action = np.zeros(slots, dtype=np.int8)
        action[slots - len(self.graph.births) + np.array(self.left)] = 1
        self.graph.keep(self.left)
        obs, reward, ended, _, info = self.env.step(action)
        if ended:
            self.begin(self.env.reset())
        else:
            self.observe(obs, info)
        return reward, ended, info if ended else {}


@pytest.mark.parametrize(
    "options",
    [{}, {"dropped_frames": False}, {"signals": ("lat_cos", "attn_mass")}],
    ids=lambda options: "+".join(options) or "default",
)
def test_rows_are_single_environments_that_get_the_keep_masks(workloads, options):
    config = dataclasses.replace(SMALL, **options)
    env, rng = make_env(workloads, config), np.random.default_rng(0)
    env.seed(7)
    observations = env.reset()
    rows = [Row(workload, config, 7 + row) for row, workload in enumerate([workloads[0]] * 2 + [workloads[1]])]
    ends, asked_again = [0, 0, 0], 0
    assert env.num_nodes == 16, "all frames of a clip"
    for _ in range(60):
        masks = env.action_masks()
        for row, single in enumerate(rows):
            nodes = [int(np.flatnonzero(single.graph.numbers == single.graph.births[place])[0]) for place in single.left]
            assert np.flatnonzero(masks[row]).tolist() == nodes[:-1], "all that remain but the newest"
            assert np.flatnonzero(observations["remaining"][row]).tolist() == nodes
            count = len(single.graph.numbers)
            assert observations["mask"][row].tolist() == [1] * count + [0] * (16 - count)
            for name, value in single.arrays().items():
                if name in observations:
                    shown = observations[name][row]
                    if name not in ("scale", "situation"):
                        cut = (slice(count),) * (2 if name in ("pairs", "known", "pair_signals") else 1)
                        shown = shown[cut]
                    np.testing.assert_allclose(shown, value, atol=2e-4)
        actions = random_actions(env, rng)
        observations, rewards, dones, infos = env.step(actions)
        assert rewards.dtype == np.float32
        for row, single in enumerate(rows):
            reward, ended, info = single.drop(int(actions[row]))
            asked_again += reward == 0.0
            assert rewards[row] == pytest.approx(reward, abs=2e-3) and dones[row] == ended
            assert infos[row].get("psnr") == pytest.approx(info.get("psnr"), abs=2e-3)
            if ended:
                assert infos[row]["clip_id"] == info["clip_id"] and infos[row]["kept_frames"] == info["kept_frames"]
            ends[row] += ended
    assert min(ends) >= 2 and asked_again > 20
    assert ("frame_signals" in observations) == bool(config.signals)


def test_reset_options_hold_for_the_rows_that_they_are_set_for_and_once(workloads):
    env = make_env(workloads)
    env.seed(0)
    env.set_options([{"clip_id": 5}, {"clip_id": 7, "budget": 4}, {}])
    env.reset()
    first, second, third = env.reset_infos
    assert (first["clip_id"], second["clip_id"], second["max_frames"]) == (5, 7, 4) and third["clip_id"] < 16
    env.seed(0)
    env.reset()
    assert [info["clip_id"] for info in env.reset_infos] != [5, 7, third["clip_id"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"autoreset_mode": "NEXT_STEP"}, "autoreset_mode='SAME_STEP'"), ({"max_episode_steps": 3}, "without max_episode_steps")],
)
def test_environments_that_do_not_end_as_sb3_expects_are_refused(tiny_workload, options, message):
    env = FrameRetentionVectorEnv(1, tiny_workload, 4, **{"autoreset_mode": "SAME_STEP", **options})
    with pytest.raises(ValueError, match=message):
        EvictionVecEnv([env], SMALL)


def test_an_action_that_is_not_allowed_drops_the_oldest_that_remains(workloads):
    env = make_env(workloads, rows=(1, 1))
    env.seed(0)
    env.reset()
    env.step(np.array([15, 10]))  # padding, and the newest of eleven
    assert [graph.rows()[remains].tolist() for graph, remains in zip(env.graphs, env.remaining, strict=True)] == [
        [1, 2, 3, 4, 5],
        list(range(1, 11)),
    ]
    env.step(np.array([0, 0]))  # dropped before
    assert env.graphs[1].rows()[env.remaining[1]].tolist() == list(range(2, 11))


def test_a_restored_environment_goes_on_as_the_one_that_was_saved(workloads, tmp_path):
    config = dataclasses.replace(SMALL, signals=("lat_cos",))
    env = make_env(workloads, config)
    env.seed(3)
    env.reset()
    rng = np.random.default_rng(1)
    for _ in range(9):
        env.step(random_actions(env, rng))
    save_tensors(tmp_path / "state.ckpt", {"own": env.state_dict(), "envs": [part.state_dict() for part in env.envs]})
    expected = []
    for seed in range(25):
        results = env.step(random_actions(env, np.random.default_rng(seed)))
        expected.append((*(value.copy() for value in results[0].values()), results[1], results[2], env.action_masks()))
    state = load_tensors(tmp_path / "state.ckpt")
    for again in (make_env(workloads, config), make_env(workloads, config)):  # what one does must not change the state
        again.reset()
        for part, saved in zip(again.envs, state["envs"], strict=True):
            part.load_state_dict(saved)
        again.load_state_dict(state["own"])
        for seed, values in enumerate(expected):
            results = again.step(random_actions(again, np.random.default_rng(seed)))
            actual = (*results[0].values(), results[1], results[2], again.action_masks())
            for value, other in zip(values, actual, strict=True):
                np.testing.assert_allclose(other, value, atol=1e-5)


def make_model(env, config: NetworkConfig, **options) -> MaskablePPO:
    options = {"n_steps": 8, "seed": 0, "device": "cpu", **options}
    return MaskablePPO(EvictionPolicy, VecMonitor(env), policy_kwargs={"network": config}, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"dropped_frames": False}, {"scaled": False}, {"signals": ("attn_mass", "expected_mass", "key_cos", "lat_cos")}],
    ids=lambda options: "+".join(options) or "default",
)
def test_the_policy_inside_ppo_decides_as_in_evaluation(workloads, monkeypatch, options):
    """Signals that are not known yet of the newest frame are not known in training either."""
    config = dataclasses.replace(SMALL, **options)
    env = make_env(workloads, config)
    model = make_model(env, config)
    model.policy.scorer.load_state_dict(random_network(config, 4).state_dict())
    noted, original = {}, EpisodeBatch.retain

    def noting(self, row, action):
        result = original(self, row, action)
        key = self.workload.name, self.clips[row].clip_id, self.max_frames[row]
        step, kept = self.decisions[row][-1]
        noted.setdefault(key, {})[step] = tuple(kept)
        return result

    monkeypatch.setattr(EpisodeBatch, "retain", noting)
    env.seed(5)
    observations, ends = env.reset(), np.zeros(3)
    while ends.min() < 1:
        masks = env.action_masks()
        actions, _ = model.policy.predict(observations, deterministic=True, action_masks=masks)
        assert masks[np.arange(3), actions].all()
        for row, graph in enumerate(env.graphs if config.signals else []):
            of_frames, of_pairs = observations["frame_signals"][row], observations["pair_signals"][row]
            newest, other = graph.rows()[-1], graph.rows()[0]
            assert np.isnan(of_frames[newest]).tolist() == [False, True] and not np.isnan(of_frames[other]).any()
            assert np.isnan(of_pairs[newest, other]).tolist() == [True, False] and not np.isnan(of_pairs[other, other]).any()
        observations, _, dones, _ = env.step(actions)
        ends += dones
    compared = 0
    for (name, clip_id, budget), decisions in noted.items():
        (workload,) = [workload for workload in workloads if workload.name == name]
        clip = workload.clips.clip("train", clip_id)
        _, (expected,) = play(workload, [clip], [42 + clip_id], AgentPolicy(model.policy.scorer), budget)
        expected = {decision.step: decision.kept for decision in expected}
        assert decisions == {step: expected[step] for step in decisions}
        compared += len(decisions)
    assert compared > 20


@torch.no_grad()
def test_probabilities_are_a_softmax_over_the_frames_that_may_be_dropped(workloads):
    env = make_env(workloads)
    model = make_model(env, SMALL)
    model.policy.scorer.load_state_dict(random_network(SMALL, 4).state_dict())
    env.seed(1)
    observations, rng = env.reset(), np.random.default_rng(0)
    for _ in range(12):
        masks, actions = env.action_masks(), random_actions(env, rng)
        tensors = {name: torch.from_numpy(value) for name, value in observations.items()}
        _, log_prob, entropy = model.policy.evaluate_actions(tensors, torch.from_numpy(actions), action_masks=masks)
        for row, (mask, action) in enumerate(zip(masks, actions, strict=True)):
            budget, steps_left = map(int, env.observations[row]["situation"])
            x, e = in_numpy(model.policy.scorer, env.graphs[row], steps_left, budget)
            left = np.flatnonzero(env.remaining[row])
            scores = numpy_scorer(model.policy.scorer).scores(x, e, left)[:-1]
            probabilities = np.exp(-scores) / np.exp(-scores).sum()
            assert len(scores) == mask.sum()
            chosen = np.flatnonzero(mask).tolist().index(action)
            assert float(log_prob[row]) == pytest.approx(np.log(probabilities[chosen]), abs=1e-3)
            assert float(entropy[row]) == pytest.approx(-(probabilities * np.log(probabilities)).sum(), abs=1e-3)
        observations = env.step(actions)[0]


@torch.no_grad()
def test_graphs_that_are_much_smaller_than_others_get_the_same_answers(tiny_workload, tiny_host):
    long = Workload("tiny_cuts", WORLDS["orbit"], tiny_host, num_context=14, num_predict=4, num_steps=3)
    env = make_env([tiny_workload, long], rows=(3, 2))
    model = make_model(env, SMALL)
    observations = env.reset()
    sizes = observations["mask"].sum(axis=1)
    assert 2 * sizes.min() <= sizes.max()
    tensors = {name: torch.from_numpy(value)[[3, 0, 4, 1, 2]] for name, value in observations.items()}
    packed = model.policy.extract_features(tensors)
    logits, values = model.policy.mlp_extractor(packed)
    for row in range(5):
        alone = model.policy.mlp_extractor(packed[row : row + 1])
        remains = tensors["remaining"][row] > 0
        torch.testing.assert_close(logits[row, remains], alone[0][0, remains], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values[row], alone[1][0], atol=1e-4, rtol=1e-4)
    model.policy.mlp_extractor.bfloat16 = True
    for exact, rounded in zip((logits, values), model.policy.mlp_extractor(packed), strict=True):
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0.05)
        assert not torch.equal(rounded, exact)


class KnownAnswer(EvictionVecEnv):
    """One eviction per episode, rewarded with how unlike the oldest frame the dropped one is: 1 for the most unlike."""

    def __init__(self, num_envs: int) -> None:
        self.config, self.rng, self.num_nodes = SMALL, np.random.default_rng(0), 6
        self.graphs = [FrameGraph() for _ in range(num_envs)]
        self.remaining = [np.ones(6, dtype=bool)] * num_envs
        self.observations: list[dict] = [{}] * num_envs
        self.envs, self.render_mode = [], None
        self._actions = np.zeros(num_envs, dtype=np.int64)
        VecEnv.__init__(self, num_envs, self._space(), spaces.Discrete(6))

    def reset(self):
        self.drifts = self.rng.random((self.num_envs, 6))
        for row, drift in enumerate(self.drifts):
            features = self.rng.random((6, 4))
            features[:, 1] = drift
            self.graphs[row] = FrameGraph()
            self.graphs[row].observe_frames(features, 0)
            self.observations[row] = self.graphs[row].arrays(1, 5)
        return self._stacked()

    def step_wait(self):
        rank = self.drifts[:, 1:5].argsort(axis=1).argsort(axis=1)
        rewards = np.where(self._actions == 0, 0, rank[np.arange(self.num_envs), self._actions - 1] / 3).astype(np.float32)
        dones = np.ones(self.num_envs, dtype=bool)
        last = self._stacked()
        infos = [{"terminal_observation": {key: value[row] for key, value in last.items()}} for row in range(self.num_envs)]
        return self.reset(), rewards, dones, infos


def test_ppo_learns_which_frame_to_drop():
    model = make_model(KnownAnswer(32), SMALL, n_steps=16, batch_size=128, n_epochs=4, learning_rate=1e-2, gamma=1.0)

    def mean_reward() -> float:
        env, total = KnownAnswer(200), 0.0
        observations = env.reset()
        for _ in range(3):
            actions, _ = model.policy.predict(observations, deterministic=True, action_masks=env.action_masks())
            observations, rewards, _, _ = env.step(actions)
            total += rewards.mean() / 3
        return total

    before = mean_reward()
    model.learn(512 * 7)
    assert before < 0.7 and mean_reward() > 0.9
