"""Rules of video world models that compare frames with the oldest or the newest one, by the cosine of their latents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from far_env.baselines.filling import FillingPolicy, History, share
from far_env.baselines.partition import PartitionPolicy, Parts

_ADMITTED = 2.0
"""Above any difference of two cosines, so that no repeated frame comes before one that is not."""


class StableWorld(FillingPolicy):
    """StableWorld: while a later frame still shows the scene of the oldest, the later one is dropped, else the oldest.

    Faithful: one comparison per eviction, of the oldest frame with the one at position min(13, 2 L / 3) of a window of L frames
    that includes the next one; the threshold. Adapted: the cosine of latents takes the place of the share of ORB matches that
    agree (RANSAC), so the threshold has another meaning; the newest frame is never dropped; several evictions in one call are
    made one after another.

    Source: StableWorld, arXiv 2601.15281 and its code. Tier: L (lat_cos). Parameter ``threshold``.
    """

    name = "stableworld"
    family = "anchor"
    source = "StableWorld, arXiv 2601.15281"
    tags = {"anchor_preservation_rule": "first_frames"}
    needs = {"L": ("lat_cos",)}
    GRID = {"threshold": (0.0, 0.2, 0.4, 0.6, 0.78, 0.9)}

    def __init__(self, threshold: float = 0.78) -> None:
        super().__init__()
        self.threshold = share(self.name, "threshold", threshold)

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        remaining = list(range(len(history)))
        while len(remaining) > history.max_frames:
            later = min(13, 2 * (len(remaining) + 1) // 3, len(remaining) - 2)
            same_scene = history.signals["lat_cos"][remaining[0], remaining[later]] > self.threshold
            del remaining[later if same_scene else 0]
        return [], remaining


class DySink(PartitionPolicy):
    """DySink: the newest frames, and the older frames that are most similar to them, without repetitions.

    Faithful: no fixed sinks; similarity averaged over the frames of the local window; a frame enters the memory only if it is
    not too similar to one that is there; places in equal shares (6 frames that are retrieved, 6 clean local ones). Adapted:
    frames instead of blocks of three; cosine of latents instead of features of a vision encoder; a dropped frame cannot be
    retrieved again, where the original has an unlimited memory off the budget; repeated frames fill places that nothing else
    can. The gate on the agreement of attention heads has no counterpart.

    Source: DySink, arXiv 2605.21028 and its code. Tier: L (lat_cos). Parameters ``f_recent``, a share of the budget;
    ``repeated``, the cosine from which a frame repeats an older one.
    """

    name = "dysink"
    source = "DySink, arXiv 2605.21028"
    tags = {"anchor_preservation_rule": "none", "long_term_budget_fraction": 0.0}
    needs = {"L": ("lat_cos",)}
    GRID = {"f_recent": (0.25, 0.5, 0.75), "repeated": (0.7, 0.8, 0.9, 0.95)}

    def __init__(self, f_recent: float = 0.5, repeated: float = 0.95) -> None:
        super().__init__(0, share(self.name, "f_recent", f_recent), self._similarity)
        self.repeated = share(self.name, "repeated", repeated)

    def _similarity(self, history: History, parts: Parts) -> list[float]:
        cosines = history.signals["lat_cos"].astype(np.float64)
        admitted: list[int] = []
        scores = []
        for row in parts.middle:
            repeats = any(cosines[row, other] >= self.repeated for other in admitted)
            admitted += [] if repeats else [row]
            scores.append(float(cosines[row, parts.recent].mean()) - (_ADMITTED if repeats else 0.0))
        return scores
