"""Large cuts made one frame at a time: the choice, the recorded decisions, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from far_env.agents.config import AgentTraining, NetworkConfig
from far_env.agents.expert_data import _eviction_chain, collect
from far_env.agents.memory import HistoryMemory
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import ObservationSpec
from far_env.agents.oracle import Coverage
from far_env.agents.policies import AgentPolicy, choose, observed_rows, remaining_rows
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = RetentionNetwork(memory=True, surroundings=True, sequential_eviction=True)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    network.head.bias.data += 50  # all should stay
    return network.eval()


def random_features(count, seed=0):
    return [tuple(row) for row in np.random.default_rng(seed).random((count, 4)).tolist()]


def test_remaining_rows_are_those_of_a_memory_that_kept_them():
    """All columns but those that compare a frame with the one kept before it now, which is not known."""
    memory, rows = HistoryMemory(surroundings=True), random_features(9)
    observed = observed_rows(rows, 4, memory)
    left = [0, 2, 3, 7, 8]
    remaining = remaining_rows(observed, left, memory)
    births = [memory.births[i] for i in left]
    assert [row[0] for row in remaining] == [4 / 5, 3 / 5, 2 / 5, 1 / 5, 0] and [row[1] for row in remaining] == [
        1 / 5, 1 / 4, 1 / 3, 1 / 2, 1,
    ]  # fmt: skip
    assert [row[8] for row in remaining] == pytest.approx(np.log1p(np.diff(births, prepend=births[0])) / 3)
    for new_row, i in zip(remaining, left, strict=True):
        assert new_row[2:8] == observed[i][2:8] and new_row[9:] == observed[i][9:]
    assert remaining_rows(observed, range(9), memory) == observed
    assert [row[2:] for row in remaining_rows(observed, left, None)] == [observed[i][2:] for i in left]


@torch.no_grad()
def test_the_lowest_goes_until_one_too_many_is_left(network):
    differing = 0
    for seed in range(5):
        network.sequential_eviction = True
        memory = HistoryMemory(surroundings=True)
        rows = observed_rows(random_features(20, seed), 15, memory)
        left = list(range(20))
        while len(left) > 4:
            inputs = torch.tensor([remaining_rows(rows, left, memory)])
            logits = network(inputs, torch.ones(1, len(left)), torch.tensor([(4 / len(left), 0.3, 1.0)]))[0]
            left.remove(left[min(range(len(left) - 1), key=lambda place, own=logits: float(own[place]))])
        assert choose(network, rows, memory, 4, 0.3) == left
        network.sequential_eviction = False
        at_once = network(torch.tensor([rows]), torch.ones(1, 20), torch.tensor([(4 / 20, 0.3, 1.0)]))[0, :-1].topk(3).indices
        assert choose(network, rows, memory, 4, 0.3) == sorted([*at_once.tolist(), 19])
        differing += sorted([*at_once.tolist(), 19]) != left
    assert differing


def test_the_chain_evicts_the_frame_with_the_lowest_cost():
    rng = np.random.default_rng(0)
    cover = Coverage(np.full(80, 9, dtype=np.float32), rng.random((7, 80)).astype(np.float32))
    expected = list(range(7))
    steps = {len(left): (left, drops) for left, drops in _eviction_chain(cover, 2.0, 3, {7, 5, 4}, 3)}
    assert list(steps) == [7, 5, 4]
    for size in (7, 6, 5, 4):
        every = sorted((2 * cover.cost(list(kept)), kept) for kept in itertools.combinations(expected, size - 1) if 6 in kept)
        if size in steps:
            left, drops = steps[size]
            assert left == expected and [tuple(left[i] for i in kept) for _, kept in drops] == [kept for _, kept in every[:3]]
            assert [cost for cost, _ in drops] == pytest.approx([cost for cost, _ in every[:3]])
        expected = list(every[0][1])


@torch.no_grad()
def test_collecting_acts_as_the_policy_and_records_single_evictions(tiny_workload, network):
    noted = collect(
        tiny_workload, [3], [2], actor=network, spec=network.spec, candidates=3, sequential_eviction=True, progress=False
    )
    _, (decisions,) = play(tiny_workload, [tiny_workload.clips.clip("train", 3)], [BENCHMARK_SEED + 3], AgentPolicy(network), 2)
    assert len(noted) == len(decisions) == 10
    # a history of six is cut to two at first; then one frame is dropped at a time, and births identify those that stayed
    births = np.round(-np.expm1(4 * noted.frames[1, -3:, 6].numpy())) + 6
    assert tuple(births[:2].astype(int)) == decisions[0].kept
    spec = ObservationSpec(memory=True, surroundings=True)
    noted = collect(
        tiny_workload, [3], [2], actor=None, spec=spec, candidates=3, true_frames=True, sequential_eviction=True, progress=False
    )
    chains = noted.max_frames + 1 == noted.mask.sum(dim=1)
    assert chains.sum() > 12 and (noted.max_frames[chains] > 2).any()
    sizes = noted.sets[chains].sum(dim=2)
    assert ((sizes == noted.max_frames[chains][:, None]) | (sizes == 0)).all()


def test_sequential_eviction_needs_imitation_alone_and_no_signals():
    with pytest.raises(ValueError, match="sequential_eviction is for scorers without signals"):
        RetentionNetwork(signals=("lat_cos",), sequential_eviction=True)
    with pytest.raises(ValueError, match="is for imitation alone: set the total_timesteps of surrogate and ppo to 0"):
        dataclasses.replace(AgentTraining(), network=NetworkConfig(sequential_eviction=True))
