"""Anchor policies of the Self-Forcing family: sinks, a selected middle part, the newest frames. They share the split of the
budget at small budgets and differ in how the middle is selected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from far_env.baselines.filling import History, best, comparable, count, require, share
from far_env.baselines.partition import PartitionPolicy, Parts, drift_match, over_last, slots

EPS = 1e-12


def query_key(history: History, parts: Parts) -> Sequence[float]:
    """Products q·k with the queries of the newest frames, each from its first ODE step; without signals `drift_match`."""
    if not history.signals:
        return drift_match(history, parts)
    return over_last(history, "qk_first", len(parts.recent))[parts.middle]


def similarity_difference(products: np.ndarray, parts: Parts, lam: float) -> np.ndarray:
    """Product of the unit vector of each middle row with the unit mean of the sinks, minus ``lam`` times that of the tail.

    Args:
        products: of all pairs of unit vectors (rows, rows).
    """

    def to_mean(rows: list[int]) -> np.ndarray:
        length = np.sqrt(max(products[np.ix_(rows, rows)].mean(), EPS))
        return products[np.ix_(parts.middle, rows)].mean(axis=1) / length

    return to_mean(parts.sink) - lam * to_mean(parts.recent)


class PackForcing(PartitionPolicy):
    """PackForcing's sinks, selected middle and newest frames; the middle is selected by q·k/√d at the first ODE step.

    Faithful: the three parts, and the selection by the product of queries and keys, in time order. Adapted: single frames
    instead of blocks of 4; no compression of the middle, since a frame counts as one whatever its size; all tokens and heads
    instead of samples of them; a dropped frame cannot be recalled. The formula is that of an unofficial implementation. The
    queries of recent frames are those of their first ODE step, as far as the policy was called then. Approximation without
    signals: drift_match.

    Source: PackForcing, arXiv 2603.25730. Tier: A (qk_first) or M. Parameters ``f_sink``, ``f_recent``, shares of the budget;
    ``tier``.
    """

    name = "packforcing"
    source = "PackForcing, arXiv 2603.25730"
    needs = {"A": ("qk_first",), "M": ()}
    GRID = {"f_sink": (0.25, 0.5, 0.75), "f_recent": (0.25, 0.5)}

    def __init__(self, f_sink: float = 0.5, f_recent: float = 0.25, tier: str = "A") -> None:
        sink, recent = share(self.name, "f_sink", f_sink, some=True), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, query_key, tier)


class DeepForcing(PartitionPolicy):
    """Deep Forcing's deep sink (10 of 16 places), newest frames, and the middle frames that recent queries attend to most.

    Faithful: the split 10/2/4, raw products q·k summed over recent queries and heads at the first ODE step, and the limit on
    how often one frame may be selected. Adapted: frames instead of tokens, and one choice for all layers; queries as in
    PackForcing. Approximation without signals: drift_match.

    Source: Deep Forcing, arXiv 2512.05081 and re-hosted code. Tier: A (qk_first) or M. Parameters ``f_sink``, ``f_recent``,
    shares of the budget; ``max_reuse``, how often a frame may be selected for the middle; ``clean_recent`` counts only one
    recent frame, as in the original, where the others are still being generated (sinks 10/13, recent 1); ``tier``.
    """

    name = "deep_forcing"
    source = "Deep Forcing, arXiv 2512.05081"
    needs = {"A": ("qk_first",), "M": ()}
    GRID = {"f_sink": (0.25, 0.5, 0.625), "f_recent": (0.25, 0.5), "max_reuse": (3, 7, 1000)}

    def __init__(
        self,
        f_sink: float = 10 / 16,
        f_recent: float = 4 / 16,
        max_reuse: int = 7,
        clean_recent: bool = False,
        tier: str = "A",
    ) -> None:
        sink, recent = share(self.name, "f_sink", f_sink, some=True), share(self.name, "f_recent", f_recent)
        split = (10 / 13, 1) if clean_recent else (sink, recent)
        super().__init__(*split, query_key, tier)
        self.max_reuse = count(self.name, "max_reuse", max_reuse, 1)

    def _choose_middle(self, history: History, parts: Parts) -> list[int]:
        wins = history.notes.get("wins", {})
        scores = [
            score if wins.get(history.births[row], 0) < self.max_reuse else float("-inf")
            for row, score in zip(parts.middle, self.mid_score(history, parts), strict=True)
        ]
        chosen = best(parts.middle, scores, parts.places)
        history.notes["wins"] = wins | {history.births[row]: wins.get(history.births[row], 0) + 1 for row in chosen}
        return chosen


class RelaxForcing(PartitionPolicy):
    """Relax Forcing: keeps the middle frames that are similar to the sinks and dissimilar to the newest frames (the tail).

    Faithful: whole frames, selected once per generated unit; few sinks, one middle part, a short tail; candidates from the
    newer half of the middle, thinned evenly; the score ⟨k, k_sink⟩ − λ⟨k, k_tail⟩ of layer-0 key prototypes. Adapted: the
    middle holds the frames that are still kept, since a dropped frame cannot be recalled; shares of the budget instead of
    2 + 1 + 1 frames. Tier L uses latents instead of key prototypes.

    Source: Relax Forcing, arXiv 2603.21366 and its code. Tier: A (key_proto) or L (lat_cos). Parameters ``f_sink``,
    ``f_recent``, shares of the budget; ``lam``; ``n_cand``, candidates per middle place; ``mode``, "share", or "fixed" for 2
    sinks, 1 middle row and a tail of all the rest; ``tier``.
    """

    name = "relax_forcing"
    source = "Relax Forcing, arXiv 2603.21366"
    needs = {"A": ("key_proto",), "L": ("lat_cos",)}
    GRID = {"lam": (0.5, 1.0, 2.0, 4.0), "f_sink": (0.25, 0.5), "f_recent": (0.25, 0.5)}

    def __init__(
        self,
        f_sink: float = 0.5,
        f_recent: float = 0.25,
        lam: float = 2.0,
        n_cand: int = 4,
        mode: Literal["share", "fixed"] = "share",
        tier: str = "A",
    ) -> None:
        sink, recent = share(self.name, "f_sink", f_sink, some=True), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, self._similarity_difference, tier)
        require(mode in ("share", "fixed"), self.name, "mode", mode, "'share' or 'fixed'")
        self.lam, self.n_cand, self.mode = float(lam), count(self.name, "n_cand", n_cand, 1), mode

    def _slots(self, max_frames: int) -> tuple[int, int, int]:
        if self.mode == "fixed":
            return slots(max_frames, 2, max_frames - 3)
        return super()._slots(max_frames)

    def _choose_middle(self, history: History, parts: Parts) -> list[int]:
        births = history.births
        midpoint = (births[parts.sink[-1]] + births[parts.recent[0]]) / 2
        eligible = [row for row in parts.middle if births[row] >= midpoint]
        others = [row for row in parts.middle if births[row] < midpoint]
        max_candidates = self.n_cand * parts.places
        if len(eligible) > max_candidates:
            # As in the original: evenly spaced from the oldest, without the newest.
            eligible = [eligible[k * (len(eligible) - 1) // max_candidates] for k in range(max_candidates)]
        scores = dict(zip(parts.middle, self.mid_score(history, parts), strict=True))
        chosen = best(eligible, [scores[row] for row in eligible], parts.places)
        filling = best(others, [scores[row] for row in others], parts.places - len(chosen))
        return sorted([*chosen, *filling])

    def _similarity_difference(self, history: History, parts: Parts) -> Sequence[float]:
        if self.tier == "A":
            vectors = history.signals["key_proto"].astype(np.float64)
            products = vectors @ vectors.T
        else:
            products = history.signals["lat_cos"].astype(np.float64)
        return similarity_difference(products, parts, self.lam)


class FutureForcing(PartitionPolicy):
    """Our reconstruction of Future Forcing: the score of a frame is the attention expected from future queries; of two frames
    that future queries would hardly distinguish, the one with the lower score is dropped first.

    Faithful to the abstract alone: running statistics of queries before rotation as a proxy of future queries, importance under
    this proxy, redundant pairs in the subspace that it induces. Ours: every equation (importance is Expected Attention, arXiv
    2510.00636), the split, the threshold, the eight eigenvectors; frames are dropped instead of merged. The moments are taken
    over all generated frames. The proxy has the position of the newest frame, which is the position of the next frame at all
    calls but the first of a clip.

    Source: Future Forcing, arXiv 2605.30083 (abstract). Tier: A (expected_mass, expected_cos). Parameters ``f_sink``,
    ``f_recent``, shares of the budget; ``tau``, the cosine from which a pair is redundant.
    """

    name = "future_forcing"
    source = "Future Forcing, arXiv 2605.30083, our reconstruction"
    remark = "reconstruction"
    needs = {"A": ("expected_mass", "expected_cos")}
    GRID = {"f_sink": (0.125, 0.5), "f_recent": (0.25, 0.5), "tau": (0.8, 0.9, 0.97)}

    def __init__(self, f_sink: float = 0.125, f_recent: float = 0.25, tau: float = 0.9) -> None:
        sink, recent = share(self.name, "f_sink", f_sink), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, self._expected_mass)
        self.tau = float(tau)

    def _choose_middle(self, history: History, parts: Parts) -> list[int]:
        scores = dict(zip(parts.middle, comparable(self.mid_score(history, parts)), strict=True))
        cosines = history.signals["expected_cos"]
        remaining = list(parts.middle)
        while len(remaining) > parts.places:
            pairs = [(float(cosines[a, b]), a, b) for place, b in enumerate(remaining) for a in remaining[:place]]
            closest, *pair = max(pairs, default=(-1.0,))
            if closest < self.tau:
                break
            remaining.remove(min(pair, key=lambda row: (scores[row], row)))
        return best(remaining, [scores[row] for row in remaining], parts.places)

    @staticmethod
    def _expected_mass(history: History, parts: Parts) -> Sequence[float]:
        return history.signals["expected_mass"][parts.middle]
