"""What a camera shows and where it goes, inferred from the changes between the frames of a policy's calls.

Two hand-written models: shots that a video cuts between (or places that a camera returns to at once), and a path that a camera
goes back and forth on, possibly a ring. Their constants were fitted to the worlds pan, cuts and orbit. Standard library only:
exported policy files may carry the source of these classes.
"""

from __future__ import annotations

from far_env.births import FrameBirths


class ShotTracking(FrameBirths):
    """Which of the kept frames show the same place (or shot).

    Attributes:
        places: the number of each kept frame's place.
        between: two places → mean and count of the changes from one to the other.
    """

    SAME_PLACE_SIMILARITY = 0.4
    """Neighbours above this temporal_similarity show the same place. A frame whose feature_drift is below 1 shows the place of
    the oldest frame."""
    PLACE_CHANGE_SPREAD = (0.04, 0.012)
    """Typical difference of temporal_similarity and squashed motion between two changes from one place to another."""
    UNKNOWN_DISTANCE, MAX_PLACE_DISTANCE = 3.0, 25.0
    """Squared distances in units of `PLACE_CHANGE_SPREAD`: of two places that were never neighbours, and from which on a place
    is new."""

    def __init__(self) -> None:
        super().__init__()
        self.begin_places()

    def observe(self, num_frames: int, step: int) -> bool:
        """Number the frames of a call, and forget the clip before where the call begins another."""
        begins = super().observe(num_frames, step)
        if begins:
            self.begin_places()
        return begins

    def keep(self, ids: list) -> None:
        """Record the rows of the last call that stay, and their places where they were found."""
        super().keep(ids)
        if self.places:
            self.places = [self.places[i] for i in ids]

    def begin_places(self) -> None:
        """Forget the clip before."""
        self.places: list[int] = []
        self.num_places = 0
        self.between: dict[tuple, tuple] = {}

    def find_places(self, rows: list, num_new: int) -> None:
        """Assign places to new frames, and correct those of older frames by comparison with their present neighbours."""
        for i, (_, drift, similarity, motion) in enumerate(rows):
            if i >= len(rows) - num_new:
                self.places.append(self.place_of(i, drift, (similarity, motion)))
            elif i > 0:
                current, before = self.places[i], self.places[i - 1]
                not_new = self.places[0] if drift < 1 else None
                same = before if similarity > self.SAME_PLACE_SIMILARITY else not_new
                if same not in (None, current):
                    self.places = [same if place == current else place for place in self.places]
                    merged = {
                        pair: tuple(sorted(same if place == current else place for place in pair)) for pair in self.between
                    }
                    self.between = {merged[pair]: change for pair, change in self.between.items()}
                elif same is None and current == before:
                    self.places[i] = self.new_place()
            if i > 0 and similarity <= self.SAME_PLACE_SIMILARITY:
                pair = tuple(sorted(self.places[i - 1 : i + 1]))
                mean, count = self.between.get(pair, ((0.0, 0.0), 0))
                change = zip(mean, (similarity, motion), strict=False)
                self.between[pair] = (tuple(old + (new - old) / (count + 1) for old, new in change), count + 1)

    def place_of(self, i: int, drift: float, change: tuple) -> int:
        """The place of the new frame i: its neighbour's, the oldest's, one that such a change led to before, or a new one."""
        if i == 0:
            return self.new_place()
        before, oldest = self.places[i - 1], self.places[0]
        if change[0] > self.SAME_PLACE_SIMILARITY:
            return before
        if drift < 1:
            return oldest
        others = {} if self.births[i] < self.num_context else dict.fromkeys(self.places)
        distances = {}
        for place in others:
            distances[place] = self.UNKNOWN_DISTANCE
            if (known := self.between.get((min(before, place), max(before, place)))) is not None:
                parts = zip(change, known[0], self.PLACE_CHANGE_SPREAD, strict=False)
                distances[place] = sum(((value - mean) / spread) ** 2 for value, mean, spread in parts)
        likely = [place for place in others if place not in (before, oldest) and distances[place] < self.MAX_PLACE_DISTANCE]
        return min(likely, key=distances.get) if likely else self.new_place()

    def new_place(self) -> int:
        """A number that no place of this clip has."""
        self.num_places += 1
        return self.num_places


class PathTracking(FrameBirths):
    """Where each kept frame is on the camera's path.

    Attributes:
        paths: the hypotheses, the most likely one first, see `follow`.
    """

    STATIONARY_SIMILARITY = 0.6
    """Above this temporal_similarity the camera has not moved."""
    PATH_CHANGE_SPREAD = (0.004, 0.0012)
    """Typical difference of temporal_similarity and squashed motion when the same stretch of the path is passed again."""
    FORWARD_COST, TURN_COST, NEW_STRETCH_COST = 0.2, 1.5, 8.0
    RING_COST, MAX_RING_MISFIT = 3.0, 6.0
    """Negative log-likelihoods of hypotheses: the camera kept its direction, turned, passed a stretch for the first time, the
    path is a ring; and the misfit from which on two ends of the path are not the same stretch of a ring."""
    SHORTEST_RING = 6
    NUM_PATHS = 12
    """Hypotheses that are followed."""

    def __init__(self) -> None:
        super().__init__()
        self.begin_path()

    def observe(self, num_frames: int, step: int) -> bool:
        """Number the frames of a call, and forget the clip before where the call begins another."""
        begins = super().observe(num_frames, step)
        if begins:
            self.begin_path()
        return begins

    def begin_path(self) -> None:
        """Forget the clip before."""
        self.paths: list[tuple] = [(0.0, (0,), 1, {}, 0)]

    def follow(self, change: tuple) -> None:
        """Extend the most likely paths by a frame: the camera did not move, kept its direction, or turned.

        A path is a tuple of its negative log-likelihood, the number of the point that each frame so far shows, the direction
        (1 or
        -1), a dict from n to the mean change on the stretch from point n to n + 1 with its count, and the number of points if
        the path is a ring, else 0.
        """
        longer = []
        for cost, points, heading, stretches, ring in self.paths:
            here = points[-1]
            if change[0] > self.STATIONARY_SIMILARITY:
                longer.append((cost, (*points, here), heading, stretches, ring))
                continue
            for direction in (heading, -heading) if stretches else (heading,):
                stretch = here if direction > 0 else here - 1
                there = here + direction
                if ring:
                    stretch, there = stretch % ring, there % ring
                moved = cost + (self.FORWARD_COST if direction == heading else self.TURN_COST)
                known = stretches.get(stretch)
                misfit = self.NEW_STRETCH_COST if known is None else self.misfit(change, known)
                passed = {**stretches, stretch: self.averaged(known, (change, 1))}
                longer.append((moved + misfit, (*points, there), direction, passed, ring))
                if known is None and not ring:
                    longer += self.closed(moved, (*points, there), direction, passed, stretch)
        self.paths = sorted(longer, key=lambda path: path[0])[: self.NUM_PATHS]

    def closed(self, cost: float, points: tuple, heading: int, stretches: dict, newest: int) -> list:
        """The path as a ring, in a list, if its newest stretch may be the one at its other end; else an empty list."""
        other = min(stretches) if newest == max(stretches) else max(stretches)
        ring = abs(newest - other)
        misfit = self.misfit(stretches[newest][0], stretches[other])
        if ring < self.SHORTEST_RING or misfit > self.MAX_RING_MISFIT:
            return []
        both = self.averaged(stretches[other], stretches[newest])
        closed = {number % ring: known for number, known in stretches.items()} | {newest % ring: both}
        return [(cost + misfit + self.RING_COST, tuple(point % ring for point in points), heading, closed, ring)]

    def misfit(self, change: tuple, known: tuple) -> float:
        """Negative log-likelihood of a change on a stretch with this mean change and count, up to a constant."""
        mean, count = known
        parts = zip(change, mean, self.PATH_CHANGE_SPREAD, strict=False)
        return sum(((value - expected) / spread) ** 2 for value, expected, spread in parts) * count / (count + 1) / 2

    def averaged(self, *counted: tuple) -> tuple:
        """The mean of (mean, count) pairs weighted by their counts, and the sum of the counts; None is ignored."""
        known = [pair for pair in counted if pair is not None]
        total = sum(count for _, count in known)
        return tuple(sum(mean[part] * count for mean, count in known) / total for part in range(2)), total

    def along_path(self) -> tuple:
        """How many stretches each kept frame is ahead of the newest (negative: behind), and the points of the ring or 0."""
        _, points, heading, _, ring = self.paths[0]
        ahead = [heading * (points[birth] - points[-1]) for birth in self.births]
        return [(a + ring // 2) % ring - ring // 2 if ring else a for a in ahead], ring
