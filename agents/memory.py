"""A policy's memory of its calls for one clip: when each kept frame was generated, and its and its neighbours' features then.

The benchmark gives ages as positions in the kept history, and compares a frame with the frames that are kept at the moment. One
policy object serves a whole clip, so it can remember its observations and decisions. Training, evaluation and the exported file
use the same class; the exported file contains its source, so it needs nothing but the standard library.
"""

from __future__ import annotations

from far_env.births import FrameBirths


class HistoryMemory(FrameBirths):
    """Follows the frames of one history from call to call; see `FrameBirths` for how they are numbered.

    Args:
        surroundings: also recall how frames changed around each kept one, dropped frames included.
        places: also recall which kept frames show the same place (or shot), as inferred from the changes.
        path: also recall how far each kept frame is from the newest along the camera's path, as inferred from the changes.
    """

    WIDTH = 7
    SURROUNDING_OFFSETS = (-1, 0, 1, 2)
    """The changes from the frame two before to the one before, from that to the frame, to the next, and to the one after it."""

    SAME_PLACE_SIMILARITY = 0.4
    """Neighbours above this temporal_similarity show the same place. A frame whose feature_drift is below 1 shows the place of
    the oldest frame."""
    PLACE_CHANGE_SPREAD = (0.04, 0.012)
    """Typical difference of temporal_similarity and squashed motion between two changes from one place to another."""
    UNKNOWN_DISTANCE, MAX_PLACE_DISTANCE = 3.0, 25.0
    """Squared distances in units of `PLACE_CHANGE_SPREAD`: of two places that were never neighbours, and from which on a place
    is new."""

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
    PATH_WIDTH = 3

    def __init__(self, surroundings: bool = False, places: bool = False, path: bool = False) -> None:
        super().__init__()
        self.surroundings, self.with_places, self.with_path = surroundings, places, path
        self.first_features: list[tuple] = []
        self.changes: dict[int, tuple] = {}
        self.places: list[int] = []
        self.num_places = 0
        self.between: dict[tuple, tuple] = {}
        self.paths: list[tuple] = []

    def recall(self, rows: list, step: int) -> list:
        """Columns for each kept frame; to be called once per decision, and followed by `keep`.

        Args:
            rows: the present features of each frame, oldest first: boundary_score, feature_drift, temporal_similarity and
                squashed motion.
            step: the benchmark's step; the newest frame was generated in it.

        Returns:
            Per frame: log(1 + age in frames) / 4, whether it was generated, log(1 + gap to the frame kept before it) / 3,
            and its four features at its first call. With surroundings then, for each of `SURROUNDING_OFFSETS`,
            temporal_similarity and squashed motion of that change and 1, or zeros where it is not known. With places then the
            number of the frame's place among those of kept frames, 1, 2, …, divided by 16. With path then how many stretches of
            the camera's path the frame is ahead of the newest (negative: behind) divided by 8, the length of the path divided
            by 16 if it is a ring, else zero, and 1.
        """
        # Here, because an exported file contains the lines of the class and nothing else.
        from math import log1p

        num_frames = len(rows)
        rows = [tuple(float(value) for value in row) for row in rows]
        if self.observe(num_frames, step):
            self.first_features, self.changes = [], {}
            self.places, self.num_places, self.between = [], 0, {}
            self.paths = [(0.0, (0,), 1, {}, 0)]
        num_new = num_frames - len(self.first_features)
        newest = self.births[-1]
        new_births, new_rows = self.births[num_frames - num_new :], rows[num_frames - num_new :]
        self.first_features += new_rows
        if self.surroundings:
            # The frame before a new one is always kept, but the first frame has none.
            self.changes.update({birth: row[2:] for birth, row in zip(new_births, new_rows, strict=False) if birth > 0})
        inferred: list = [()] * num_frames
        if self.with_places:
            self.find_places(rows, num_new)
            numbers = {place: number for number, place in enumerate(dict.fromkeys(self.places), start=1)}
            inferred = [(numbers[place] / 16,) for place in self.places]
        if self.with_path:
            for birth in new_births:
                if birth > 0:
                    self.follow(self.changes[birth])
            inferred = [(*place, *position) for place, position in zip(inferred, self.along_path(), strict=False)]
        return [
            (
                log1p(newest - birth) / 4,
                float(birth >= self.num_context),
                gap,
                *first,
                *self.surrounding_changes(birth),
                *further,
            )
            for birth, gap, first, further in zip(
                self.births, self.gaps(range(num_frames)), self.first_features, inferred, strict=False
            )
        ]

    def gaps(self, left: list) -> list:
        """log(1 + gap to the row before it) / 3 of these rows of the last call, as if all others were dropped."""
        from math import log1p

        births = [self.births[i] for i in left]
        return [log1p(birth - before) / 3 for birth, before in zip(births, [births[0], *births], strict=False)]

    def surrounding_changes(self, birth: int) -> list:
        """The columns of surroundings of a frame; none without surroundings."""
        if not self.surroundings:
            return []
        known = [self.changes.get(birth + offset) for offset in self.SURROUNDING_OFFSETS]
        return [value for change in known for value in ((0.0, 0.0, 0.0) if change is None else (*change, 1.0))]

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

    def along_path(self) -> list:
        """The columns of the path for each kept frame."""
        _, points, heading, _, ring = self.paths[0]
        columns = []
        for birth in self.births:
            ahead = heading * (points[birth] - points[-1])
            if ring:
                ahead = (ahead + ring // 2) % ring - ring // 2
            columns.append((ahead / 8, ring / 16, 1.0))
        return columns

    def keep(self, ids: list) -> None:
        """Record the rows of the last call that stay."""
        super().keep(ids)
        self.first_features = [self.first_features[i] for i in ids]
        if self.with_places:
            self.places = [self.places[i] for i in ids]
