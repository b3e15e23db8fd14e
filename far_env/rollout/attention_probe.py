"""Signals of one new frame, recorded while it is generated: what its queries attend to, and what later queries are expected to.

The probe does not change the frame: attention runs through its fused kernel as without a probe, and what a signal needs is
computed a second time in float32. Everything is reduced in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from far_env.host.blocks import rotate

EXPECTED = ("expected_mass", "expected_cos")
PROXY_RANK = 8
"""Leading eigenvectors of the queries' covariance onto which keys are projected to compare them."""
MIN_EIGENVALUE_SHARE = 1e-3
"""Eigenvalues below this share of the largest, or a mean with less than this share outside of the eigenvectors, are left out:
their directions would be those of rounding errors."""
EPS = 1e-8


@dataclass(frozen=True)
class QueryMoments:
    """Moments of queries before rotation.

    Attributes:
        count: queries per layer and head.
        mean: (layers, …, heads, d).
        scatter: sum of the outer products of deviations from the mean (layers, …, heads, d, d).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @staticmethod
    def of(queries: Tensor) -> QueryMoments:
        """The moments of queries (layers, …, tokens, heads, d), over the tokens."""
        mean = queries.mean(dim=-3)
        centred = queries - mean.unsqueeze(-3)
        return QueryMoments(queries.shape[-3], mean, torch.einsum("...thd,...the->...hde", centred, centred))

    def merged(self, other: QueryMoments | None) -> QueryMoments:
        """The moments of both samples together (Chan, Golub and LeVeque 1983)."""
        if other is None:
            return self
        count, change = self.count + other.count, other.mean - self.mean
        between = change[..., :, None] * change[..., None, :] * (self.count * other.count / count)
        return QueryMoments(count, self.mean + change * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(layers, …, heads, d, d), divided by the count."""
        return self.scatter / self.count


class AttentionProbe:
    """Records one new frame per row while its ODE is solved; see `far_env.host.sampler.FrameProbe`.

    Args:
        signal_names: names of the signals to record.
        token_counts: of each row, the tokens of its clean frames.
        num_tokens: slots for clean tokens in front of the new frame's, and the number of the new frame's tokens.
        estimate_at: the ODE step at which the clean frame is estimated, and its sigma.
        device: where the host computes.
    """

    def __init__(
        self,
        signal_names: Sequence[str],
        token_counts: Sequence[Sequence[int]],
        num_tokens: tuple[int, int],
        estimate_at: tuple[int, float],
        device: torch.device,
    ) -> None:
        self.signal_names = signal_names
        self.token_counts = token_counts
        self.estimate_step, self.sigma = estimate_at
        num_clean, num_new = num_tokens
        rows, most_frames = len(token_counts), max(map(len, token_counts))
        # Which frame a token belongs to; the new frame has the last column, padding none.
        member = torch.zeros(rows, num_clean + num_new, most_frames + 1)
        for row, counts in enumerate(token_counts):
            frames = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
            member[row, torch.arange(len(frames)), frames] = 1
        member[:, num_clean:, most_frames] = 1
        self.member = member.to(device)
        self.shares = self.member / self.member.sum(dim=1, keepdim=True).clamp(min=1)
        self.step = 0
        self.first_step: dict[str, list[Tensor]] = {"qk_first": [], "key_cos": []}
        self.queries: list[Tensor] = []
        self.table: Tensor | None = None
        self.mass: list[Tensor] = []
        self.estimate: Tensor | None = None

    def attention(self, query: Tensor, key: Tensor, table: Tensor, mask: Tensor | None) -> None:
        """Record one block's queries and keys."""
        rows = len(self.member)
        query, key, table = query[-rows:].float(), key[-rows:].float(), table[-rows:]
        if "attn_mass" in self.signal_names:
            self.mass.append(self._mass(query, key, None if mask is None else mask[-rows:]))
        if self.step > 0:
            return
        if "qk_first" in self.signal_names:
            # The mean of all products is the product of the means.
            frames = torch.einsum("rtk,rthd->rkhd", self.shares, key)
            products = torch.einsum("rhd,rkhd->rk", query.mean(dim=1), frames)
            self.first_step["qk_first"].append(products / (key.shape[2] * key.shape[3] ** 0.5))
        if "key_cos" in self.signal_names:
            frames = torch.einsum("rtk,rthd->rkhd", self.shares, F.normalize(key, dim=-1, eps=EPS))
            self.first_step["key_cos"].append(torch.einsum("rkhd,rjhd->rkj", frames, frames) / key.shape[2])
        if any(name in self.signal_names for name in EXPECTED):
            self.queries.append(rotate(query, table.conj()))
            self.table = table

    def velocity(self, step: int, latent: Tensor, velocity: Tensor) -> None:
        """Estimate the clean frame at the ODE step for it."""
        if step == self.estimate_step:
            self.estimate = latent.float() - self.sigma * velocity.float()
        self.step = step + 1

    def frame_signals(self, row: int) -> dict[str, Tensor]:
        """The attention signals of a row's new frame: one entry per frame of its history, the new frame last."""
        kept = len(self.token_counts[row])
        signals = {}
        if self.mass:
            mass = torch.stack([layer[row] for layer in self.mass]).mean(dim=0)
            signals["attn_mass"] = torch.cat([mass[:kept], mass[-1:]])
        if self.first_step["qk_first"]:
            products = torch.stack([layer[row] for layer in self.first_step["qk_first"]]).mean(dim=0)
            signals["qk_first"] = torch.cat([products[:kept], products[-1:]])
        if self.first_step["key_cos"]:
            cosines = torch.stack([layer[row] for layer in self.first_step["key_cos"]]).mean(dim=0)
            signals["key_cos"] = F.pad(cosines[:kept, :kept], (0, 1, 0, 1), value=float("nan"))
        return signals

    def expected_signals(self, row: int, memory: Tensor, before: QueryMoments | None) -> tuple[dict[str, Tensor], QueryMoments]:
        """The requested ones of EXPECTED for a row's history, and the moments of all its queries so far.

        Args:
            memory: keys and values (layers, 2, tokens, heads, d) of the row's clean frames.
            before: moments of the frames generated earlier.
        """
        moments = QueryMoments.of(torch.stack([layer[row] for layer in self.queries]))
        if before is not None:
            moments = before.merged(moments)
        kept = len(self.token_counts[row])
        shares = self.shares[row, : memory.shape[2], :kept]
        rotation = self.table[row if len(self.table) > 1 else 0].mean(dim=0)[0]
        mean, covariance = _rotated(moments.mean, rotation), moments.covariance
        covariance = _rotated(_rotated(covariance, rotation).transpose(-1, -2), rotation)
        keys, values = memory.float().unbind(1)
        mass = expected_mass(mean, covariance, keys, values)
        cosines = expected_cosines(mean, covariance, torch.einsum("tk,lthd->lhkd", shares, keys))
        signals = {
            "expected_mass": F.pad(mass @ shares, (0, 1), value=float("nan")),
            "expected_cos": F.pad(cosines, (0, 1, 0, 1), value=float("nan")),
        }
        return {name: signals[name] for name in EXPECTED if name in self.signal_names}, moments

    def denoise_gaps(self, latents: Tensor) -> Tensor:
        """Mean squared difference (R,) between the estimates and the finished frames (R, 1, C, h, w)."""
        return (self.estimate - latents.float()).square().flatten(1).mean(dim=1)

    def _mass(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention per frame (R, frames + 1), mean over heads and queries."""
        logits = torch.einsum("rshd,rthd->rhst", query, key) / query.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
        attention = logits.softmax(dim=-1).mean(dim=(1, 2))
        return torch.einsum("rt,rtk->rk", attention, self.member)


def expected_mass(mean: Tensor, covariance: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Expected attention (arXiv 2510.00636) times the norm of the values, mean over layers and heads.

    Args:
        mean, covariance: of the queries (layers, heads, d), (layers, heads, d, d), rotated to their position.
        keys, values: (layers, tokens, heads, d), float32.

    Returns:
        (tokens,).
    """
    dim = keys.shape[-1]
    logits = torch.einsum("lhd,lthd->lth", mean, keys) / dim**0.5
    logits = logits + torch.einsum("lthd,lhde,lthe->lth", keys, covariance, keys) / (2 * dim)
    return (logits.softmax(dim=1) * values.norm(dim=-1)).mean(dim=(0, 2))


def expected_cosines(mean: Tensor, covariance: Tensor, keys: Tensor) -> Tensor:
    """Cosines (K, K) of frames in the subspace of expected queries, mean over layers and heads.

    Args:
        mean, covariance: as in `expected_mass`.
        keys: mean keys of frames (layers, heads, K, d).
    """
    centred = keys - keys.mean(dim=2, keepdim=True)
    values, vectors = torch.linalg.eigh(covariance)
    leading = vectors[..., -PROXY_RANK:] * (values[..., -PROXY_RANK:] > MIN_EIGENVALUE_SHARE * values[..., -1:])[..., None, :]
    mean = mean[..., None]
    residual = mean - leading @ (leading.transpose(-1, -2) @ mean)
    residual = residual * (residual.norm(dim=-2, keepdim=True) > MIN_EIGENVALUE_SHARE * mean.norm(dim=-2, keepdim=True))
    basis = torch.cat([leading, F.normalize(residual, dim=-2, eps=EPS)], dim=-1)
    projected = F.normalize(centred @ basis, dim=-1, eps=EPS)
    return (projected @ projected.transpose(-1, -2)).mean(dim=(0, 1))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of x (…, d) multiplied by complex numbers (d / 2,)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)
