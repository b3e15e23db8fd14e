"""Future Forcing, reconstructed: merge redundant tokens, then drop those that future queries are not expected to read.

The paper (arXiv 2605.30083) has neither code nor equations that are public. What is public: queries before rotation are nearly
stationary, so that statistics of past ones are a proxy for future ones; tokens are scored under the proxy, and redundant pairs
are merged within the affine subspace that it induces. Every formula here is ours, with these pieces:

- Proxy: mean μ and covariance Σ of all queries so far, before rotation, of every layer and head; rotated to the place of the
  frame to come by the mean rotation over its tokens.
- Score: the closed form of Expected Attention (arXiv 2510.00636) for a Gaussian query, softmax(μᵀk/√d + kᵀΣk/2d)·‖v‖, an
  entry of weight w counting w times.
- Subspace: μ and the leading eigenvectors of Σ, centred at the mean key. The coordinates of a key are scaled so that the
  squared distance of two keys is the expected squared difference of their logits under the proxy.
- Which pair is merged: two entries with equal logits may be merged without any change, whatever their values are. To first
  order the attention output changes by p_i p_j / (p_i + p_j) · |l_i − l_j| · ‖v_i − v_j‖, with p the expected attention; the
  pair for which this is least in root mean square is merged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from far_env.baselines.filling import count, share
from far_env.baselines.token_rules import newest_entries, oldest_entries, staying

if TYPE_CHECKING:
    from far_env.rollout.token_cache import CacheView

INFINITE = float("inf")


@dataclass(frozen=True)
class QueryProxy:
    """A Gaussian in place of the queries to come, per layer, row and head.

    Attributes:
        mean: (…, d), rotated.
        covariance: (…, d, d), rotated.
        affine: (…, d, r): a key's coordinates are its product with this, up to a constant.
    """

    mean: Tensor
    covariance: Tensor
    affine: Tensor

    @staticmethod
    def of(mean: Tensor, covariance: Tensor, rotation: Tensor, rank: int) -> QueryProxy:
        """The proxy from moments (…, d), (…, d, d) before rotation and the rotation, complex (d / 2,)."""
        mean = _rotated(mean.float(), rotation)
        covariance = _rotated(_rotated(covariance.float(), rotation).transpose(-1, -2), rotation)
        values, vectors = torch.linalg.eigh(covariance)
        leading = vectors[..., -rank:] * values[..., None, -rank:].clamp(min=0).sqrt()
        return QueryProxy(mean, covariance, torch.cat([mean[..., None], leading], dim=-1) / mean.shape[-1] ** 0.5)

    def logits(self, keys: Tensor) -> Tensor:
        """Logarithm of the expected exponential of q·k/√d for keys (…, n, d)."""
        dim = keys.shape[-1]
        linear = torch.einsum("...d,...nd->...n", self.mean, keys) / dim**0.5
        return linear + torch.einsum("...nd,...de,...ne->...n", keys, self.covariance, keys) / (2 * dim)


@dataclass
class Candidates:
    """Entries that may be merged or dropped, of several heads (the first axis), each with n places.

    Attributes:
        coordinates: of the keys in the affine subspace (heads, n, r).
        logits: under the proxy, without weights (heads, n); a constant of each head may be left out.
        values: (heads, n, d).
        weights: (heads, n).
        active: whether the place holds an entry (heads, n).
    """

    coordinates: Tensor
    logits: Tensor
    values: Tensor
    weights: Tensor
    active: Tensor

    def at(self, heads: Tensor, places: Tensor) -> Candidates:
        """One place of each of these heads, n = 1."""
        return Candidates(*(getattr(self, field.name)[heads, places].unsqueeze(1) for field in fields(self)))

    def of(self, heads: Tensor) -> Candidates:
        """These heads."""
        return Candidates(*(getattr(self, field.name)[heads] for field in fields(self)))

    def expected(self) -> Tensor:
        """Expected attention times the norm of the value (heads, n), to a factor for each head."""
        return self.weights * self.logits.exp() * self.values.norm(dim=-1)


def merging_costs(first: Candidates, second: Candidates) -> tuple[Tensor, Tensor]:
    """What merging an entry of ``first`` with one of ``second`` changes in the attention output, to first order.

    Returns:
        Costs (heads, m, n), to a factor that is the same for all pairs of a head, and root mean square differences of logits.
    """
    disagreement = torch.cdist(first.coordinates, second.coordinates)
    weights = (first.weights[..., :, None], second.weights[..., None, :])
    logits = (first.logits[..., :, None], second.logits[..., None, :])
    total = weights[0] + weights[1]
    # The logit of the merged entry, of which each of the two has its share.
    logit = (weights[0] * logits[0] + weights[1] * logits[1]) / total
    shares = weights[0] * weights[1] / total * logit.exp()
    return shares * disagreement * torch.cdist(first.values, second.values), disagreement


class FutureForcingReconstruction:
    """Merges the pair of tokens whose merging changes the output least under a proxy of future queries, then drops by score.

    A reconstruction, not the authors' method: nothing but the idea is public, see the module. The first tokens and the newest
    ones are neither merged nor dropped. While a head has too many entries, the cheapest pair is merged whose logits differ by
    at most ``disagreement`` in root mean square; where there is none, the entry of the lowest expected attention is dropped.
    The lighter of two entries is merged into the heavier one, of equal ones the older into the newer.

    Source: Future Forcing, arXiv 2605.30083 (reconstruction). Parameters ``f_sink``, ``f_recent``, shares of the budget;
    ``rank``, eigenvectors; ``disagreement``, in logits.
    """

    name = "future_forcing_reconstruction"
    family = "anchor"
    source = "reconstruction of Future Forcing, arXiv 2605.30083"
    query_moments: ClassVar[bool] = True

    def __init__(self, f_sink: float = 0.125, f_recent: float = 0.25, rank: int = 8, disagreement: float = 0.5) -> None:
        self.f_sink, self.f_recent = share(self.name, "f_sink", f_sink), share(self.name, "f_recent", f_recent)
        self.rank = count(self.name, "rank", rank, least=1)
        if isinstance(disagreement, bool) or not disagreement >= 0:
            raise ValueError(f"{self.name}: disagreement must be at least 0, got {disagreement!r}")
        self.disagreement = float(disagreement)

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        num_recent = max(view.tokens_per_frame, int(self.f_recent * view.budget))
        num_sink = min(int(self.f_sink * view.budget), view.budget - num_recent)
        kept = newest_entries(view, num_recent) | oldest_entries(view, num_sink)
        candidates = (view.frame >= 0) & ~kept
        excess = (view.frame >= 0).sum(dim=-1) - view.budget
        proxy = QueryProxy.of(view.queries.mean, view.queries.covariance, view.mean_rotation, self.rank)
        into = staying(view.frame >= 0)
        for layer in range(len(into)):  # one at a time, for the memory that all pairs take
            of_layer = QueryProxy(proxy.mean[layer], proxy.covariance[layer], proxy.affine[layer])
            into[layer] = self._reduced(view, layer, candidates[layer], excess[layer], of_layer)
        return into

    def _reduced(self, view: CacheView, layer: int, candidates: Tensor, excess: Tensor, proxy: QueryProxy) -> Tensor:
        """The answer (rows, heads, slots) for one layer."""
        # The candidates of a head in a row; where there are fewer than in another, inactive ones follow.
        size = int(candidates.sum(dim=-1).max())
        order = (~candidates).byte().argsort(dim=-1, stable=True)[..., :size].flatten(0, 1)
        active = candidates.flatten(0, 1).gather(-1, order)
        proxy = QueryProxy(*(x.flatten(0, 1) for x in (proxy.mean, proxy.covariance, proxy.affine)))
        keys = _chosen(view.rotated_key[layer].flatten(0, 1), order)
        logits = proxy.logits(keys)
        entries = Candidates(
            coordinates=keys @ proxy.affine,
            logits=logits - logits.masked_fill(~active, -INFINITE).amax(dim=-1, keepdim=True),
            values=_chosen(view.value[layer].float().flatten(0, 1), order),
            weights=view.weight[layer].flatten(0, 1).gather(-1, order).clamp(min=1),
            active=active,
        )
        reduced = self._merge_and_drop(entries, keys, proxy, excess.flatten(), logits - entries.logits)
        targets = torch.where(reduced >= 0, order.gather(-1, reduced.clamp(min=0)), -1)
        into = staying(view.frame[layer] >= 0).flatten(0, 1)
        into.scatter_(-1, order, torch.where(active, targets, into.gather(-1, order)))
        return into.view(candidates.shape)

    def _merge_and_drop(self, entries: Candidates, keys: Tensor, proxy: QueryProxy, excess: Tensor, offset: Tensor) -> Tensor:
        """The place into which each entry goes (heads, n), −1 for one that is dropped."""
        entries.active = entries.active.clone()
        num_heads, size = entries.weights.shape
        into = torch.arange(size, device=keys.device).repeat(num_heads, 1)
        costs = self._costs(entries, entries)
        costs.diagonal(dim1=-2, dim2=-1).fill_(INFINITE)
        for step in range(int(excess.max())):
            heads = torch.nonzero(excess > step).flatten()
            cheapest, pair = costs.flatten(1)[heads].min(dim=-1)
            first, second = pair // size, pair % size
            older, newer = torch.minimum(first, second), torch.maximum(first, second)
            older_wins = entries.weights[heads, older] > entries.weights[heads, newer]
            root, other = torch.where(older_wins, older, newer), torch.where(older_wins, newer, older)
            merges = cheapest.isfinite()
            least = entries.expected().masked_fill(~entries.active, INFINITE)[heads].argmin(dim=-1)
            gone = torch.where(merges, other, least)
            # Whatever was merged into the entry that goes, goes the same way.
            targets = torch.where(merges, root, -1)[:, None]
            into[heads] = torch.where(into[heads] == gone[:, None], targets, into[heads])
            entries.active[heads, gone] = False
            costs[heads, gone] = INFINITE
            costs[heads, :, gone] = INFINITE
            heads, root, other = heads[merges], root[merges], other[merges]
            if len(heads):
                total = entries.weights[heads, root] + entries.weights[heads, other]
                share = (entries.weights[heads, root] / total)[:, None]
                for part in (keys, entries.coordinates, entries.values):
                    part[heads, root] = share * part[heads, root] + (1 - share) * part[heads, other]
                entries.weights[heads, root] = total
                of_heads = QueryProxy(proxy.mean[heads], proxy.covariance[heads], proxy.affine[heads])
                entries.logits[heads, root] = (of_heads.logits(keys[heads, root][:, None]) - offset[heads, :1])[:, 0]
                new = self._costs(entries.at(heads, root), entries.of(heads))[:, 0]
                new[torch.arange(len(heads), device=root.device), root] = INFINITE
                costs[heads, root] = new
                costs[heads, :, root] = new
        return into

    def _costs(self, first: Candidates, second: Candidates) -> Tensor:
        """`merging_costs`, infinite for pairs that may not be merged."""
        costs, disagreement = merging_costs(first, second)
        usable = first.active[..., :, None] & second.active[..., None, :] & (disagreement <= self.disagreement)
        return costs.masked_fill(~usable, INFINITE)


def _chosen(entries: Tensor, order: Tensor) -> Tensor:
    return entries.gather(-2, order[..., None].expand(*order.shape, entries.shape[-1]))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of x (…, d) multiplied by complex numbers (d / 2,)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)
