"""The budgeted-subset distribution: exact probabilities over all sets of at most k frames, from one logit per frame.

log p(S) = Σ_{i∈S} logit_i − log Σ_{|R|≤k} exp Σ_{i∈R} logit_i. Normaliser and sampling use the table of log elementary
symmetric polynomials, (frames + 1) × (k + 1), filled frame by frame (Chen & Liu 1997, conditional Bernoulli sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = -1e9


class BudgetedSubset:
    """Distribution over keep masks.

    Args:
        logits: float (B, N).
        free: bool (B, N), slots that may be in the set or not; all others are fixed.
        forced: bool (B, N), slots that always are in the set (disjoint from ``free``); they take budget.
        max_size: int (B,), largest size of a set, forced slots included.
    """

    def __init__(self, logits: Tensor, free: Tensor, forced: Tensor, max_size: Tensor) -> None:
        self.logits, self.free, self.forced = logits, free, forced
        self.capacity = (max_size - forced.sum(dim=1)).clamp(min=0)
        self._table = self._prefix_table()
        self.log_normaliser = self._within_capacity(self._table[:, -1]).logsumexp(dim=1)

    @staticmethod
    def of_histories(logits: Tensor, mask: Tensor, max_size: Tensor) -> BudgetedSubset:
        """Over right-aligned histories whose newest frame always stays; mask (B, N) is above 0 at frames."""
        forced = torch.zeros_like(mask, dtype=torch.bool)
        forced[:, -1] = True
        return BudgetedSubset(logits, (mask > 0) & ~forced, forced, max_size)

    def log_prob(self, masks: Tensor) -> Tensor:
        """log p of keep masks (B, N); −1e9 or less for masks that break the rules."""
        chosen = masks.bool()
        illegal = ((chosen & ~self.free & ~self.forced) | (self.forced & ~chosen)).any(dim=1)
        illegal |= (chosen & self.free).sum(dim=1) > self.capacity
        total = (self.logits * (chosen & self.free)).sum(dim=1)
        return total - self.log_normaliser + illegal * _NONE

    def entropy(self) -> Tensor:
        """(B,) in nats: log Z − E[Σ_{i∈S} logit_i], with the expectation from the same recurrence."""
        batch, _, size = self._table.shape
        expected = self.logits.new_zeros(batch, size)
        for i in range(self.logits.shape[1]):
            logit = self.logits[:, i : i + 1]
            before, after = self._table[:, i], self._table[:, i + 1]
            share = (_shift(before) + logit - after).clamp(max=0).exp() * self.free[:, i : i + 1]
            expected = (1 - share) * expected + share * (_shift(expected) + logit)
        weights = self._within_capacity(self._table[:, -1]).softmax(dim=1)
        return self.log_normaliser - (weights * expected).sum(dim=1)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Keep masks (B, N), float, drawn exactly: the size first, then frame by frame from the last."""
        table = self._table
        capacity = torch.distributions.Categorical(logits=self._within_capacity(table[:, -1])).sample()
        chosen = self.forced.clone()
        rows = torch.arange(len(table), device=table.device)
        for i in range(self.logits.shape[1] - 1, -1, -1):
            with_i = table[rows, i, (capacity - 1).clamp(min=0)] + self.logits[:, i]
            inclusion = (with_i - table[rows, i + 1, capacity]).exp() * (capacity > 0) * self.free[:, i]
            take = torch.rand(len(rows), device=table.device) < inclusion
            chosen[:, i] |= take
            capacity = capacity - take.long()
        return chosen.float()

    def mode(self) -> Tensor:
        """The most probable mask: the forced slots and the up to k largest positive logits."""
        logits = self.logits.masked_fill(~self.free, _NONE)
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (self.forced | (self.free & (logits > 0) & (rank < self.capacity[:, None]))).float()

    def _prefix_table(self) -> Tensor:
        """(B, N+1, K+1): entry [i, j] is the log-sum over sets of j of the first i free slots."""
        batch, slots = self.logits.shape
        row = self.logits.new_full((batch, int(self.capacity.max()) + 1), _NONE)
        row[:, 0] = 0
        rows = [row]
        for i in range(slots):
            with_i = _shift(row) + self.logits[:, i : i + 1]
            row = torch.where(self.free[:, i : i + 1], torch.logaddexp(row, with_i), row)
            rows.append(row)
        return torch.stack(rows, dim=1)

    def _within_capacity(self, by_size: Tensor) -> Tensor:
        """Log-sums by set size (B, K+1), with sizes above a row's capacity excluded."""
        sizes = torch.arange(by_size.shape[1], device=by_size.device)
        return by_size.masked_fill(sizes > self.capacity[:, None], _NONE)


def _shift(by_size: Tensor) -> Tensor:
    """Entries moved from size j to size j + 1; nothing has size 0."""
    return torch.cat([torch.full_like(by_size[:, :1], _NONE), by_size[:, :-1]], dim=1)
