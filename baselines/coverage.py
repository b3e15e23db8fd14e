"""Peers from the comparison in Keepsake: frames stay that the other kept frames do not show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from far_env.baselines.filling import FillingPolicy, History, best, require
from far_env.baselines.redundancy import SequentialEviction

_COMPARISON = "comparison in Keepsake, arXiv 2610.06588"


class KCenter(FillingPolicy):
    """Greedy k-centre: keeps the newest frame, then again and again the frame that is farthest from those kept.

    Faithful: the farthest-point rule (Gonzalez 1985) on latents. Adapted: chosen again at every call among the frames that are
    still there; the distance is 1 − cosine of whole latents. Of equally far frames the newer is kept.

    Source: comparison in Keepsake, arXiv 2610.06588. Tier: L (lat_cos). No parameters.
    """

    name = "k_center"
    family = "redundancy"
    source = _COMPARISON
    tags = {"retention_family": "anchor"}
    needs = {"L": ("lat_cos",)}

    def __init__(self) -> None:
        super().__init__()

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        distances = 1.0 - history.signals["lat_cos"].astype(np.float64)
        kept = [len(history) - 1]
        while len(kept) < history.max_frames:
            others = [row for row in range(len(history)) if row not in kept]
            kept += best(others, distances[np.ix_(others, kept)].min(axis=1), 1)
        return [], sorted(kept)


class LatentRI(SequentialEviction):
    """Redundancy index of latents: drops the frame whose similarities to the other kept frames have the largest sum.

    Faithful: the index and one eviction after another. Adapted: similarity is the cosine of whole latents; the newest frame is
    never dropped.

    Source: comparison in Keepsake, arXiv 2610.06588. Tier: L (lat_cos). No parameters.
    """

    name = "latent_ri"
    source = _COMPARISON
    needs = {"L": ("lat_cos",)}

    def _novelty(self, history: History, row: int, others: list[int]) -> float:
        return -float(history.signals["lat_cos"][row, others].astype(np.float64).sum())


class Keepsake(SequentialEviction):
    """Our form of Keepsake's appearance half: drops the frame that two other kept frames together show best.

    Faithful to the idea of a redundancy graph of covisibility, from which the frame goes that two others cover, never the
    newest. Ours: everything else, since no code was found. The original also uses camera poses, which are not known here. A
    column of a frame's latent is covisible in another frame by exp(−g/s), with the gap g to the most similar column there and
    s = ``tau`` times the mean gap of all pairs of frames; a pair covers a frame by the mean over its columns of the larger of
    both.

    Source: Keepsake, arXiv 2610.06588, our adaptation of its appearance half. Tier: L (column_gap). Parameter ``tau``.
    """

    name = "keepsake"
    source = "Keepsake, arXiv 2610.06588, our adaptation of its appearance half"
    remark = "appearance half"
    needs = {"L": ("column_gap",)}
    GRID = {"tau": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)}

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        require(isinstance(tau, int | float) and tau > 0, self.name, "tau", tau, "a number above 0")
        self.tau = float(tau)

    def _novelty(self, history: History, row: int, others: list[int]) -> float:
        gaps = history.signals["column_gap"].astype(np.float64)
        num_rows = len(gaps)
        scale = self.tau * gaps.sum(axis=(0, 1)).mean() / max(1, num_rows * (num_rows - 1))  # a frame's gap to itself is 0
        covisible = np.exp(-gaps[row, others] / max(scale, np.finfo(float).tiny))
        return -float(np.maximum(covisible[:, None], covisible[None]).mean(axis=2).max())
