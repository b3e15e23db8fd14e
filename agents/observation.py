"""What a policy has received about a clip so far, as arrays: the only builder of a scorer's inputs.

The benchmark compares each kept frame with the one kept before it and with the oldest. Over the calls for a clip, a policy that
remembers receives part of a similarity matrix: every frame that was ever in the history is a node, and a pair of nodes that
were once neighbours, or of which one was the oldest, has measurements. `FrameGraph` stores them, `graph_inputs` makes the
network's inputs. Training, evaluation and exported files use this module; it needs NumPy alone, and exported files contain its
source.
"""

from __future__ import annotations

import numpy as np

from far_env.births import FrameBirths


class FrameGraph(FrameBirths):
    """The frames of a clip that a policy has seen, and what it has received about pairs of them.

    Call `observe_frames` at every decision and `keep` after it. See `far_env.births.FrameBirths` for how frames are numbered.

    Args:
        dropped_frames: whether frames are remembered after they were dropped.

    Attributes:
        numbers: int64 (N,), of all frames that are remembered, ascending.
        last_seen: int64 (N,), the number of the newest frame when each of them was last in the history.
        changes: float32 (N, 2, 2), the first two measurements of each frame and the one generated before it, and of it and
            the next; known_changes: bool (N, 2).
        pairs: float32 (N, N, 3), see `MEASUREMENTS`; known: bool (N, N, 2), whether the first two and the last are known.
        frame_signals, pair_signals: float32 (N, F) and (N, N, P), the signals by name in alphabetical order; NaN if unknown.
        total: float64 (3,), the sum of the changes between consecutive frames so far and their count.
    """

    MAX_NODES = 64
    """Frames that are remembered. Of more, those that were dropped longest ago are forgotten; kept frames never are."""
    MEASUREMENTS = 3
    """Of a pair: 1 − cosine and mean absolute difference, known of frames that were neighbours in the history; and the distance
    relative to the norm of the older one, known where that was the oldest in the history."""
    SCALES = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Resolutions at which two changes are compared, from fine to coarse, in units of the mean change of the clip."""
    NODE_INPUTS = 15
    EDGE_INPUTS = 9 + 4 * len(SCALES)
    """Channels of `graph_inputs` beside those of signals."""

    def __init__(self, dropped_frames: bool = True) -> None:
        super().__init__()
        self.max_nodes = self.MAX_NODES if dropped_frames else 0
        self.forget()

    def forget(self) -> None:
        """Begin a clip."""
        self.numbers = np.zeros(0, dtype=np.int64)
        self.last_seen = np.zeros(0, dtype=np.int64)
        self.changes = np.zeros((0, 2, 2), dtype=np.float32)
        self.known_changes = np.zeros((0, 2), dtype=bool)
        self.pairs = np.zeros((0, 0, self.MEASUREMENTS), dtype=np.float32)
        self.known = np.zeros((0, 0, 2), dtype=bool)
        self.frame_signals = np.zeros((0, 0), dtype=np.float32)
        self.pair_signals = np.zeros((0, 0, 0), dtype=np.float32)
        self.total = np.zeros(3)

    def observe_frames(self, features: np.ndarray, step: int, frame_signals: tuple = (), pair_signals: tuple = ()) -> None:
        """Take in a call of the policy.

        Args:
            features: (n, 4), boundary_score, feature_drift, temporal_similarity and motion_strength of the kept frames,
                oldest first.
            step: the benchmark's step; the newest frame was generated in it.
            frame_signals, pair_signals: arrays (n,) and (n, n); NaN where unknown.
        """
        features = np.asarray(features, dtype=np.float32)
        count = len(features)
        if self.observe(count, step):
            self.forget()
        self.add_nodes(len(frame_signals), len(pair_signals))
        rows = self.rows()
        self.last_seen[rows] = self.births[-1]
        _, drift, similarity, motion = features[1:].T
        measured = np.stack([1 - similarity, motion], axis=-1)
        later, earlier, oldest = rows[1:], rows[:-1], rows[:1]
        for i, j in ((later, earlier), (earlier, later)):
            self.pairs[i, j, :2], self.known[i, j, 0] = measured, True
        for i, j in ((later, oldest), (oldest, later)):
            self.pairs[i, j, 2], self.known[i, j, 1] = drift, True
        for i, j, change in zip(later, earlier, measured, strict=True):
            if self.numbers[i] == self.numbers[j] + 1 and not self.known_changes[i, 0]:
                self.changes[i, 0] = self.changes[j, 1] = change
                self.known_changes[i, 0] = self.known_changes[j, 1] = True
                self.total += (*change, 1)
        for index, values in enumerate(frame_signals):
            self.frame_signals[rows, index] = values
        for index, values in enumerate(pair_signals):
            self.pair_signals[(*np.ix_(rows, rows), index)] = values

    def add_nodes(self, num_frame_signals: int, num_pair_signals: int) -> None:
        """Remember the frames that are new in the history, and forget others beyond `max_nodes`."""
        newest = self.numbers[-1] if len(self.numbers) else -1
        numbers = np.array([birth for birth in self.births if birth > newest])
        before, new = len(self.numbers), len(numbers)
        stay = np.arange(before)
        if before + new > self.max_nodes:
            dropped = np.flatnonzero(~np.isin(self.numbers, self.births))
            excess = min(len(dropped), before + new - self.max_nodes)
            stay = np.setdiff1d(stay, dropped[np.argsort(self.last_seen[dropped], kind="stable")[:excess]])
        size, count = len(stay) + new, len(stay)

        def grown(old: np.ndarray, axes: int, fill: float, tail: tuple) -> np.ndarray:
            larger = np.full((size,) * axes + tail, fill, dtype=old.dtype)
            larger[(slice(count),) * axes] = old[stay] if axes == 1 else old[stay[:, None], stay] if before else 0
            return larger

        self.numbers = np.concatenate([self.numbers[stay], numbers]).astype(np.int64)
        self.last_seen = grown(self.last_seen, 1, 0, ())
        self.changes, self.known_changes = grown(self.changes, 1, 0, (2, 2)), grown(self.known_changes, 1, False, (2,))
        self.pairs, self.known = grown(self.pairs, 2, 0, (self.MEASUREMENTS,)), grown(self.known, 2, False, (2,))
        if not before:
            self.frame_signals = np.zeros((0, num_frame_signals), dtype=np.float32)
            self.pair_signals = np.zeros((0, 0, num_pair_signals), dtype=np.float32)
        self.frame_signals = grown(self.frame_signals, 1, np.nan, (num_frame_signals,))
        self.pair_signals = grown(self.pair_signals, 2, np.nan, (num_pair_signals,))

    def rows(self) -> np.ndarray:
        """The nodes that are in the history, int64 (n,)."""
        return np.searchsorted(self.numbers, self.births)

    def arrays(self, steps_left: int, max_frames: int) -> dict:
        """The state as the arrays that `graph_inputs` takes, without a batch dimension.

        Args:
            steps_left: frames that are still to be generated.
            max_frames: the budget.
        """
        in_history = np.zeros(len(self.numbers), dtype=bool)
        in_history[self.rows()] = True
        return {
            "ages": (self.numbers[-1] - self.numbers).astype(np.float32),
            "unseen": (self.numbers[-1] - self.last_seen).astype(np.float32),
            "generated": self.numbers >= self.num_context,
            "in_history": in_history,
            "changes": self.changes,
            "known_changes": self.known_changes,
            "pairs": self.pairs,
            "known": self.known,
            "frame_signals": self.frame_signals,
            "pair_signals": self.pair_signals,
            "scale": (self.total[:2] / max(self.total[2], 1)).astype(np.float32),
            "situation": np.array([max_frames, steps_left], dtype=np.float32),
        }


def signal_arrays(signals: dict, names: tuple) -> tuple:
    """Signals of a call as `FrameGraph.observe_frames` takes them: those of frames (n,), and those of pairs (n, n)."""
    values = [np.asarray(signals[name], dtype=np.float32) for name in sorted(names)]
    return [value for value in values if value.ndim == 1], [value for value in values if value.ndim == 2]


def graph_inputs(graph: dict) -> tuple:
    """The network's inputs.

    Changes are divided by the mean change between consecutive frames of the clip so far, so that they do not depend on the
    units of an autoencoder, and squashed as x / (1 + x); counts and times enter as logarithms.

    Args:
        graph: arrays of `FrameGraph.arrays`, N nodes, with any batch dimensions in front. Padding is zero, and not in_history.

    Returns:
        nodes (…, N, `FrameGraph.NODE_INPUTS` + 2 F): the logarithm of the age; whether generated, in the history, the newest;
            how long ago it was last in the history; the two changes around it with whether they are known; budget, frames in
            the history and frames to come; each signal and whether it is known.
        edges (…, N, N, `FrameGraph.EDGE_INPUTS` + 2 P): the three measurements and whether they are known (2); how much later
            i is than j; whether j is just before, just after, or i; for each of `FrameGraph.SCALES` how well the changes around
            i and j agree: both before, before i and after j, after i and before j, both after; each signal and whether it is
            known.
    """
    scale = np.maximum(graph["scale"], 1e-6)
    ages, in_history = graph["ages"], graph["in_history"].astype(np.float32)
    changes = graph["changes"] / scale[..., None, None, :]
    known_changes = graph["known_changes"].astype(np.float32)
    max_frames, steps_left = graph["situation"][..., :1], graph["situation"][..., 1:]
    shared = np.concatenate(
        [np.log1p(max_frames) / 3, np.log1p(in_history.sum(-1, keepdims=True)) / 3, np.log1p(steps_left) / 4], axis=-1
    )
    squashed = changes / (1 + changes)
    columns = [
        np.log1p(ages) / 4,
        graph["generated"],
        in_history,
        (ages == 0) * in_history,
        np.log1p(graph["unseen"]) / 4,
        squashed[..., 0, 0],
        squashed[..., 0, 1],
        known_changes[..., 0],
        squashed[..., 1, 0],
        squashed[..., 1, 1],
        known_changes[..., 1],
        known_changes[..., 0] * known_changes[..., 1],
        *(np.broadcast_to(shared[..., index, None], ages.shape) for index in range(3)),
    ]
    known_frame = ~np.isnan(graph["frame_signals"])
    values = np.nan_to_num(graph["frame_signals"])
    signals = np.concatenate([values / (1 + np.abs(values)), known_frame], axis=-1)
    nodes = np.concatenate([np.stack(columns, axis=-1), signals], axis=-1, dtype=np.float32)

    known = graph["known"].astype(np.float32)
    pairs = graph["pairs"][..., :2] / scale[..., None, None, :]
    gap = ages[..., None, :] - ages[..., :, None]
    measured = [*np.moveaxis(pairs / (1 + pairs), -1, 0), graph["pairs"][..., 2], known[..., 0], known[..., 1]]
    placed = [np.sign(gap) * np.log1p(np.abs(gap)) / 4, gap == 1, gap == -1, gap == 0]
    around = np.concatenate([changes[..., 0, :], changes[..., 1, :]], axis=-2)
    around_known = np.concatenate([known_changes[..., 0], known_changes[..., 1]], axis=-1)
    squares = ((around[..., :, None, :] - around[..., None, :, :]) ** 2).sum(-1)
    both_known = around_known[..., :, None] * around_known[..., None, :]
    count = ages.shape[-1]
    before, after = slice(0, count), slice(count, 2 * count)
    agreements = []
    for width in FrameGraph.SCALES:
        agreement = both_known / (1 + squares / width**2) ** 2
        agreements += [agreement[..., one, other] for one in (before, after) for other in (before, after)]
    known_pair = ~np.isnan(graph["pair_signals"])
    values = np.nan_to_num(graph["pair_signals"])
    signals = np.concatenate([values / (1 + np.abs(values)), known_pair], axis=-1)
    edges = np.concatenate([np.stack([*measured, *placed, *agreements], axis=-1), signals], axis=-1, dtype=np.float32)
    return nodes, edges
