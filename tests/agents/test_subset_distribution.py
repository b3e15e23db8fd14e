"""The budgeted-subset distribution against enumeration of all sets."""

from __future__ import annotations

import itertools

import pytest
import torch

from far_env.agents.subset_distribution import BudgetedSubset


def enumerate_sets(logits, free, forced, max_size):
    """All legal masks of one row and their log-probabilities, by definition."""
    masks, totals = [], []
    for bits in itertools.product([False, True], repeat=len(logits)):
        mask = torch.tensor(bits)
        if (mask & ~free & ~forced).any() or (forced & ~mask).any() or mask.sum() > max(max_size, forced.sum()):
            continue
        masks.append(mask)
        totals.append((logits * (mask & free)).sum())
    totals = torch.stack(totals)
    return torch.stack(masks).float(), totals - totals.logsumexp(0)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((5, 7), generator=generator, dtype=torch.float64)
    forced = torch.zeros(5, 7, dtype=torch.bool)
    forced[:, -1] = True
    free = ~forced
    free[1, :3] = False  # padding
    free[2, :6] = False  # nothing to decide
    max_size = torch.tensor([4, 3, 2, 1, 7])
    return logits, free, forced, max_size


def test_probabilities_mode_and_entropy_equal_enumeration(rows):
    distribution = BudgetedSubset(*rows)
    for row in range(5):
        masks, expected = enumerate_sets(*(part[row] for part in rows))
        actual = torch.stack([distribution.log_prob(mask.expand(5, -1))[row] for mask in masks])
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(distribution.entropy()[row], -(expected.exp() * expected).sum(), atol=1e-10, rtol=0)
        assert distribution.mode()[row].tolist() == masks[expected.argmax()].tolist()


def test_samples_follow_the_probabilities(rows):
    torch.manual_seed(0)
    count = 100_000
    for row in range(5):
        masks, expected = enumerate_sets(*(part[row] for part in rows))
        many = BudgetedSubset(*(part[row].expand(count, *part[row].shape) for part in rows))
        drawn = many.sample()
        weights = 2.0 ** torch.arange(7)
        frequency = torch.bincount((drawn * weights).sum(dim=1).long(), minlength=128) / count
        of_masks = frequency[(masks * weights).sum(dim=1).long()]
        assert of_masks.sum() == pytest.approx(1), "only legal sets are drawn"
        # five standard deviations of a binomial share
        probability = expected.exp().float()
        assert ((of_masks - probability).abs() <= 5 * (probability * (1 - probability) / count).sqrt() + 1e-9).all()


def test_illegal_masks_have_no_probability(rows):
    distribution = BudgetedSubset(*rows)
    too_many = torch.ones(5, 7)
    without_newest = torch.zeros(5, 7)
    padding = torch.zeros(5, 7)
    padding[:, [0, -1]] = 1
    assert (distribution.log_prob(too_many)[:4] < -1e8).all()
    assert (distribution.log_prob(without_newest) < -1e8).all()
    assert (distribution.log_prob(padding)[1:3] < -1e8).all() and distribution.log_prob(padding)[0] > -100


def test_gradients_are_right(rows):
    logits, *budgets_and_masks = rows
    logits = logits.requires_grad_()
    masks = BudgetedSubset(logits.detach(), *budgets_and_masks).mode()
    assert torch.autograd.gradcheck(lambda x: BudgetedSubset(x, *budgets_and_masks).log_prob(masks), logits)
    assert torch.autograd.gradcheck(lambda x: BudgetedSubset(x, *budgets_and_masks).entropy(), logits)
