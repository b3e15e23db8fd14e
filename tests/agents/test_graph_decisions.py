"""Batches of collected decisions: the network's inputs as a policy that acts makes them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from far_env.agents.collection import collect
from far_env.agents.config import NetworkConfig
from far_env.agents.graph_decisions import GraphDecisions, shuffled_batches
from far_env.agents.policies import AgentPolicy
from far_env.agents.runtime import GraphScorer
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from tests.agents.test_network import random_network

SMALL = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)
CLIPS, BUDGETS = [3, 3, 6], [2, 8, 4]


class NotingScorer(GraphScorer):
    """Notes its inputs, and the numbers of the nodes."""

    noted: list = []

    def inputs(self, steps_left, max_frames):
        inputs = super().inputs(steps_left, max_frames)
        self.noted.append((self.graph.numbers.tolist(), list(self.graph.births), *inputs))
        return inputs


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"dropped_frames": False}, {"scaled": False}, {"signals": ("lat_cos", "key_cos", "expected_mass")}],
    ids=lambda options: "+".join(options) or "default",
)
def test_batches_are_what_a_policy_that_acts_makes(tiny_workload, options):
    config = dataclasses.replace(SMALL, **options)
    actor = random_network(config)
    data = collect(tiny_workload, CLIPS, BUDGETS, actor=actor, config=config, true_frames=False, progress=False)
    decisions = GraphDecisions(data, config)
    noted = []
    for clip_id, budget in zip(CLIPS, BUDGETS, strict=True):
        policy = AgentPolicy(actor)
        policy.scorer.__class__, NotingScorer.noted = NotingScorer, []
        play(tiny_workload, [tiny_workload.clips.clip("train", clip_id)], [BENCHMARK_SEED + clip_id], policy, budget)
        noted += NotingScorer.noted
    assert len(noted) == len(data.step) == 10 + 7 + 10
    order = np.random.default_rng(0).permutation(len(decisions.calls))
    found = []
    for indices in np.array_split(order, 4):
        batch = decisions.batch(indices)
        of_batch = [index for place in indices for index in np.flatnonzero(data.call == decisions.calls[place])]
        assert [decisions.calls[place] for place in indices[batch.call]] == data.call[of_batch].tolist()
        found += of_batch
        for row, place in enumerate(indices.tolist()):
            numbers, _, nodes, edges = noted[decisions.calls[place]]
            count = len(numbers)
            assert batch.mask[row].tolist() == [place < count for place in range(batch.mask.shape[1])]
            np.testing.assert_allclose(batch.nodes[row, :count], nodes, atol=1e-3)
            measured, compared = slice(0, 9), slice(9, None)
            np.testing.assert_allclose(batch.edges[row, :count, :count, measured], edges[..., measured], atol=2e-3)
            np.testing.assert_allclose(batch.edges[row, :count, :count, compared], edges[..., compared], atol=5e-3)
            similarity = data.similarity[data.rollout[decisions.calls[place]]].float().numpy()
            for i, number in enumerate(numbers):
                assert batch.similarity[row, i, :count].tolist() == [similarity[number, other] for other in numbers]
        for row, index in enumerate(of_batch):
            # what remains and what it costs, of the frames with these numbers
            numbers, births, *_ = noted[int(data.call[index])]
            left = [number for number, stays in zip(births, data.remaining[index].tolist(), strict=False) if stays]
            assert [number for number, stays in zip(numbers, batch.remaining[row].tolist(), strict=False) if stays] == left
            costs = dict(zip(births, data.costs[index].tolist(), strict=False))
            assert batch.costs[row].tolist() == [costs.get(n, np.inf) for n in numbers] + [np.inf] * (
                batch.mask.shape[1] - len(numbers)
            )
    assert sorted(found) == list(range(len(data)))


def test_every_call_with_decisions_comes_once_and_the_order_depends_on_the_generator(tiny_workload):
    parts = []
    for clips, budget in (([0, 1, 2], 2), ([3, 4], 4)):
        data = collect(tiny_workload, clips, [budget] * len(clips), actor=None, config=SMALL, true_frames=True, progress=False)
        parts.append(GraphDecisions(data, SMALL))
    orders = []
    for seed in (0, 0, 1):
        batches = list(shuffled_batches(parts, 3, np.random.default_rng(seed)))
        assert all(0 < len(indices) <= 3 for _, indices in batches)
        seen = [(parts.index(part), index) for part, indices in batches for index in indices.tolist()]
        assert sorted(seen) == [(number, index) for number, part in enumerate(parts) for index in range(len(part.calls))]
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    together = [parts[0].sizes[indices] for part, indices in batches if part is parts[0]]
    spread = np.mean([sizes.max() - sizes.min() for sizes in together])
    assert spread < 0.5 * (parts[0].sizes.max() - parts[0].sizes.min()), "a batch is of similar sizes"
