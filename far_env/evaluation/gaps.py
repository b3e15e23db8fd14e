"""Quality against the gap: PSNR of predicted frames by how many frames ago their evidence was last in view."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from far_env.clips.copying import LEAST_DB, TOLERANCE_DB
from far_env.evaluation.aggregate import Episodes
from far_env.evaluation.statistics import Interval, mean_intervals

if TYPE_CHECKING:
    from far_env.evaluation.ranking import Row

EXACT = 4
"""Gaps up to here have a bin each; the bins beyond end at powers of two."""
NEW = "new"
"""The bin of frames that were not in view before."""
MEASURE = (
    f"the newest earlier true frame of the same scene, where the world knows it, else the newest whose copy is within "
    f"{TOLERANCE_DB:g} dB of the best one; new: no earlier frame, or none whose copy has {LEAST_DB:g} dB"
)
"""How gaps are measured, in words."""


def bin_of(gap: float) -> str:
    """The label of a gap's bin: "1" … "4", "5–8", "9–16", …; `NEW` for NaN."""
    if np.isnan(gap):
        return NEW
    if gap <= EXACT:
        return str(int(gap))
    last = 2 ** int(np.ceil(np.log2(gap)))
    return f"{last // 2 + 1}–{last}"


def bins(largest: int) -> list[str]:
    """The labels of all bins up to that of the largest gap, in order, `NEW` last."""
    return [*dict.fromkeys(bin_of(gap) for gap in range(1, largest + 1)), NEW]


def gap_bins(rows: Iterable[Row]) -> list[str]:
    """The bins that any of these rows has, in order."""
    present = {name for row in rows if not isinstance(row.by_gap, str) for name in row.by_gap}
    largest = max((int(name.rpartition("–")[2]) for name in present if name != NEW), default=0)
    return [name for name in bins(largest) if name in present]


def psnr_by_gap(episodes: Episodes) -> dict[str, Interval] | str:
    """Bin → PSNR of its frames with an interval over the clips that have some, or one sentence why there are none.

    A clip counts once in a bin, with the mean over its frames there and its noise seeds.
    """
    if not episodes.clips:
        return "no clip is finished with every noise seed"
    gaps = episodes.evidence_gaps()
    if gaps is None:
        return "the records have no gaps: their clips have no true frames, or they were written by an older version"
    values = episodes.psnr_per_frame()
    if not np.isfinite(values).all():
        return "the PSNR of a frame is not finite"
    labels = np.vectorize(bin_of, otypes=[object])(gaps)
    columns, names = [], []
    for name in bins(int(gaps[np.isfinite(gaps)].max(initial=1))):
        inside = labels == name
        counts = inside.sum(axis=1)
        if counts.any():
            sums = (values.mean(axis=1) * inside).sum(axis=1)
            columns.append(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
            names.append(name)
    return dict(zip(names, mean_intervals(np.stack(columns, axis=1)), strict=True))
