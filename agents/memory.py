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
    """

    WIDTH = 7
    AROUND = (-1, 0, 1, 2)
    """The changes from the frame two before to the one before, from that to the frame, to the next, and to the one after it."""

    def __init__(self, surroundings: bool = False) -> None:
        self.surroundings = surroundings
        self.last_step = -1
        self.num_context = 0
        self.births: list[int] = []
        self.looks: list[tuple] = []
        self.changes: dict[int, tuple] = {}

    def recall(self, rows: list, step: int) -> list:
        """Columns for each kept frame, to be called once per decision.

        Args:
            rows: per frame, oldest first: boundary_score, feature_drift, temporal_similarity and squashed motion as now.
            step: the benchmark's step; the newest frame was generated in it.

        Returns:
            Per frame: log(1 + age in frames) / 4, whether it was generated, log(1 + gap to the frame kept before it) / 3,
            and the four features of its first call. With surroundings then, for each of `AROUND`, temporal_similarity and
            squashed motion of that change and 1, or zeros where it is not known.
        """
        from math import log1p  # here, because the exported class brings nothing but its own lines

        num_frames = len(rows)
        if step <= self.last_step or step - self.last_step != num_frames - len(self.births):
            self.births, self.looks, self.changes = [], [], {}
            self.num_context = num_frames - step - 1
        self.last_step = step
        num_new = num_frames - len(self.births)
        newest = step + self.num_context
        new_births = range(newest - num_new + 1, newest + 1)
        new_looks = [tuple(float(value) for value in row) for row in rows[num_frames - num_new :]]
        self.births += new_births
        self.looks += new_looks
        if self.surroundings:
            # The frame before a new one is always there, but the first frame has none.
            self.changes.update({birth: look[2:] for birth, look in zip(new_births, new_looks, strict=False) if birth > 0})
        return [
            (
                log1p(newest - birth) / 4,
                float(birth >= self.num_context),
                gap,
                *look,
                *self.around(birth),
            )
            for birth, gap, look in zip(self.births, self.gaps(range(num_frames)), self.looks, strict=False)
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

    def keep(self, ids: list) -> None:
        """Remember which rows of the last call stay."""
        self.births = [self.births[i] for i in ids]
        self.looks = [self.looks[i] for i in ids]
