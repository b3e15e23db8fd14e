"""Chunkwise policies: a weighted difference of importance and redundancy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from far_env.baselines.filling import FillingPolicy, History, best, count, share


class FlowCachePaper(FillingPolicy):
    """FlowCache's compression: keeps the frames with the highest score λ·a − (1 − λ)·r of attention a and redundancy r, both
    normalised over the candidates.

    Faithful: the score, λ, a max-pooled over neighbours, r as a softmax of mean key cosines. Adapted: whole frames (an option
    of its code), attention pooled over three kept frames; the newest ``protect`` frames take the role of the chunk that is
    being generated and are no candidates. The original's chunkwise reuse of computation saves time and has no counterpart here;
    the original has no boundary rule. Approximation without signals: softmax of recentness for a, and of temporal_similarity
    for r. With the default λ redundancy decides almost alone; 0.3 and 0.5 are worth trying too.

    Source: FlowCache, arXiv 2602.10825 and its code. Tier: A (attn_mass, key_cos) or M. Parameters ``lam``; ``protect``;
    ``iterative``, which computes the scores again after each eviction instead of once per call; ``tier``.
    """

    name = "flowcache_paper"
    family = "chunkwise"
    source = "FlowCache, arXiv 2602.10825"
    tags = {"chunkwise_reuse": True, "compression_mode": "token_drop"}
    needs = {"A": ("attn_mass", "key_cos"), "M": ()}
    GRID = {"lam": (0.07, 0.3, 0.5, 0.7), "protect": (1, 2), "iterative": (False, True)}

    def __init__(self, lam: float = 0.07, protect: int = 1, iterative: bool = False, tier: str = "A") -> None:
        super().__init__(tier)
        self.lam, self.protect = share(self.name, "lam", lam), count(self.name, "protect", protect, 1)
        self.iterative = iterative

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        rows = list(range(len(history)))
        protect = min(self.protect, history.max_frames)
        candidates, protected = rows[:-protect], rows[-protect:]
        places = history.max_frames - protect
        while len(candidates) > places:
            num_kept = len(candidates) - 1 if self.iterative else places
            candidates = best(candidates, self._scores(history, candidates), num_kept)
        return [], [*candidates, *protected]

    def _scores(self, history: History, candidates: list[int]) -> np.ndarray:
        if history.signals:
            mass = history.signals["attn_mass"][candidates].astype(np.float64)
            importance = np.array([mass[max(0, i - 1) : i + 2].max() for i in range(len(mass))])
            cosines = history.signals["key_cos"][np.ix_(candidates, candidates)].astype(np.float64)
            others = max(1, len(candidates) - 1)
            redundancy = _softmax((cosines.sum(axis=1) - cosines.diagonal()) / others)
        else:
            importance = _softmax(np.array([history.rows[i].recentness for i in candidates]))
            redundancy = _softmax(np.array([history.rows[i].temporal_similarity for i in candidates]))
        return self.lam * importance / importance.sum() - (1 - self.lam) * redundancy


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max())
    return powers / powers.sum()
