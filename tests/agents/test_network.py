"""The scorer: small, blind to the order of rows and to padding."""

from __future__ import annotations

import pytest
import torch

from far_env.agents.network import RetentionNetwork, ValueNetwork


def observation(rows: int, slots: int | None = None, seed: int = 0):
    """Random frames, mask and budget parts of 4 observations with ``rows`` frames right-aligned in ``slots``."""
    slots = slots or rows
    generator = torch.Generator().manual_seed(seed)
    ages = torch.arange(rows - 1, -1, -1.0)
    content = torch.rand((4, rows, 4), generator=generator)
    inputs = torch.cat([(ages / slots).expand(4, -1)[..., None], (1 / (1 + ages)).expand(4, -1)[..., None], content], dim=-1)
    frames, mask = torch.zeros(4, slots, 6), torch.zeros(4, slots)
    frames[:, slots - rows :], mask[:, slots - rows :] = inputs, 1
    return frames, mask, torch.tensor([4 / slots, 0.3, rows / slots]).expand(4, -1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = RetentionNetwork()
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return network.eval()


def test_the_default_size_stays_below_100k_weights():
    assert sum(p.numel() for p in RetentionNetwork().parameters()) < 100_000


@torch.no_grad()
def test_permuting_older_rows_permutes_their_logits(network):
    frames, mask, budget = observation(9)
    order = torch.cat([torch.randperm(8), torch.tensor([8])])  # the position determines which row is the newest
    torch.testing.assert_close(
        network(frames[:, order], mask, budget), network(frames, mask, budget)[:, order], atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_padding_and_the_number_of_slots_change_nothing(network):
    alone, padded = network(*observation(6)), network(*observation(6, slots=37))
    torch.testing.assert_close(padded[:, -6:], alone, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    critic = ValueNetwork()
    torch.testing.assert_close(critic(*observation(6)), critic(*observation(6, slots=37)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_input_matters(network):
    frames, mask, budget = observation(6)
    base = network(frames, mask, budget)
    for column in range(6):
        changed = frames.clone()
        changed[:, 2, column] += 0.1
        assert (network(changed, mask, budget) - base).abs().max() > 1e-4
    for column in range(3):
        changed = budget.clone()
        changed[:, column] += 0.1
        assert (network(frames, mask, changed) - base).abs().max() > 1e-4


def test_a_fresh_scorer_fills_the_budget():
    torch.manual_seed(1)
    assert (RetentionNetwork()(*observation(9)) > 0).all()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="width 30 must be a multiple of num_heads 4"):
        RetentionNetwork(width=30)


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [0, 2])
def test_without_attention_a_row_is_scored_alone(num_layers):
    torch.manual_seed(0)
    sizes = {"num_layers": num_layers, "attention": False}
    alone, together = RetentionNetwork(**sizes).eval(), RetentionNetwork().eval()
    frames, mask, budget = observation(6)
    changed = frames.clone()
    changed[:, 2, 2:] += 0.5
    for network, affected in ((alone, {2}), (together, set(range(6)))):
        differs = (network(changed, mask, budget) - network(frames, mask, budget)).abs().amax(dim=0) > 1e-6
        assert set(differs.nonzero().flatten().tolist()) == affected
