"""Policies that fill the budget. Each chooses the rows that stay; calls, memory of a clip and plans are the same for all.

Exactly min(rows, budget) rows stay, the newest among them, so that the benchmark's truncation never acts. Anchors are demoted
(which keeps them as well), the other rows that stay are kept, the rest dropped.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from far_env.births import FrameBirths
from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan
from far_env.errors import unknown_name

FIRST_CLIP = 42
"""The number of the first clip if ``begin_clip`` is not called: the benchmark's noise seed for it."""


@dataclass(frozen=True)
class History:
    """A policy's information at a call. Rows are in chunk_id order, oldest first.

    Attributes:
        rows: the benchmark's description of each frame.
        births: their true numbers, context frames first; chunk_id and age are positions, not times.
        num_context: how many frames of the clip are ground truth.
        step: the prediction step.
        max_frames: the budget.
        clip: the clip's noise seed if ``begin_clip`` was called, else a running number.
        signals: the declared ones, or none of them.
        notes: the policy's notes of its last call for this clip; it changes them by replacing values.
    """

    rows: list[FrameMeta]
    births: tuple[int, ...]
    num_context: int
    step: int
    max_frames: int
    clip: int
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class ClipMemory:
    """A policy's memory of a call: the numbers of the rows that stayed, and notes."""

    clip: int
    num_rows: int
    births: FrameBirths
    notes: dict[str, Any]


class FillingPolicy(ABC):
    """A rule that chooses which rows fill the budget.

    Args:
        tier: one of the class's tiers; by default the first.

    Attributes:
        name, family, source: for listings. ``family`` is also the plans' tag, unless ``tags`` has another.
        remark: follows the name in tables, where the source leaves open what the rule is; "" for none.
        tags: the plans' tags.
        needs: tier → the signals (see `far_env.contract.SIGNALS`) that it declares there. Tiers are M (FrameMeta rows alone),
            L (also latents) and A (also attention). Without its signals, as in the benchmark, a class that has tier M falls
            back to it; any other raises ValueError.
        GRID: parameter → the values that tuning tries, in all combinations; none for a rule without parameters.
        equivalent_to: name of a baseline with the same answers to the largest budget for which that holds.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    remark: ClassVar[str] = ""
    tags: ClassVar[dict[str, Any]] = {}
    needs: ClassVar[dict[str, tuple[str, ...]]] = {"M": ()}
    GRID: ClassVar[dict[str, tuple[Any, ...]]] = {}
    equivalent_to: ClassVar[dict[str, int]] = {}

    def __init__(self, tier: str | None = None) -> None:
        self.tier = next(iter(self.needs)) if tier is None else tier
        if self.tier not in self.needs:
            raise ValueError(f"{self.name}: {unknown_name('tier', tier, list(self.needs))}")
        self.signals = self.needs[self.tier]
        self.begin_clip(FIRST_CLIP)

    @classmethod
    def grid(cls, max_frames: int) -> Iterator[dict[str, Any]]:
        """Parameters that tuning tries under a budget; none without a `GRID`."""
        if cls.GRID:
            for values in itertools.product(*cls.GRID.values()):
                yield dict(zip(cls.GRID, values, strict=True))

    def begin_clip(self, noise_seed: int) -> None:
        """Forget the clip before."""
        self._first_clip = noise_seed
        self._memory: ClipMemory | None = None
        self._before: ClipMemory | None = None

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Choose min(rows, budget) rows. Raises ValueError if a signal is missing that the policy cannot do without."""
        rows = sorted(chunk_meta_list, key=lambda meta: meta.chunk_id)
        num_rows, max_frames = len(rows), int(budget_state["max_frames"])
        history, births = self._recall(rows, rollout_state, max_frames)
        if num_rows <= max_frames:
            anchors, others = [], list(range(num_rows))
        elif max_frames == 1:
            anchors, others = [], [num_rows - 1]
        else:
            anchors, others = self._choose(history)
        births.keep(sorted([*anchors, *others]))
        self._memory = ClipMemory(history.clip, num_rows, births, history.notes)
        tags = {"retention_family": self.family, **self._tags(max_frames)}
        return make_plan(others, num_rows, anchors=anchors, **tags)

    @abstractmethod
    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        """Rows that stay, anchors and others, where there are more rows than a budget of at least 2."""

    def _tags(self, max_frames: int) -> dict[str, Any]:
        """The plan's tags besides its family."""
        return self.tags

    def _recall(self, rows: list[FrameMeta], state: RolloutState, max_frames: int) -> tuple[History, FrameBirths]:
        """The history with its frames' numbers, and the births from which the next call continues."""
        memory, num_rows = self._memory, len(rows)
        if memory is not None and (memory.births.last_step, memory.num_rows) == (state.step, num_rows):
            memory = self._before  # the same call again gets the same answer
        self._before = memory
        signals = self._available(state)
        births = FrameBirths() if memory is None else copy.copy(memory.births)
        if births.observe(num_rows, state.step):
            clip, notes = self._first_clip if memory is None else memory.clip + 1, {}
        else:
            clip, notes = memory.clip, dict(memory.notes)
        numbers, num_context = tuple(births.births), max(0, births.num_context)
        return History(rows, numbers, num_context, state.step, max_frames, clip, signals, notes), births

    def _available(self, state: RolloutState) -> dict[str, np.ndarray]:
        """The declared signals, or none of them if the policy can do without."""
        available = getattr(state, "signals", {})
        missing = [name for name in self.signals if name not in available]
        if not missing:
            return {name: available[name] for name in self.signals}
        if "M" in self.needs:
            return {}
        raise ValueError(
            f"{self.name} needs {' and '.join(missing)}, which this rollout does not provide; play it with far-env evaluate "
            "or far_env.rollout.play, or choose a policy of tier M"
        )


def comparable(scores: Sequence[float]) -> list[float]:
    """Scores rounded for comparison to six significant digits; NaN becomes −∞."""
    return [float("-inf") if np.isnan(score) else float(f"{float(score):.5e}") for score in scores]


def best(rows: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    """The ``count`` rows with the highest scores, in time order; of rows with equal scores the newer."""
    ranked = sorted(zip(comparable(scores), rows, strict=True), reverse=True)
    return sorted(row for _, row in ranked[:count])


def require(condition: bool, policy: str, parameter: str, value: object, expected: str) -> None:
    """Raise ValueError about a parameter unless the condition holds."""
    if not condition:
        raise ValueError(f"baseline {policy}: {parameter} must be {expected}, got {value!r}")


def count(policy: str, parameter: str, value: int, least: int = 0) -> int:
    """The value, if it is a whole number of at least ``least``; raises ValueError otherwise."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, policy, parameter, value, f"a whole number of at least {least}")
    return value


def share(policy: str, parameter: str, value: float, some: bool = False) -> float:
    """The value as a float, if it is from 0 to 1 (above 0 with ``some``); raises ValueError otherwise."""
    inside = isinstance(value, int | float) and (value > 0 if some else value >= 0) and value <= 1
    require(inside, policy, parameter, value, "a share above 0 and up to 1" if some else "a share from 0 to 1")
    return float(value)
