"""The head in which every frame is decided by itself: Bernoulli probabilities, and of too many frames the newest stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from far_env.agents.expert_data import choices, collect
from far_env.agents.network import RetentionNetwork
from far_env.agents.policies import choose, observed_rows
from far_env.agents.subset_policy import SubsetPolicy
from gymnasium import spaces
from torch.distributions import Bernoulli

from far_env.envs.retention_env import flat_action_mask
from far_env.rollout.engine import RolloutBatch
from tests.agents.test_network import observation


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = RetentionNetwork(width=16, independent=True)
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    with torch.no_grad():  # about half of the frames are worth a place
        network.head.bias -= network(*observation(9))[:, :-1].median()
    return network.eval()


def test_ppo_draws_every_frame_by_itself():
    torch.manual_seed(0)
    shapes = {"frames": (9, 6), "mask": (9,), "budget": (3,)}
    space = spaces.Dict({name: spaces.Box(0.0, 1.0, shape, np.float32) for name, shape in shapes.items()})
    policy = SubsetPolicy(space, spaces.MultiBinary(9), lambda _: 1e-3, network={"width": 16, "independent": True})
    torch.nn.init.normal_(policy.scorer.head.weight)
    frames, mask, budget = observation(7, slots=9)  # a budget of 4
    fates = np.where(mask.numpy() == 0, 0, 2)
    fates[:, -1] = 1
    allowed = flat_action_mask(fates)
    obs = {"frames": frames, "mask": mask, "budget": budget}
    drawn, _, log_prob = policy(obs, action_masks=allowed)
    logits = policy.scorer(frames, mask, budget)[:, 2:8]
    torch.testing.assert_close(log_prob, Bernoulli(logits=logits).log_prob(drawn[:, 2:8]).sum(dim=1), atol=1e-4, rtol=1e-4)
    _, _, entropy = policy.evaluate_actions(obs, drawn, action_masks=allowed)
    torch.testing.assert_close(entropy, Bernoulli(logits=logits).entropy().sum(dim=1), atol=1e-4, rtol=1e-4)
    assert (drawn[:, :2] == 0).all() and (drawn[:, -1] == 1).all()


def test_of_too_many_frames_the_newest_stay(network):
    rows = observed_rows(np.random.default_rng(0).random((12, 4)).tolist(), 6, None)
    with torch.no_grad():
        logits = network(torch.tensor([rows]), torch.ones(1, 12), torch.tensor([(4 / 12, 0.5, 1.0)]))[0, :-1]
    positive = (logits > 0).nonzero().flatten().tolist()
    assert len(positive) > 3
    assert choose(network, rows, None, 4, 0.5) == [*positive[-3:], 11]
    assert set(positive[-3:]) != set(logits.topk(3).indices.tolist()), "the best would be others"


def test_imitation_learns_every_frame_by_itself_and_collects_as_it_acts(network, tiny_workload, monkeypatch):
    retained = []
    retain = RolloutBatch.retain
    monkeypatch.setattr(RolloutBatch, "retain", lambda self, row, ids: (retained.append(ids), retain(self, row, ids)))
    noted = collect(tiny_workload, [0, 1], [2, 3], actor=network, view=network.view, candidates=4, progress=False)
    part = noted.rows(torch.arange(8))
    older = part.mask.bool()
    older[:, -1] = False
    logits = network(part.frames, part.mask, part.budget)
    kept = part.sets[:, 0]
    expected = (Bernoulli(logits=logits).log_prob(kept.float()) * older).sum(dim=1)
    torch.testing.assert_close(choices(network, part).log_prob(kept), expected, atol=1e-4, rtol=1e-4)
    for row, ids in enumerate(retained):
        budget, progress, _ = noted.budget[row].tolist()
        shown = noted.frames[row, noted.mask[row] > 0]
        shown[:, 0] *= noted.mask.shape[1] / len(shown)  # ages are shares of the slots
        assert ids == choose(network, shown.tolist(), None, round(budget * noted.mask.shape[1]), progress)
    assert len({len(ids) for ids in retained}) > 1
