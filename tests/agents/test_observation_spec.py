"""Agents with signals beyond FrameMeta: observations, their encoding for the scorer, and the agreement of all parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from far_env.agents import commands, observation_spec
from far_env.agents.expert_data import collect
from far_env.agents.network import RetentionNetwork, ValueNetwork
from far_env.agents.observation_wrapper import AgentVecEnv
from far_env.agents.policies import AgentPolicy
from far_env.agents.trainer import make_workloads, train
from far_env.contract import OF_PAIRS, SIGNALS, RolloutState, make_plan
from far_env.envs.episodes import right_aligned
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.sb3 import SB3VecEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.errors import PolicyError
from far_env.evaluation.evaluate import evaluate
from far_env.frame_meta import frame_meta_list
from far_env.policies import load_policy, policy_facts
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from tests.agents.test_agents import config  # noqa: F401  (a fixture)
from tests.policy_world import World

CHOSEN = ("lat_cos", "column_gap", "attn_mass", "denoise_gap", "key_cos")


class Recording:
    """Drops the second of the frames, and records the signals that it receives."""

    signals = tuple(SIGNALS)

    def __init__(self, received):
        self.received = received

    def __deepcopy__(self, memo):
        return Recording(self.received)

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        self.received[rollout_state.step] = rollout_state.signals
        n = len(chunk_meta_list)
        return make_plan([0, *range(1 + n - budget_state["max_frames"], n)], n)


@torch.no_grad()
def test_the_environment_observes_the_signals_that_a_policy_receives(tiny_workload):
    env = FrameRetentionEnv(tiny_workload, 4, split="test", signals=list(SIGNALS))
    obs, info = env.reset(options={"clip_id": 3})
    received = {}
    play(tiny_workload, [tiny_workload.clips.clip("test", 3)], [BENCHMARK_SEED + 3], Recording(received), 4)
    terminated, steps = False, []
    while not terminated:
        assert env.observation_space.contains(obs)
        n = int(obs["mask"].sum())
        steps.append(info["step"])
        for name in SIGNALS:
            expected = received[info["step"]][name]
            assert np.isfinite(obs[name]).all()
            inner = obs[name][-n:, -n:] if name in OF_PAIRS else obs[name][-n:]
            np.testing.assert_allclose(
                inner, np.nan_to_num(expected), atol=1e-3 if name == "expected_cos" else 1e-5, err_msg=name
            )
            padding = obs[name].copy()
            padding[(slice(-n, None), slice(-n, None)) if name in OF_PAIRS else slice(-n, None)] = 0
            assert not padding.any(), name
        action = np.zeros(6, dtype=np.int8)
        action[6 - n], action[-3:] = 1, 1
        obs, _, terminated, _, info = env.step(action)
    assert steps == list(received)


def test_gymnasiums_checker_passes_and_unknown_signals_are_refused(tiny_workload):
    check_env(FrameRetentionEnv(tiny_workload, 4, signals=("lat_cos", "attn_mass")), skip_render_check=True)
    with pytest.raises(ValueError, match=r"unknown signal 'lat_kos'; did you mean 'lat_cos'"):
        FrameRetentionEnv(tiny_workload, 4, signals=("lat_kos",))
    with pytest.raises(ValueError, match="cannot read key_proto, whose length depends on the host"):
        RetentionNetwork(signals=("key_proto",))


def test_rows_and_edges_are_what_plain_loops_find():
    kept = [0, 3, 4, 9, 20]
    signals = {name: World(1).signals(kept)[name] for name in CHOSEN}
    slots, n = 8, len(kept)
    aligned = {name: right_aligned(name, value, slots) for name, value in signals.items()}
    mask = torch.zeros(1, slots)
    mask[:, -n:] = 1
    rows, edges = observation_spec.rows_and_edges(
        torch.from_numpy(observation_spec.columns(aligned, CHOSEN))[None], mask, CHOSEN
    )
    assert rows.shape == (1, slots, observation_spec.num_row_inputs(CHOSEN)) and edges.shape == (
        1,
        slots,
        slots,
        observation_spec.num_edges(CHOSEN),
    )
    assert not rows[:, :-n].any()
    rows, edges = rows[0, -n:].numpy(), edges[0, -n:, -n:].numpy()
    root = np.sqrt(signals["column_gap"])
    root = root / (1 + root)
    squash = lambda x: x / (1 + abs(x))  # noqa: E731
    cosines, keys = signals["lat_cos"], np.nan_to_num(signals["key_cos"])
    for i in range(n):
        others = [j for j in range(n) if j != i]
        nearest = [min(root[i, j, column] for j in others) for column in range(root.shape[2])]
        expected = [
            squash(signals["attn_mass"][i]),
            squash(signals["denoise_gap"][i]),
            max(keys[i, j] for j in others),
            max(cosines[i, j] for j in others),
            np.mean(nearest),
            max(nearest),
        ]
        np.testing.assert_allclose(rows[i], expected, atol=1e-6)
        for j in range(n):
            gaps = root[i, j].mean(), root[i, j].max(), root[j, i].mean()
            np.testing.assert_allclose(edges[i, j], [float(i == j), keys[i, j], cosines[i, j], *gaps], atol=1e-6)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = RetentionNetwork(memory=True, signals=CHOSEN)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return network.eval()


def observation(kept, slots):
    """A random observation of these frames of a world, in so many slots, with columns of memory and signals."""
    world, n = World(2), len(kept)
    inputs = torch.rand(len(kept), 13, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = torch.arange(n - 1, -1, -1.0) / slots
    signals = world.signals(kept)
    packed = observation_spec.columns({name: right_aligned(name, signals[name], slots) for name in CHOSEN}, CHOSEN)
    frames = torch.cat([torch.cat([torch.zeros(slots - n, 13), inputs]), torch.from_numpy(packed)], dim=1)[None]
    mask = torch.zeros(1, slots)
    mask[:, slots - n :] = 1
    return frames, mask, torch.tensor([[4 / slots, 0.3, n / slots]])


@torch.no_grad()
def test_padding_and_the_number_of_slots_change_nothing(network):
    kept = [0, 2, 3, 7, 11, 12]
    torch.testing.assert_close(network(*observation(kept, 12))[:, -6:], network(*observation(kept, 6)), atol=1e-5, rtol=1e-5)
    critic = ValueNetwork(memory=True, signals=CHOSEN)
    torch.testing.assert_close(critic(*observation(kept, 12)), critic(*observation(kept, 6)), atol=1e-5, rtol=1e-5)
    assert network(*observation([5], 3)).isfinite().all(), "a frame without others"


@torch.no_grad()
def test_permuting_older_rows_and_their_signals_permutes_their_logits(network):
    frames, mask, budget = observation([0, 2, 3, 7, 11, 12], 6)
    order = torch.tensor([3, 0, 4, 1, 2, 5])
    rows, edges = frames[:, order], frames[:, order]
    moved = [rows[..., : 13 + 2]]  # memory, attn_mass, denoise_gap
    start = 15
    for _ in ("key_cos", "lat_cos"):
        moved.append(edges[..., start : start + 6][..., order])
        start += 6
    moved.append(edges[..., start:].unflatten(-1, (6, -1))[..., order, :].flatten(2))
    torch.testing.assert_close(
        network(torch.cat(moved, dim=-1), mask, budget), network(frames, mask, budget)[:, order], atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(network(rows, mask, budget), network(frames, mask, budget)[:, order], atol=1e-3)


@torch.no_grad()
def test_each_signal_matters(network):
    frames, mask, budget = observation([0, 2, 3, 7, 11, 12], 6)
    base = network(frames, mask, budget)
    for column in range(13, frames.shape[2]):
        changed = frames.clone()
        changed[:, 2, column] += 0.3
        assert not torch.allclose(network(changed, mask, budget), base, atol=1e-7), column


@torch.no_grad()
def test_the_scorer_has_the_same_inputs_in_environment_policy_and_collection(tiny_workload, network):
    """The same logits, so the same decisions, whether a scorer acts in the environment, as a policy, or while labels are
    collected."""
    venv = AgentVecEnv(
        SB3VecEnv(FrameRetentionVectorEnv(2, tiny_workload, 4, autoreset_mode="SAME_STEP", signals=network.spec.signals)),
        [tiny_workload.num_predict] * 2,
        network.spec,
    )
    venv.set_options([{"clip_id": 5}, {"clip_id": 6}])
    obs = venv.reset()
    assert venv.observation_space.contains({key: value[0] for key, value in obs.items()})
    clips = [tiny_workload.clips.clip("train", i) for i in (5, 6)]
    _, decisions = play(tiny_workload, clips, [BENCHMARK_SEED + 5, BENCHMARK_SEED + 6], AgentPolicy(network), 4)
    noted = collect(tiny_workload, [5, 6], [4, 4], actor=network, spec=network.spec, candidates=2, progress=False)
    for number in range(10):
        frames, mask, budget = (torch.from_numpy(obs[key]) for key in ("frames", "mask", "budget"))
        for row in range(2):
            recorded_frames = noted.frames[number * 2 + row]
            torch.testing.assert_close(recorded_frames, frames[row], atol=1e-4, rtol=1e-4)
        logits = network(frames, mask, budget)
        actions = np.zeros((2, 6), dtype=np.int8)
        for row in range(2):
            n = int(mask[row].sum())
            best = logits[row, :-1].masked_fill(mask[row, :-1] == 0, -1e9).topk(3)
            actions[row, best.indices[best.values > 0].numpy()] = 1
            actions[row, -1] = 1
            assert n > 4
        obs, _, dones, infos = venv.step(actions)
        if not dones[0]:
            for row in range(2):
                kept = infos[row]["kept_frames"][:-1]
                assert tuple(kept) == decisions[row][number].kept
    assert dones.all() and infos[0]["terminal_observation"]["frames"].shape == obs["frames"].shape[1:]


def test_without_its_signals_the_policy_says_what_it_needs(network):
    metas = frame_meta_list(np.zeros((6, 4)), 3, 0.1)
    with pytest.raises(PolicyError, match="needs lat_cos, column_gap, attn_mass, denoise_gap, key_cos"):
        AgentPolicy(network).build_temporal_cache_plan(metas, RolloutState(3, 1.0, 11), {"max_frames": 4})


def test_an_agent_with_signals_is_trained_evaluated_and_not_exported(config, tmp_path, capsys):  # noqa: F811
    size = dataclasses.replace(config.network, memory=True, signals=("lat_cos", "column_gap"))
    imitation = dataclasses.replace(config.imitation, rounds=2, clips_per_round=2, epochs=1, candidates=2)
    train(dataclasses.replace(config, network=size, imitation=imitation))
    run = str(tmp_path / "run")
    policy = load_policy(run)
    assert policy.signals == ("lat_cos", "column_gap")
    assert policy_facts(run)["tier"] == "L"
    assert observation_spec.tier(("lat_cos", "attn_mass")) == "A" and observation_spec.tier(()) == "M"
    workload = make_workloads(config)[0]
    scores = evaluate(workload, 4, {"agent": policy}, [0, 1, 2], metrics=("psnr",), progress=False).scores
    assert "learned" in capsys.readouterr().out and np.isfinite(scores["agent"]["psnr"]).all()
    with pytest.raises(ValueError, match="needs lat_cos, column_gap, which the benchmark does not provide"):
        commands.export([run, "--out", str(tmp_path / "policy.py")])
    assert not (tmp_path / "policy.py").exists()
