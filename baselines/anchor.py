"""Anchor policies: some old frames and the newest frames are always kept; frames between them are thinned out or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from far_env.baselines.filling import FillingPolicy, History, count, require, share
from far_env.baselines.partition import PartitionPolicy, Parts


class SinkRecent(PartitionPolicy):
    """StreamingLLM's attention sinks: keeps the oldest frames and the newest frames, and drops all frames between them.

    Faithful: the rule, and positions counted inside the cache (the host re-indexes the kept frames). Adapted: frames instead of
    tokens; the original keeps 4 tokens, versions for video keep 3 to 8 frames.

    Source: StreamingLLM, arXiv 2309.17453 and its code. Tier: M. Parameter ``n_sink``, at most budget − 1.
    """

    name = "sink_recent"
    source = "StreamingLLM, arXiv 2309.17453"
    GRID = {"n_sink": (0, 1, 2, 4)}

    def __init__(self, n_sink: int = 1) -> None:
        super().__init__(sink=count(self.name, "n_sink", n_sink), recent=1, mid_score=None)


class RollingForcing(PartitionPolicy):
    """The retention rule of Rolling Forcing: sinks and newest frames in equal shares.

    Faithful: the split (3 sink frames and 3 recent frames). Adapted: the joint denoising of a rolling window needs a host that
    was trained for it and has no counterpart here.

    Source: Rolling Forcing, arXiv 2509.25161 and its code. Tier: M. Parameter ``f_sink``, the share of the sinks in the budget.
    """

    name = "rolling_forcing"
    source = "Rolling Forcing, arXiv 2509.25161"
    equivalent_to = {"sink_recent": 3}
    GRID = {"f_sink": (0.25, 0.5, 0.75)}

    def __init__(self, f_sink: float = 0.5) -> None:
        sink = share(self.name, "f_sink", f_sink)
        super().__init__(sink, 1.0 - sink, mid_score=None)


class PackCachePaper(FillingPolicy):
    """PackCache's decay over frames: keeps anchors, the newest frames, and a tail in which the share of kept frames halves with
    every frame of distance.

    Faithful: anchors are exempt from the decay, and the d-th past frame has the share 2^−d. Adapted: a frame cannot be kept in
    part, so a share is at most one frame. This gives one place each to the newest budget − anchors − tail frames, and ``tail``
    places to all older frames, for those with the longest remaining life (`remaining_life`). With an unbounded tail, a frame at
    distance j would be kept with a frequency of exactly 2^−j. Which tokens of a frame the original keeps is not published.

    Source: PackCache, arXiv 2601.04359; its equations from secondary sources. Tier: M. Parameters ``n_anchor``; ``tail``, the
    places of the decayed part; ``rounding``, "ruler" or "nearest" (the newest frames of the tail, which makes the rule equal to
    sink_recent); ``anchors``, the "first" frames of the clip or the "last_context" frames.
    """

    name = "packcache_paper"
    family = "anchor"
    source = "PackCache, arXiv 2601.04359"
    GRID = {"n_anchor": (0, 1, 2), "tail": (1, 2, 4), "anchors": ("first", "last_context")}

    def __init__(
        self,
        n_anchor: int = 1,
        tail: int = 1,
        rounding: Literal["ruler", "nearest"] = "ruler",
        anchors: Literal["first", "last_context"] = "first",
    ) -> None:
        super().__init__()
        require(rounding in ("ruler", "nearest"), self.name, "rounding", rounding, "'ruler' or 'nearest'")
        require(anchors in ("first", "last_context"), self.name, "anchors", anchors, "'first' or 'last_context'")
        self.n_anchor, self.tail = count(self.name, "n_anchor", n_anchor), count(self.name, "tail", tail)
        self.rounding, self.anchors = rounding, anchors

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        rows = range(len(history))
        num_anchors = self._num_anchors(history.max_frames)
        free = history.max_frames - num_anchors
        num_full = max(1, free - self.tail)
        first = 0 if self.anchors == "first" else max(0, history.num_context - num_anchors)
        anchors = [i for i in rows if first <= history.births[i] < first + num_anchors]
        others = [i for i in rows if i not in anchors]
        full, packed = others[-num_full:], others[:-num_full]

        def worth(row: int) -> tuple[int, int]:
            birth = history.births[row]
            life = remaining_life(birth, history.births[full[0]] - birth)
            return (life if self.rounding == "ruler" else 0), birth

        stay = sorted(packed, key=worth, reverse=True)[: free - num_full]
        return anchors, [*stay, *full]

    def _num_anchors(self, max_frames: int) -> int:
        return min(self.n_anchor, max_frames - 1)

    def _tags(self, max_frames: int) -> dict[str, Any]:
        return {
            "anchor_preservation_rule": "condition_frames",
            "long_term_budget_fraction": self._num_anchors(max_frames) / max_frames,
        }


def remaining_life(birth: int, distance: int) -> int:
    """For how many more steps the "ruler" rounding keeps a frame that is ``distance`` frames older than the newest frames with
    a place each: the number of trailing zero bits of birth + 1, minus the distance. Of any 2^j successive frames exactly one
    reaches distance j."""
    marker = birth + 1
    return (marker & -marker).bit_length() - 1 - distance


class DeCoPrune(PartitionPolicy):
    """DeCoPrune: keeps the frames that the context predicted worst.

    Faithful: the criterion, which is the gap between an early clean estimate and the final latent, and sink and recent frames
    that are always kept. Adapted: frames are ranked by their mean gap, where the original compares tokens with a threshold; the
    early estimate is taken half-way through the ODE (step 2 of 4 in the original). The gap of a frame never changes, so the
    rule is a bounded priority queue.

    Source: DeCoPrune, decoprune.github.io (2026, arXiv id unknown). Tier: A (denoise_gap). Parameters ``n_sink``, ``n_recent``.
    """

    name = "decoprune"
    source = "DeCoPrune, decoprune.github.io"
    needs = {"A": ("denoise_gap",)}
    GRID = {"n_sink": (0, 1, 2), "n_recent": (1, 2, 4)}

    def __init__(self, n_sink: int = 1, n_recent: int = 1) -> None:
        sink, recent = count(self.name, "n_sink", n_sink), count(self.name, "n_recent", n_recent, 1)
        super().__init__(sink, recent, denoise_gap)


def denoise_gap(history: History, parts: Parts) -> list[float]:
    """The signal denoise_gap of the middle."""
    return [float(history.signals["denoise_gap"][i]) for i in parts.middle]
