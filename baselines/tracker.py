"""Policies that infer what the camera does from all calls for a clip, and decide by that.

They use the same information as a learned policy with memory: the changes between frames that were once neighbours, dropped
ones included. Their models of the camera and its constants were fitted to the worlds pan, cuts and orbit, see
`far_env.baselines.tracking`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from math import copysign, log1p
from typing import ClassVar

from far_env.baselines.filling import FillingPolicy, History
from far_env.baselines.tracking import PathTracking, ShotTracking
from far_env.births import FrameBirths
from far_env.errors import unknown_name


class _Tracker(FillingPolicy):
    """Follows the camera from call to call."""

    family = "tracker"
    source = "this project"
    tags = {"retention_family": "anchor"}

    tracking_class: ClassVar[type[FrameBirths]]
    """What follows the camera."""

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        tracking = copy.deepcopy(history.notes.get("tracking")) or self.tracking_class()
        num_known = len(tracking.births)
        if tracking.observe(len(history), history.step):
            num_known = 0
        # As a policy sees them: motion without an upper limit is squashed to x / (1 + x).
        rows = [
            (
                meta.boundary_score,
                meta.feature_drift,
                meta.temporal_similarity,
                meta.motion_strength / (1 + meta.motion_strength),
            )
            for meta in history.rows
        ]
        self._follow(tracking, rows, len(history) - num_known)
        kept = self._chosen(tracking, len(history), history.max_frames)
        tracking.keep(kept)
        history.notes["tracking"] = tracking
        return [], kept

    @abstractmethod
    def _follow(self, tracking: FrameBirths, rows: list[tuple], num_new: int) -> None:
        """Take in the present features of all frames, of which the last ``num_new`` are new."""

    @abstractmethod
    def _chosen(self, tracking: FrameBirths, num_rows: int, max_frames: int) -> list[int]:
        """The rows that stay, in order."""


class SceneTracker(_Tracker):
    """Keeps the newest frame of each inferred shot, of the shots seen last if they are too many.

    Shots are told apart, and recognised when they return, by the changes at cuts. Source: this project. Tier: M. The parameter
    ``fill`` says what takes the rest of the budget: "newest", the newest other frames, or "shots", the second newest frame of
    each shot, then the third newest, and so on.
    """

    name = "scene_tracker"
    tracking_class = ShotTracking
    GRID = {"fill": ("newest", "shots")}

    def __init__(self, fill: str = "newest") -> None:
        super().__init__()
        if fill not in ("newest", "shots"):
            raise ValueError(f"scene_tracker: {unknown_name('fill', fill, ['newest', 'shots'])}")
        self.fill = fill

    def _follow(self, tracking: ShotTracking, rows: list[tuple], num_new: int) -> None:
        tracking.find_places(rows, num_new)

    def _chosen(self, tracking: ShotTracking, num_rows: int, max_frames: int) -> list[int]:
        rank: dict[int, int] = {}
        order = []
        for row in reversed(range(num_rows)):
            rank[row] = sum(tracking.places[other] == tracking.places[row] for other in range(row + 1, num_rows))
            order.append((min(rank[row], 1) if self.fill == "newest" else rank[row], -row))
        return sorted(-row for _, row in sorted(order)[:max_frames])


class PathTracker(_Tracker):
    """Keeps what lies evenly along the inferred path of the camera, which may be a ring: the newest frame, and others that are
    far from each other.

    Frames are dropped one by one: one of the two that are closest along the path. Source: this project. Tier: M. With ``near``
    above 0, distances count less the farther they are from the newest frame, as log(1 + near · distance) grows. ``drop`` says
    which of the two is dropped, "older" or "newer"; the newest frame always stays.
    """

    name = "path_tracker"
    tracking_class = PathTracking
    GRID = {"near": (0.0, 0.3, 1.0, 3.0), "drop": ("newer", "older")}

    def __init__(self, near: float = 1.0, drop: str = "newer") -> None:
        super().__init__()
        if not near >= 0:
            raise ValueError(f"path_tracker: near must be at least 0, got {near}")
        if drop not in ("older", "newer"):
            raise ValueError(f"path_tracker: {unknown_name('drop', drop, ['older', 'newer'])}")
        self.near, self.drop = near, drop

    def _follow(self, tracking: PathTracking, rows: list[tuple], num_new: int) -> None:
        for row, birth in list(zip(rows, tracking.births, strict=True))[len(rows) - num_new :]:
            if birth > 0:
                tracking.follow(row[2:])

    def _chosen(self, tracking: PathTracking, num_rows: int, max_frames: int) -> list[int]:
        ahead, ring = tracking.along_path()
        places = [copysign(log1p(self.near * abs(a)), a) / self.near if self.near else float(a) for a in ahead]

        def distance(one: int, other: int) -> float:
            direct = abs(places[one] - places[other])
            # Around a ring, the other way may be shorter; near the newest frame it never is.
            return min(direct, ring - direct) if ring and not self.near else direct

        kept = list(range(num_rows))
        while len(kept) > max_frames:
            pairs = [(one, other) for place, one in enumerate(kept) for other in kept[place + 1 :]]
            # Of equally close pairs first one without the newest frame, which must stay.
            older, newer = min(pairs, key=lambda pair: (distance(*pair), pair[1] == num_rows - 1, pair))
            kept.remove(newer if self.drop == "newer" and newer != num_rows - 1 else older)
        return kept
