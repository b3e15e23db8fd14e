"""The contract between a rollout and a retention policy: what a policy receives, what it may answer, what the answer does.

The dataclasses and `apply_plan` follow the benchmark ``ar-video-kv-temporal-policy`` exactly, so a policy that works here works
there. This module does not import torch, because a policy file does not need it.
"""

from __future__ import annotations

import copy
import operator
import reprlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np

from far_env.errors import PolicyError, first_line, unknown_name

UNLIMITED_FRAMES = 9999
"""A budget from here on is full history: the policy is never asked."""
DEMOTE = "demote_to_long_term"
KEEPING_ACTIONS = ("keep", DEMOTE)
ACTIONS = (*KEEPING_ACTIONS, "drop")
MAX_DECISIONS = 10_000
"""More decisions than this are refused even where a plan need not be well-formed: a generator may never end."""
GENERATED, TRUE = FEEDBACK = ("generated", "true")
"""The frame that enters the history after a frame was generated and scored: that one, or the true frame in its place."""

SIGNALS = {
    "lat_cos": "(N, N): cosine of the latents of frames i and j",
    "column_gap": "(N, N, w): for each column of latent i, the smallest mean squared difference to any column of latent j",
    "key_proto": "(N, d): mean over tokens and heads of the frame's keys in the first layer before rotation, at full "
    "resolution; unit norm",
    "attn_mass": "(N,): share of the newest frame's softmax attention that fell on frame i while it was denoised, mean over "
    "layers, heads, tokens and ODE steps; the newest frame's entry is its attention to itself, the sum is 1",
    "qk_first": "(N,): mean over layers, heads and pairs of tokens of q·k/√d between the newest frame's queries and frame i's "
    "keys, at the first ODE step",
    "key_cos": "(N, N): mean over layers, heads and pairs of tokens of the cosine of the keys of frames i and j, rotated as "
    "for the newest frame's queries; NaN for the newest frame, which has no clean keys yet",
    "expected_mass": "(N,): expected attention of a future query to frame i, times the norm of the values: mean over "
    "layers, heads and tokens of softmax(μ·k/√d + kᵀΣk/2d)·‖v‖ with mean μ and covariance Σ of the queries of all generated "
    "frames so far (first ODE step), rotated to the newest frame's position (2510.00636); NaN for the newest frame",
    "expected_cos": "(N, N): cosine of the mean keys of frames i and j, centred over the frames and projected on μ and the "
    "eight leading eigenvectors of Σ, mean over layers and heads; NaN for the newest frame",
    "denoise_gap": "(N,): mean squared difference between the one-step clean estimate half-way through the ODE and the "
    "finished frame; a context frame is noised half-way and predicted once from those before it",
}
"""What a policy may request from a rollout beyond the benchmark's `FrameMeta`, by name in its attribute ``signals``. float32;
row i is the kept frame with chunk_id i, of N frames with the newest. See `ObservedRolloutState`."""
OF_LATENTS = ("lat_cos", "column_gap", "key_proto")
"""Functions of the kept latents alone; all others are recorded while the newest frame is generated."""
OF_PAIRS = ("lat_cos", "column_gap", "key_cos", "expected_cos")
"""Signals with an entry for every pair of frames; all others have one per frame."""


@dataclass
class FrameMeta:
    """The features of one kept frame. ``age`` is a position in the kept history, not time; see `far_env.frame_meta`."""

    chunk_id: int
    age: int
    dynamic_age: int
    recentness: float
    size_mb: float
    access_count: int
    recent_hit_count: int
    last_access_step: int
    boundary_score: float
    feature_drift: float
    temporal_similarity: float
    motion_strength: float
    keyframe_score: float
    long_term_resident: bool = False
    compression_state: str = "none"


@dataclass
class RolloutState:
    """The progress of a rollout: frame ``step`` of ``total_steps`` predicted ones (from 0) was generated last, and the history
    may take ``budget_capacity_mb`` MiB."""

    step: int
    budget_capacity_mb: float
    total_steps: int


@dataclass
class ObservedRolloutState(RolloutState):
    """The state that a policy with an attribute ``signals`` (names of `SIGNALS`) receives where the rollout records them.

    The benchmark passes a plain `RolloutState`, whatever a policy declares.
    """

    signals: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class ChunkDecision:
    """The fate of one kept frame: "keep", "demote_to_long_term" (kept as well) or "drop". Priority is informational."""

    chunk_id: int
    action: str
    priority: float = 0.0


@dataclass
class TemporalCachePlan:
    """A policy's answer: one decision per kept frame, and tags that describe the method."""

    chunk_decisions: list[ChunkDecision] = field(default_factory=list)
    retention_family: str = "recency"
    anchor_preservation_rule: str = "none"
    boundary_transition_rule: str = "passthrough"
    queue_depth: int = 0
    long_term_budget_fraction: float = 0.0
    chunkwise_reuse: bool = False
    compression_mode: str = "none"


@runtime_checkable
class RetentionPolicy(Protocol):
    """Anything that decides which frames of the history stay. It may keep state between calls; one object serves many clips."""

    def build_temporal_cache_plan(
        self,
        chunk_meta_list: list[FrameMeta],
        rollout_state: RolloutState,
        budget_state: dict[str, float],
    ) -> TemporalCachePlan:
        """Decide about every frame in ``chunk_meta_list`` (oldest first); ``budget_state`` has max_frames and capacity_mb."""


@dataclass(frozen=True)
class Answer:
    """The result of one call of a policy.

    Attributes:
        kept: ids of the frames that stay; ascending, unless a lenient plan counted from the end.
        demoted: those of them that the plan demotes.
        seconds: duration of the policy's method alone.
    """

    kept: list[int]
    demoted: list[int]
    seconds: float


def newest_within_budget(wanted: np.ndarray, max_frames: int) -> np.ndarray:
    """The benchmark's keep rule: the newest frame always stays, and of more than ``max_frames`` the newest do.

    Args:
        wanted: bool (n,), the frames that a policy wants to keep, oldest first; n ≥ 1.
        max_frames: the budget, at least 1.

    Returns:
        bool (n,), the frames that stay; a new array.
    """
    kept = np.array(wanted, dtype=bool)
    kept[-1] = True
    kept[np.flatnonzero(kept)[:-max_frames]] = False
    return kept


def apply_plan(plan: Any, num_frames: int, max_frames: int) -> list[int]:
    """Ids of the frames that stay: the benchmark's lenient rule.

    Frames whose action is keep or demote stay; anything else drops; ids without a decision drop; the newest frame always
    stays; if more than ``max_frames`` remain, the highest ids do. As in the benchmark, a negative id counts from the newest
    frame back and comes before all others. Plans that `check_plan` accepts give ascending ids.

    Raises:
        ValueError: on an id outside the history, on which the benchmark's rollout of the clip fails.
    """
    chosen = {operator.index(decision.chunk_id) for decision in plan.chunk_decisions if decision.action in KEEPING_ACTIONS}
    ids = sorted(chosen | {num_frames - 1})
    kept = list(compress(ids, newest_within_budget(np.ones(len(ids), dtype=bool), max_frames)))
    for chunk_id in kept:
        if not -num_frames <= chunk_id < num_frames:
            raise ValueError(f"keeps chunk id {chunk_id}, but the history has ids 0 to {num_frames - 1}")
    return [chunk_id % num_frames for chunk_id in kept]


def check_plan(plan: Any, num_frames: int) -> None:
    """Raise ValueError, in one sentence, unless ``plan`` is a plan with known actions and each id at most once."""
    decided: set[int] = set()
    for decision in plan_decisions(plan, num_frames + 1):
        chunk_id, action = getattr(decision, "chunk_id", None), getattr(decision, "action", None)
        if not isinstance(action, str) or action not in ACTIONS:
            raise ValueError(f"gave frame {_short(chunk_id)} the unknown action {_short(action)}; use {', '.join(ACTIONS)}")
        if isinstance(chunk_id, bool) or not isinstance(chunk_id, Integral) or not 0 <= chunk_id < num_frames:
            raise ValueError(f"decided about chunk id {_short(chunk_id)}, but the history has ids 0 to {num_frames - 1}")
        if chunk_id in decided:
            raise ValueError(f"decided about chunk id {_short(chunk_id)} twice")
        decided.add(chunk_id)


def ask_policy(
    policy: RetentionPolicy,
    chunk_meta_list: list[FrameMeta],
    rollout_state: RolloutState,
    budget_state: dict[str, float],
    *,
    clip: object,
    strict: bool = True,
    max_kept: int | None = None,
) -> Answer:
    """Call the policy and apply its plan.

    Args:
        clip: name of the clip, for the error message.
        strict: also require a well-formed plan (`check_plan`). False applies the benchmark's lenient rule alone.
        max_kept: how many frames may stay; None for the budget's max_frames. A caller whose budget is not a number of frames
            passes the length of the history.

    Raises:
        PolicyError: if the policy raises or its plan is not valid, naming policy, clip and step.
    """
    # Read before the call: what the policy does to its arguments must not change how its plan is checked.
    num_frames = len(chunk_meta_list)
    max_kept = int(budget_state["max_frames"]) if max_kept is None else max_kept
    where = f"policy {policy_name(policy)} on clip {clip}, step {rollout_state.step}"
    start = time.perf_counter()
    try:
        plan = policy.build_temporal_cache_plan(chunk_meta_list, rollout_state, dict(budget_state))
    except PolicyError as error:  # from the process of a policy file, whose message names the fault
        raise PolicyError(f"{where}: {error}") from error
    except (Exception, SystemExit) as error:
        raise PolicyError(f"{where}: raised {type(error).__name__}: {_reason(error)}") from error
    seconds = time.perf_counter() - start
    try:
        # Read once, because a generator can be. Of more decisions than frames, check_plan refuses one.
        decisions = plan_decisions(plan, num_frames + 1 if strict else MAX_DECISIONS + 1)
        if len(decisions) > MAX_DECISIONS:
            raise ValueError(f"returned a plan with more than {MAX_DECISIONS} decisions for {num_frames} frames")
        plan = TemporalCachePlan(decisions)
        if strict:
            check_plan(plan, num_frames)
        kept = apply_plan(plan, num_frames, max_kept)
        demoting = {decision.chunk_id for decision in decisions if decision.action == DEMOTE}
        return Answer(kept, [chunk_id for chunk_id in kept if chunk_id in demoting], seconds)
    except ValueError as error:
        raise PolicyError(f"{where}: {_reason(error)}") from error
    except (Exception, SystemExit) as error:  # the attributes of a plan may run any code
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise PolicyError(f"{where}: returned a plan that cannot be read: {reason}") from error


def copy_for_clip(policy: RetentionPolicy | None, noise_seed: int) -> RetentionPolicy | None:
    """A deep copy for one clip, so that neither memory nor randomness depends on which clips came before or share a batch.

    If the copy has a method ``begin_clip(seed)``, it is called with the clip's noise seed.

    Raises:
        PolicyError: if the policy cannot be copied or its ``begin_clip`` raises.
    """
    try:
        copied = copy.deepcopy(policy)
        begin_clip = getattr(copied, "begin_clip", None)
        if callable(begin_clip):
            begin_clip(noise_seed)
    except Exception as error:
        name, reason = policy_name(policy), f"{type(error).__name__}: {error}"
        raise PolicyError(f"policy {name} cannot be prepared for a clip (noise seed {noise_seed}): {reason}") from error
    return copied


def make_plan(kept: Collection[int], num_frames: int, *, anchors: Collection[int] = (), **tags: Any) -> TemporalCachePlan:
    """The plan that keeps exactly these ids and demotes those that are ``anchors`` (which is another way to keep them).

    Priorities count up from the oldest frame that stays, at 1; dropped frames have 0.
    """
    priorities = {i: rank + 1.0 for rank, i in enumerate(sorted({*kept, *anchors}))}
    decisions = []
    for i in range(num_frames):
        action = "drop" if i not in priorities else "demote_to_long_term" if i in anchors else "keep"
        decisions.append(ChunkDecision(i, action, priorities.get(i, 0.0)))
    return TemporalCachePlan(chunk_decisions=decisions, **tags)


def wanted_signals(policy: RetentionPolicy | None) -> tuple[str, ...]:
    """The signals that a policy requests, none without an attribute ``signals``. Raises PolicyError on an unknown name."""
    try:
        return check_signals(getattr(policy, "signals", ()))
    except ValueError as error:
        raise PolicyError(f"policy {policy_name(policy)} requests an {error}") from error


def check_signals(names: Sequence[str]) -> tuple[str, ...]:
    """The names of signals, each once. Raises ValueError on an unknown name."""
    for name in names:
        if name not in SIGNALS:
            raise ValueError(unknown_name("signal", name, list(SIGNALS)))
    return tuple(dict.fromkeys(names))


def tier(signals: Sequence[str]) -> str:
    """The tier of a policy that reads these signals: "M" (FrameMeta alone), "L" (latents) or "A" (attention)."""
    return "M" if not signals else "L" if all(name in OF_LATENTS for name in signals) else "A"


class NewestFrames:
    """Keeps the newest frames up to the budget: the baseline of all comparisons."""

    name = "recent_fill"

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the last min(n, budget) rows."""
        num_frames = len(chunk_meta_list)
        return make_plan(range(num_frames)[-int(budget_state["max_frames"]) :], num_frames)


def resolve_feedback(feedback: str | bool) -> str:
    """One of `FEEDBACK`; False and True, as YAML reads the unquoted words, stand for "generated" and "true".

    Raises:
        ValueError: on anything else.
    """
    if isinstance(feedback, bool):
        return TRUE if feedback else GENERATED
    if not isinstance(feedback, str) or feedback not in FEEDBACK:
        raise ValueError(unknown_name("feedback", str(feedback), list(FEEDBACK)))
    return feedback


def policy_name(policy: RetentionPolicy) -> str:
    """The policy's ``name`` attribute, else its class name."""
    return getattr(policy, "name", None) or type(policy).__name__


def plan_decisions(plan: Any, limit: int) -> list[Any]:
    """The first decisions of a plan, at most ``limit``. Raises ValueError if it has none to iterate over."""
    if not hasattr(plan, "chunk_decisions"):
        raise ValueError(f"returned {type(plan).__name__}, not a TemporalCachePlan with chunk_decisions")
    decisions = plan.chunk_decisions
    try:
        iterator = iter(decisions)
    except TypeError:
        raise ValueError(f"returned a plan whose chunk_decisions is {type(decisions).__name__}, not a list") from None
    return list(islice(iterator, limit))


def _short(value: Any) -> str:
    """``repr`` on one line and of bounded length, of any object."""
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:
        return f"of type {type(value).__name__}"


def _reason(error: BaseException) -> str:
    """The first line of an error's message, of bounded length."""
    try:
        return first_line(error)
    except Exception:
        return type(error).__name__
