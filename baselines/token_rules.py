"""Rules over the entries of a streaming rollout (`far_env.rollout.streaming`): which tokens stay, in every layer and head.

They are the token forms of rules that the baselines apply to whole frames, and for H2O, SnapKV and FlowCache the original form:
these methods score tokens. All are asked whenever a frame was appended and a head then has more entries than the budget; the
newest frame always stays. "Attention" is that of the clean frame's queries when it is encoded, once per frame; the originals
have queries of generated text, or of noisy frames.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from far_env.baselines.filling import count, share
from far_env.baselines.partition import slots

if TYPE_CHECKING:
    from far_env.rollout.token_cache import CacheView
    from far_env.rollout.token_policy import TokenSizes


def staying(stays: Tensor) -> Tensor:
    """The answer of a policy that merges nothing: bool (layers, rows, heads, slots) to slots, −1 for what is dropped."""
    own = torch.arange(stays.shape[-1], device=stays.device)
    return torch.where(stays, own, -1)


def best(scores: Tensor, candidates: Tensor, places: Tensor | int) -> Tensor:
    """The candidates with the highest scores, of equal ones the newer.

    Args:
        scores: (…, slots).
        candidates: bool (…, slots).
        places: how many, one number or one for each of the leading axes (…).

    Returns:
        bool (…, slots).
    """
    scores = scores.float().masked_fill(~candidates, float("-inf")).flip(-1)
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).flip(-1)
    places = places[..., None] if isinstance(places, Tensor) else places
    return (ranks < places) & candidates


def newest_entries(view: CacheView, number: int) -> Tensor:
    """The last entries of every head, of which empty slots are none: bool (layers, rows, heads, slots)."""
    return best(torch.arange(view.frame.shape[-1], device=view.frame.device).expand_as(view.frame), view.frame >= 0, number)


def oldest_entries(view: CacheView, number: int) -> Tensor:
    """The first entries of every head."""
    present = view.frame >= 0
    return present & (present.cumsum(dim=-1) <= number)


def fill(view: CacheView, protected: Tensor, scores: Tensor) -> Tensor:
    """Protected entries, and the others with the highest scores up to the budget."""
    others = (view.frame >= 0) & ~protected
    return staying(protected | best(scores, others, view.budget - protected.sum(dim=-1)))


class RecentEntries:
    """Keeps the newest tokens.

    Source: sliding window. Faithful and complete; of a frame that is left in part, the last rows of the picture stay.
    """

    name = "recent_fill"
    family = "recency"
    source = "sliding window"

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        return staying(newest_entries(view, view.budget))


class StreamingLLM:
    """Keeps the first tokens, as attention sinks, and the newest ones; positions are counted inside the cache.

    Faithful: the rule, the four sinks, keys cached before rotation. Adapted: a frame enters at a time instead of a token.

    Source: StreamingLLM, arXiv 2309.17453. Parameter ``n_sink``, in tokens.
    """

    name = "streaming_llm"
    family = "anchor"
    source = "StreamingLLM, arXiv 2309.17453"

    def __init__(self, n_sink: int = 4) -> None:
        self.n_sink = count(self.name, "n_sink", n_sink)

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        num_sink = min(self.n_sink, view.budget - view.tokens_per_frame)
        return staying(oldest_entries(view, num_sink) | newest_entries(view, view.budget - num_sink))


class SinkRecent:
    """Keeps all tokens of the first frames, and the newest tokens: StreamingLLM's rule as systems for video apply it.

    Source: StreamingLLM, arXiv 2309.17453; LongLive. Parameter ``n_sink``, in frames.
    """

    name = "sink_recent"
    family = "anchor"
    source = "StreamingLLM, arXiv 2309.17453"

    def __init__(self, n_sink: int = 1) -> None:
        self.n_sink = count(self.name, "n_sink", n_sink)

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        room = view.budget - view.tokens_per_frame
        sinks = (view.frame >= 0) & (view.frame < self.n_sink) & oldest_entries(view, room)
        return fill(view, sinks, torch.arange(view.frame.shape[-1], device=sinks.device).expand_as(view.frame))


class HeavyHitters:
    """Keeps the newest tokens, and of the others those that have received most attention, in every head by itself.

    Faithful: attention is summed over all queries since the token came, without decay, and lost with the token; the newest
    tokens have as large a share as the others. Adapted: a frame enters at a time.

    Source: H2O, arXiv 2306.14048. Parameter ``f_recent``, a share of the budget.
    """

    name = "h2o"
    family = "anchor"
    source = "H2O, arXiv 2306.14048"
    attention_frames: ClassVar[int] = 1

    def __init__(self, f_recent: float = 0.5) -> None:
        self.f_recent = share(self.name, "f_recent", f_recent)

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        num_recent = max(view.tokens_per_frame, math.floor(self.f_recent * view.budget))
        return fill(view, newest_entries(view, num_recent), view.accumulated)


class SnapKV:
    """Keeps the tokens of a window of newest frames, and of the others those that the window attends to, pooled.

    Faithful: attention is summed over the queries of the window (32 in the experiments, two frames here), averaged over five
    neighbouring tokens, and every head chooses for itself. Adapted: the original chooses once, at the end of the prompt; this
    chooses again whenever the budget is exceeded.

    Source: SnapKV, arXiv 2404.14469. Parameters ``window``, in frames, and ``pool``, in tokens.
    """

    name = "snapkv"
    family = "anchor"
    source = "SnapKV, arXiv 2404.14469"

    def __init__(self, window: int = 2, pool: int = 5) -> None:
        self.window = count(self.name, "window", window, least=1)
        self.pool = count(self.name, "pool", pool, least=1)
        if self.pool % 2 == 0:
            raise ValueError(f"{self.name}: pool must be odd, got {pool}")
        self.attention_frames = self.window

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        num_frames = min(self.window, max(1, view.budget // view.tokens_per_frame - 1))
        window = newest_entries(view, num_frames * view.tokens_per_frame)
        present = (view.frame >= 0).float()
        sums = view.received[-num_frames:].sum(dim=0) * present
        scores = pooled(sums, self.pool) / pooled(present, self.pool).clamp(min=1 / self.pool)
        return fill(view, window, scores)


def pooled(values: Tensor, kernel: int) -> Tensor:
    """Means (…, slots) of ``kernel`` neighbouring slots, those outside counting as 0."""
    flat = values.flatten(0, -2)[:, None]
    return F.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2).view_as(values)


class FlowCacheTokens:
    """Keeps the newest frame, and of the others the tokens that are attended to and unlike the rest.

    Faithful: the score λ·a − (1 − λ)·r with λ = 0.07. a is the attention of the newest frame's queries, averaged over them and
    max-pooled over seven tokens; r the softmax over tokens of the mean cosine of a key to all others. Tokens are the default
    granularity of the original. Adapted: it frees one chunk of frames at a time, this one frame; reuse of chunks is not part of
    a policy.

    Source: FlowCache, arXiv 2602.10825. Parameter ``lam``.
    """

    name = "flowcache"
    family = "chunkwise"
    source = "FlowCache, arXiv 2602.10825"
    attention_frames: ClassVar[int] = 1

    def __init__(self, lam: float = 0.07) -> None:
        self.lam = share(self.name, "lam", lam)

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        newest = view.frame == view.newest
        others = (view.frame >= 0) & ~newest
        attention = view.received[-1] / view.tokens_per_frame * others
        pool = F.max_pool1d(attention.flatten(0, -2)[:, None], 7, stride=1, padding=3).view_as(attention)
        keys = F.normalize(view.rotated_key, dim=-1) * others[..., None]
        # The sum of all cosines of a key but that with itself.
        cosines = torch.einsum("...nd,...d->...n", keys, keys.sum(dim=-2)) - 1
        mean = cosines / (others.sum(dim=-1, keepdim=True) - 1).clamp(min=1)
        redundancy = mean.masked_fill(~others, float("-inf")).softmax(dim=-1)
        return fill(view, newest, self.lam * pool - (1 - self.lam) * redundancy)


class TwoLevels:
    """Keeps the newest frames at full resolution, and those before them coarse, as far back as the tokens suffice.

    Faithful: FAR-Long's two levels in this order, the only one that the host was trained with. Adapted: full frames have a
    share of the tokens and at most the host's window; the coarse ones do not reach back to the beginning.

    Source: FAR, arXiv 2503.19325, §3.4. Parameter ``f_recent``, the share of the budget for full frames.
    """

    name = "far_two_level"
    family = "anchor"
    source = "FAR, arXiv 2503.19325"

    def __init__(self, f_recent: float = 0.5) -> None:
        self.f_recent = share(self.name, "f_recent", f_recent)

    def coarse_frames(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """All but the newest ones."""
        num_full = max(1, math.floor(self.f_recent * sizes.budget / sizes.full + 0.5))
        return frames[: -min(num_full, sizes.window)]

    def retain(self, view: CacheView) -> Tensor:
        """The newest entries. Raises ValueError on a host without coarse tokens."""
        need_coarse(self.name, view)
        return staying(newest_entries(view, view.budget))


class SinksAndCoarse:
    """Keeps PackForcing's sinks, compressed middle and newest frames, with the host's coarse tokens for the middle.

    Faithful: the three parts; the middle is a queue. Adapted: the host's coarse tokens, four times fewer, for those of a
    trained compressor with 32 times fewer; single frames for blocks of four; no choice among the compressed frames for each new
    one. The host was trained without full frames before coarse ones.

    Source: PackForcing, arXiv 2603.25730. Parameters ``f_sink``, ``f_recent``, shares of the budget.
    """

    name = "packforcing_coarse"
    family = "anchor"
    source = "PackForcing, arXiv 2603.25730"

    def __init__(self, f_sink: float = 0.5, f_recent: float = 0.25) -> None:
        self.f_sink = share(self.name, "f_sink", f_sink, some=True)
        self.f_recent = share(self.name, "f_recent", f_recent)

    def coarse_frames(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """Those that are neither sinks nor newest."""
        num_sink, _, num_recent = slots(sizes.budget // sizes.full, self.f_sink, self.f_recent)
        return [number for number in frames[:-num_recent] if number >= num_sink]

    def retain(self, view: CacheView) -> Tensor:
        """Sinks and the newest entries. Raises ValueError on a host without coarse tokens."""
        need_coarse(self.name, view)
        num_sink, _, _ = slots(view.budget // view.tokens_per_frame, self.f_sink, self.f_recent)
        sinks = (view.frame >= 0) & (view.frame < num_sink)
        return fill(view, sinks, torch.arange(view.frame.shape[-1], device=sinks.device).expand_as(view.frame))


def need_coarse(name: str, view: CacheView) -> None:
    """Raise ValueError on a host that has no coarse tokens."""
    if view.tokens_per_coarse_frame is None:
        raise ValueError(f"{name} needs a host with coarse frames, a FAR-Long such as embedded_long or far_b_long_dmlab")
