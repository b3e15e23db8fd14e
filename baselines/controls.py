"""Controls: rules that use no feature of the frames, or one, with which every other policy is compared."""

from __future__ import annotations

import numpy as np

from far_env.baselines.filling import History, count, share
from far_env.baselines.partition import PartitionPolicy, Parts, drift_match, evenly_spaced, slots
from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan


class RandomSubset:
    """Keeps the newest frame and a random choice of the others, filling the budget.

    Source: control. Tier: M, whose inputs it does not use. Parameter ``seed``. `begin_clip` restarts the generator from (seed,
    noise seed of the clip), so that the choice on a clip does not depend on the clips before it.
    """

    name = "random"
    family = "control"
    source = "control"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._rng = np.random.default_rng(seed)

    def begin_clip(self, noise_seed: int) -> None:
        """Restart the generator for a clip."""
        self._rng = np.random.default_rng((self.seed, noise_seed))

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the newest and budget − 1 others drawn uniformly."""
        num_frames = len(chunk_meta_list)
        older = min(num_frames - 1, int(budget_state["max_frames"]) - 1)
        chosen = self._rng.choice(num_frames - 1, size=older, replace=False) if older > 0 else []
        return make_plan([*(int(i) for i in chosen), num_frames - 1], num_frames)


class Uniform(PartitionPolicy):
    """Keeps frames spread evenly over the clip: drops the frame whose removal leaves the smallest gap, of equal ones the older.

    Source: control. Tier: M. Parameter ``n_sink``, the number of oldest frames that are always kept.
    """

    name = "uniform"
    source = "control"
    GRID = {"n_sink": (1, 2, 4)}

    def __init__(self, n_sink: int = 1) -> None:
        super().__init__(count(self.name, "n_sink", n_sink, 1), 1, mid_score=None)

    def _slots(self, max_frames: int) -> tuple[int, int, int]:
        return slots(max_frames, self.sink, self.recent)

    def _choose_middle(self, history: History, parts: Parts) -> list[int]:
        return evenly_spaced(history, parts)


class RandomMid(PartitionPolicy):
    """Keeps sinks, the newest frames and a uniform random sample of all frames that were ever between them.

    The score of a frame is drawn once, by a counter-based generator from (seed, clip, birth).

    Source: control. Tier: M. Parameters ``n_sink``; ``f_recent``, a share of the budget; ``seed``.
    """

    name = "random_mid"
    source = "control"
    GRID = {"n_sink": (0, 1, 2), "f_recent": (0.25, 0.5, 0.75)}

    def __init__(self, n_sink: int = 1, f_recent: float = 0.25, seed: int = 0) -> None:
        sink, recent = count(self.name, "n_sink", n_sink), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, self._drawn)
        self.seed = count(self.name, "seed", seed)

    def _drawn(self, history: History, parts: Parts) -> list[float]:
        births = [history.births[i] for i in parts.middle]
        key = np.array([self.seed, history.clip % 2**64], dtype=np.uint64)
        return [np.random.Generator(np.random.Philox(key=key, counter=birth)).random() for birth in births]


class DriftMatch(PartitionPolicy):
    """Keeps sinks, the newest frames, and the middle frames whose distance to the oldest frame is most similar to that of the
    newest frame.

    Source: control. Tier: M; by the triangle inequality an upper bound of the similarity that context_match uses. Parameters
    ``n_sink``, at least 1, since distances are to the oldest kept frame; ``f_recent``, a share of the budget.
    """

    name = "drift_match"
    source = "control"
    GRID = {"n_sink": (1, 2), "f_recent": (0.25, 0.5, 0.75)}

    def __init__(self, n_sink: int = 1, f_recent: float = 0.25) -> None:
        sink, recent = count(self.name, "n_sink", n_sink, 1), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, drift_match)


class ContextMatch(PartitionPolicy):
    """Keeps sinks, the newest frames, and the middle frames whose latents are most similar to the mean of the newest frames.

    Source: control. Tier: L (lat_cos). Parameters ``n_sink``; ``f_recent``, a share of the budget.
    """

    name = "context_match"
    source = "control"
    needs = {"L": ("lat_cos",)}
    GRID = {"n_sink": (0, 1, 2), "f_recent": (0.25, 0.5, 0.75)}

    def __init__(self, n_sink: int = 1, f_recent: float = 0.25) -> None:
        sink, recent = count(self.name, "n_sink", n_sink), share(self.name, "f_recent", f_recent)
        super().__init__(sink, recent, context_similarity)


def context_similarity(history: History, parts: Parts) -> np.ndarray:
    """Mean cosine to the newest frames. It equals the cosine to the mean of their unit vectors up to a factor common to all."""
    return history.signals["lat_cos"][np.ix_(parts.middle, parts.recent)].astype(np.float64).mean(axis=1)
