"""A partition whose split and middle are parameters: what the published partitions have in common, to be tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_env.baselines.anchor import denoise_gap, remaining_life
from far_env.baselines.controls import context_similarity
from far_env.baselines.filling import History, count, require, share
from far_env.baselines.forcing import query_key, similarity_difference
from far_env.baselines.partition import MidScore, PartitionPolicy, Parts, evenly_spaced, slots

NONE, UNIFORM = "none", "uniform"
RELAXED_LAMBDA = 2.0


@dataclass(frozen=True)
class Middle:
    """How the middle of a partition is chosen.

    Attributes:
        tier, signals: what it reads.
        score: of its rows; None where ``choose`` chooses them, or nothing does.
        choose: the rows that stay.
        needs_sink: whether it compares with a sink.
    """

    tier: str
    signals: tuple[str, ...]
    score: MidScore | None = None
    choose: Callable[[History, Parts], list[int]] | None = None
    needs_sink: bool = False


def _life(history: History, parts: Parts) -> list[int]:
    newest = history.births[parts.recent[0]]
    return [remaining_life(history.births[i], newest - history.births[i]) for i in parts.middle]


def _relaxed(history: History, parts: Parts) -> np.ndarray:
    return similarity_difference(history.signals["lat_cos"].astype(np.float64), parts, RELAXED_LAMBDA)


MIDDLES: dict[str, Middle] = {
    NONE: Middle("M", ()),
    "ruler": Middle("M", (), _life),
    UNIFORM: Middle("M", (), choose=evenly_spaced, needs_sink=True),
    "context_match": Middle("L", ("lat_cos",), context_similarity),
    "relaxed": Middle("L", ("lat_cos",), _relaxed, needs_sink=True),
    "qk_first": Middle("A", ("qk_first",), query_key),
    "denoise_gap": Middle("A", ("denoise_gap",), denoise_gap),
}


class Partition(PartitionPolicy):
    """A partition to be tuned: sinks, a middle chosen by one of the published scores, the newest frames.

    With ``far-env tune`` this is the strongest fixed partition for a workload and a budget: the published partitions differ in
    the split and in the score of the middle, both of which are parameters here. Scores: "none" (the newest frames instead),
    "ruler" (packcache_paper), "uniform", "context_match", "relaxed" (relax_forcing on latents), "qk_first" (packforcing) and
    "denoise_gap" (decoprune).

    Source: control. Tier: M, L or A, that of the score. Parameters ``n_sink``; ``f_recent``, a share of the budget; ``mid``,
    the score. "uniform" and "relaxed" need a sink.
    """

    name = "partition"
    source = "control"
    needs = {"M": (), "L": ("lat_cos",), "A": ("qk_first", "denoise_gap")}
    GRID = {"mid": tuple(MIDDLES), "n_sink": (0, 1, 2, 4), "f_recent": (0.25, 0.5, 0.75)}

    def __init__(self, n_sink: int = 1, f_recent: float = 0.25, mid: str = UNIFORM) -> None:
        require(mid in MIDDLES, self.name, "mid", mid, f"one of {', '.join(MIDDLES)}")
        self.mid = mid
        middle = MIDDLES[mid]
        self.needs = {middle.tier: middle.signals}
        n_sink, f_recent = count(self.name, "n_sink", n_sink), share(self.name, "f_recent", f_recent)
        if middle.needs_sink and not n_sink:
            raise ValueError(f"baseline {self.name}: mid {mid} compares with a sink, so n_sink must be at least 1")
        super().__init__(n_sink, f_recent, middle.score)

    @classmethod
    def grid(cls, max_frames: int) -> Iterator[dict[str, Any]]:
        """As of every policy, but each split once: under small budgets many shares are the same number of frames."""
        seen = set()
        for parameters in super().grid(max_frames):
            if MIDDLES[parameters["mid"]].needs_sink and not parameters["n_sink"]:
                continue
            split = slots(max_frames, parameters["n_sink"], parameters["f_recent"])
            decides = (NONE, split[0]) if parameters["mid"] == NONE or not split[1] else (parameters["mid"], *split)
            if decides not in seen:
                seen.add(decides)
                yield parameters

    def _slots(self, max_frames: int) -> tuple[int, int, int]:
        num_sink, places, num_recent = slots(max_frames, self.sink, self.recent)
        return (num_sink, 0, num_recent + places) if self.mid == NONE else (num_sink, places, num_recent)

    def _choose_middle(self, history: History, parts: Parts) -> Sequence[int]:
        if MIDDLES[self.mid].choose is not None:
            return MIDDLES[self.mid].choose(history, parts)
        return super()._choose_middle(history, parts)
