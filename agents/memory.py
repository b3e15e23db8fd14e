"""A policy's memory of its calls for one clip: when each kept frame was generated, and its and its neighbours' features then.

The benchmark gives ages as positions in the kept history, and compares a frame with the frames that are kept at the moment. One
policy object serves a whole clip, so it can remember its observations and decisions. Training, evaluation and the exported file
use the same class; the exported file contains its source, so it needs nothing but the standard library.
"""

from __future__ import annotations

from far_env.baselines.tracking import PathTracking, ShotTracking


class HistoryMemory(ShotTracking, PathTracking):
    """Follows the frames of one history from call to call; see `FrameBirths` for how they are numbered.

    Args:
        surroundings: also recall how frames changed around each kept one, dropped frames included.
        places: also recall which kept frames show the same place (or shot), as inferred from the changes.
        path: also recall how far each kept frame is from the newest along the camera's path, as inferred from the changes.
    """

    WIDTH = 7
    SURROUNDING_OFFSETS = (-1, 0, 1, 2)
    """The changes from the frame two before to the one before, from that to the frame, to the next, and to the one after it."""

    PATH_WIDTH = 3

    def __init__(self, surroundings: bool = False, places: bool = False, path: bool = False) -> None:
        super().__init__()
        self.surroundings, self.with_places, self.with_path = surroundings, places, path
        self.first_features: list[tuple] = []
        self.changes: dict[int, tuple] = {}

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
            positions, ring = self.along_path()
            inferred = [(*place, position / 8, ring / 16, 1.0) for place, position in zip(inferred, positions, strict=False)]
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

    def keep(self, ids: list) -> None:
        """Record the rows of the last call that stay."""
        super().keep(ids)
        self.first_features = [self.first_features[i] for i in ids]
