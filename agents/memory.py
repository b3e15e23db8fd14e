"""What a policy may remember of its own calls: when each kept frame was born, and what it and its neighbours looked like then.

The benchmark tells ages as positions in the kept history, and compares a frame with the frames that happen to be kept now.
One policy object serves a whole clip, so it can remember what it saw and decided. Training, evaluation and the exported file
all use this one class; the exported file carries its source, so it needs nothing but the standard library.
"""

from __future__ import annotations


class HistoryMemory:
    """Follows the frames of one history from call to call.

    A new clip is recognised by a step that has not grown, or has grown by another number than that of the new frames.

    At a clip's first call nothing has been dropped yet, so the frames are numbered 0, 1, … and the newest is
    step + n_context. From then on it knows which frames it kept; all others are new.

    Args:
        surroundings: also recall how frames changed around each kept one, from frames that were dropped as well.
        places: also recall which kept frames show the same place (or shot), as far as the changes tell.
        path: also recall how far each kept frame is from the newest along the camera's path, as far as the changes tell.
    """

    WIDTH = 7
    AROUND = (-1, 0, 1, 2)
    """The changes from the frame two before to the one before, from that to the frame, to the next, and to the one after it."""

    ALIKE = 0.4
    """Two neighbours of this temporal_similarity show one place. Those whose feature_drift is below 1 show the oldest one's."""
    SPREAD = (0.04, 0.012)
    """How much temporal_similarity and squashed motion differ between two changes from one place to another."""
    UNSEEN, FARTHEST = 3.0, 25.0
    """Squared distances, in units of `SPREAD`, of two places that were never neighbours, and from which on a place is new."""

    STILL = 0.6
    """A camera that moved shows a picture of less temporal_similarity."""
    PASSING = (0.004, 0.0012)
    """How much temporal_similarity and squashed motion differ when the same stretch of the path is passed again."""
    AHEAD, TURN, NEW, CLOSE, UNLIKE = 0.2, 1.5, 8.0, 3.0, 6.0
    """What is against a hypothesis (negative log-likelihoods): that the camera went on, turned, passed a stretch for the first
    time, that the path is a ring; and from which misfit on its two ends are not one stretch of a ring."""
    SHORTEST_RING = 6
    NUM_PATHS = 12
    """Hypotheses that are followed."""
    PATH_WIDTH = 3

    def __init__(self, surroundings: bool = False, places: bool = False, path: bool = False) -> None:
        self.surroundings, self.with_places, self.with_path = surroundings, places, path
        self.last_step = -1
        self.num_context = 0
        self.births: list[int] = []
        self.looks: list[tuple] = []
        self.changes: dict[int, tuple] = {}
        self.places: list[int] = []
        self.num_places = 0
        self.between: dict[tuple, tuple] = {}
        self.paths: list[tuple] = []

    def recall(self, rows: list, step: int) -> list:
        """Columns for each kept frame, to be called once per decision.

        Args:
            rows: per frame, oldest first: boundary_score, feature_drift, temporal_similarity and squashed motion as now.
            step: the benchmark's step; the newest frame was generated in it.

        Returns:
            Per frame: log(1 + age in frames) / 4, whether it was generated, log(1 + gap to the frame kept before it) / 3,
            and the four features of its first call. With surroundings then, for each of `AROUND`, temporal_similarity and
            squashed motion of that change and 1, or zeros where it is not known. With places then the number of the frame's
            place among those that are kept, 1, 2, …, as a sixteenth. With path then how many stretches of the camera's path the
            frame is ahead of the newest (behind: negative) as an eighth, the length of a path that is a ring as a sixteenth,
            or zero, and 1.
        """
        from math import log1p  # here, because the exported class brings nothing but its own lines

        num_frames = len(rows)
        rows = [tuple(float(value) for value in row) for row in rows]
        if step <= self.last_step or step - self.last_step != num_frames - len(self.births):
            self.births, self.looks, self.changes = [], [], {}
            self.places, self.num_places, self.between = [], 0, {}
            self.paths = [(0.0, (0,), 1, {}, 0)]
            self.num_context = num_frames - step - 1
        self.last_step = step
        num_new = num_frames - len(self.births)
        newest = step + self.num_context
        new_births = range(newest - num_new + 1, newest + 1)
        new_looks = rows[num_frames - num_new :]
        self.births += new_births
        self.looks += new_looks
        if self.surroundings:
            # The frame before a new one is always there, but the first frame has none.
            self.changes.update({birth: look[2:] for birth, look in zip(new_births, new_looks, strict=False) if birth > 0})
        shown: list = [()] * num_frames
        if self.with_places:
            self.find_places(rows, num_new)
            numbers = {place: number for number, place in enumerate(dict.fromkeys(self.places), start=1)}
            shown = [(numbers[place] / 16,) for place in self.places]
        if self.with_path:
            for birth in new_births:
                if birth > 0:
                    self.follow(self.changes[birth])
            shown = [(*own, *told) for own, told in zip(shown, self.along_path(), strict=False)]
        return [
            (
                log1p(newest - birth) / 4,
                float(birth >= self.num_context),
                gap,
                *look,
                *self.around(birth),
                *place,
            )
            for birth, gap, look, place in zip(self.births, self.gaps(range(num_frames)), self.looks, shown, strict=False)
        ]

    def gaps(self, left: list) -> list:
        """log(1 + gap to the row before it) / 3 of these rows of the last call, as if all others were gone."""
        from math import log1p

        births = [self.births[i] for i in left]
        return [log1p(birth - before) / 3 for birth, before in zip(births, [births[0], *births], strict=False)]

    def around(self, birth: int) -> list:
        """The columns of a frame's surroundings, none if they are not followed."""
        if not self.surroundings:
            return []
        known = [self.changes.get(birth + offset) for offset in self.AROUND]
        return [value for change in known for value in ((0.0, 0.0, 0.0) if change is None else (*change, 1.0))]

    def find_places(self, rows: list, num_new: int) -> None:
        """Tell the places of the new frames, and correct those of older ones by what their neighbours of now tell."""
        for i, (_, drift, similarity, motion) in enumerate(rows):
            if i >= len(rows) - num_new:
                self.places.append(self.place_of(i, drift, (similarity, motion)))
            elif i > 0:
                own, before = self.places[i], self.places[i - 1]
                same = before if similarity > self.ALIKE else self.places[0] if drift < 1 else None
                if same not in (None, own):
                    self.places = [same if place == own else place for place in self.places]
                    named = {pair: tuple(sorted(same if place == own else place for place in pair)) for pair in self.between}
                    self.between = {named[pair]: change for pair, change in self.between.items()}
                elif same is None and own == before:
                    self.places[i] = self.new_place()
            if i > 0 and similarity <= self.ALIKE:
                pair = tuple(sorted(self.places[i - 1 : i + 1]))
                mean, count = self.between.get(pair, ((0.0, 0.0), 0))
                change = zip(mean, (similarity, motion), strict=False)
                self.between[pair] = (tuple(old + (new - old) / (count + 1) for old, new in change), count + 1)

    def place_of(self, i: int, drift: float, change: tuple) -> int:
        """Of the new frame i: its neighbour's or the oldest frame's, else one that the camera has come to by such a change."""
        if i == 0:
            return self.new_place()
        before, oldest = self.places[i - 1], self.places[0]
        if change[0] > self.ALIKE:
            return before
        if drift < 1:
            return oldest
        others = {} if self.births[i] < self.num_context else dict.fromkeys(self.places)
        distances = {}
        for place in others:
            distances[place] = self.UNSEEN
            if (known := self.between.get((min(before, place), max(before, place)))) is not None:
                parts = zip(change, known[0], self.SPREAD, strict=False)
                distances[place] = sum(((own - other) / spread) ** 2 for own, other, spread in parts)
        likely = [place for place in others if place not in (before, oldest) and distances[place] < self.FARTHEST]
        return min(likely, key=distances.get) if likely else self.new_place()

    def new_place(self) -> int:
        """A number that no place of this clip has."""
        self.num_places += 1
        return self.num_places

    def follow(self, change: tuple) -> None:
        """Lengthen the likeliest paths by a frame: the camera stood still, went on along the path, or turned.

        A path is what is against it, the number of the point that each frame so far shows, the direction (1 or -1), the change
        that was seen on the stretch from point n to n + 1 with how often it was seen, by n, and the number of points if the
        path is a ring, else 0.
        """
        longer = []
        for against, points, heading, stretches, ring in self.paths:
            here = points[-1]
            if change[0] > self.STILL:
                longer.append((against, (*points, here), heading, stretches, ring))
                continue
            for direction in (heading, -heading) if stretches else (heading,):
                stretch = here if direction > 0 else here - 1
                there = here + direction
                if ring:
                    stretch, there = stretch % ring, there % ring
                moved = against + (self.AHEAD if direction == heading else self.TURN)
                known = stretches.get(stretch)
                seen = self.NEW if known is None else self.misfit(change, known)
                passed = {**stretches, stretch: self.averaged(known, (change, 1))}
                longer.append((moved + seen, (*points, there), direction, passed, ring))
                if known is None and not ring:
                    longer += self.closed(moved, (*points, there), direction, passed, stretch)
        self.paths = sorted(longer, key=lambda path: path[0])[: self.NUM_PATHS]

    def closed(self, against: float, points: tuple, heading: int, stretches: dict, newest: int) -> list:
        """The path as a ring, if the stretch that it was just lengthened by may be the one at its other end."""
        other = min(stretches) if newest == max(stretches) else max(stretches)
        ring = abs(newest - other)
        misfit = self.misfit(stretches[newest][0], stretches[other])
        if ring < self.SHORTEST_RING or misfit > self.UNLIKE:
            return []
        both = self.averaged(stretches[other], stretches[newest])
        closed = {number % ring: seen for number, seen in stretches.items()} | {newest % ring: both}
        return [(against + misfit + self.CLOSE, tuple(point % ring for point in points), heading, closed, ring)]

    def misfit(self, change: tuple, known: tuple) -> float:
        """Negative log-likelihood of a change on a stretch where another mean was seen, up to a constant."""
        mean, count = known
        parts = zip(change, mean, self.PASSING, strict=False)
        return sum(((own - other) / spread) ** 2 for own, other, spread in parts) * count / (count + 1) / 2

    def averaged(self, *seen: tuple) -> tuple:
        """The mean of means with counts, with the sum of these; None counts nothing."""
        known = [own for own in seen if own is not None]
        total = sum(count for _, count in known)
        return tuple(sum(mean[part] * count for mean, count in known) / total for part in range(2)), total

    def along_path(self) -> list:
        """The columns of path for each kept frame."""
        _, points, heading, _, ring = self.paths[0]
        columns = []
        for birth in self.births:
            ahead = heading * (points[birth] - points[-1])
            if ring:
                ahead = (ahead + ring // 2) % ring - ring // 2
            columns.append((ahead / 8, ring / 16, 1.0))
        return columns

    def keep(self, ids: list) -> None:
        """Remember which rows of the last call stay."""
        self.births = [self.births[i] for i in ids]
        self.looks = [self.looks[i] for i in ids]
        if self.with_places:
            self.places = [self.places[i] for i in ids]
