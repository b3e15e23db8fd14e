"""Whole rollouts of clips under a policy, or under decisions that were made before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch

from far_env.clips.clip import Clip
from far_env.contract import (
    UNLIMITED_FRAMES,
    ObservedRolloutState,
    RetentionPolicy,
    RolloutState,
    ask_policy,
    copy_for_clip,
    wanted_signals,
)
from far_env.frame_meta import frame_meta_list
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.history_memory import check_histories_fit
from far_env.rollout.memo import FrameMemo
from far_env.workloads import Workload

BeforeFrame = Callable[[RolloutBatch, Sequence[int]], None]
"""Receives the batch and the rows whose next frame is about to be generated."""


@dataclass(frozen=True)
class Decision:
    """One answer of a policy, in true numbers of frames, or of chunks where a host generates these (the context comes first).

    Attributes:
        step: the number of the predicted frame that was generated last.
        kept: frames that stayed, demoted ones included.
        demoted: those of them that the plan demoted.
        seconds: duration of the policy's method.
    """

    step: int
    kept: tuple[int, ...]
    demoted: tuple[int, ...] = ()
    seconds: float = field(default=0.0, compare=False)


@torch.no_grad()
def play(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    policy: RetentionPolicy | None,
    max_frames: int | Sequence[int],
    *,
    strict: bool = True,
    memo: FrameMemo | None = None,
    on_frame: Callable[[int], None] | None = None,
    before_frame: BeforeFrame | None = None,
) -> tuple[RolloutBatch, list[list[Decision]]]:
    """Roll every clip out under the policy, all in one batch.

    Each clip gets a copy of the policy (`copy_for_clip`). The policy is asked only where its answer can still influence
    a frame. A policy that declares ``signals`` receives them in an `ObservedRolloutState`.

    Args:
        policy: None keeps everything, as does a budget of 9999.
        max_frames: the budget, or one for each clip.
        strict: refuse malformed plans, see `far_env.contract.ask_policy`.
        memo: holds frames of earlier rollouts, and receives those of this one.
        on_frame: called with the number of frames that each batched step adds to all rows together.
        before_frame: called before each batched step.

    Returns:
        The finished rollouts, one row per clip, and each row's decisions.

    Raises:
        PolicyError: if the policy raises, answers an invalid plan or requests an unknown signal.
        ValueError: if the histories need more memory than is free.
    """
    budgets = [int(max_frames)] * len(clips) if isinstance(max_frames, Integral) else list(max_frames)
    if not len(clips) == len(noise_seeds) == len(budgets):
        counts = f"{len(clips)} clips, {len(noise_seeds)} noise seeds and {len(budgets)} budgets"
        raise ValueError(f"a rollout needs a noise seed and a budget for every clip, got {counts}")
    budgets = [workload.max_units(budget) for budget in budgets]
    limited = [policy is not None and budget < UNLIMITED_FRAMES for budget in budgets]
    wanted = wanted_signals(policy) if any(limited) else ()
    last = workload.num_frames - 1
    check_histories_fit(
        workload,
        [max(workload.num_context, min(n, last)) if cut else last for n, cut in zip(budgets, limited, strict=True)],
    )
    batch = RolloutBatch(workload, len(clips), memo, wanted)
    rows = range(len(clips))
    batch.begin(rows, clips, noise_seeds)
    decisions: list[list[Decision]] = [[] for _ in rows]
    policies = [copy_for_clip(policy, seed) for seed in noise_seeds]
    while active := [row for row in rows if not batch.finished(row)]:
        _advance(batch, active, on_frame, before_frame)
        full = [row for row in active if limited[row] and batch.history_length(row) > budgets[row] and not batch.finished(row)]
        if not full:
            continue
        features = torch.from_numpy(batch.features(full))
        signals = batch.signals(full) if wanted else [None] * len(full)
        for row, row_features, row_signals in zip(full, features, signals, strict=True):
            step = batch.step(row) - 1
            sizes_mb = workload.unit_sizes_mb(batch.frame_numbers(row))
            metas = frame_meta_list(row_features[: batch.history_length(row)], step, sizes_mb)
            capacity = workload.capacity_mb(budgets[row])
            state = RolloutState(step, capacity, workload.predict_units)
            if row_signals is not None:
                state = ObservedRolloutState(step, capacity, workload.predict_units, row_signals)
            budget = {"max_frames": budgets[row], "capacity_mb": capacity}
            answer = ask_policy(policies[row], metas, state, budget, clip=clips[row].clip_id, strict=strict)
            numbers = batch.frame_numbers(row)
            demoted = tuple(numbers[i] for i in answer.demoted)
            batch.retain(row, answer.kept)
            decisions[row].append(Decision(step, tuple(batch.frame_numbers(row)), demoted, answer.seconds))
    return batch, decisions


@torch.no_grad()
def replay(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    histories: Sequence[Mapping[int, Sequence[int]]],
    *,
    memo: FrameMemo | None = None,
    on_frame: Callable[[int], None] | None = None,
    before_frame: BeforeFrame | None = None,
) -> RolloutBatch:
    """Roll every clip out under decisions that were made before, all in one batch.

    Args:
        histories: per clip, step → true numbers of the frames that stayed; each must be in the history then.
        memo, on_frame, before_frame: as in `play`.
    """
    batch = RolloutBatch(workload, len(clips), memo)
    rows = range(len(clips))
    batch.begin(rows, clips, noise_seeds)
    while active := [row for row in rows if not batch.finished(row)]:
        _advance(batch, active, on_frame, before_frame)
        for row in active:
            kept = histories[row].get(batch.step(row) - 1)
            if kept is not None:
                batch.retain(row, [place for place, number in enumerate(batch.frame_numbers(row)) if number in kept])
    return batch


def _advance(
    batch: RolloutBatch, rows: Sequence[int], on_frame: Callable[[int], None] | None, before_frame: BeforeFrame | None
) -> None:
    """The next frame of each row; on a CPU, rows of one history length at a time.

    Then no row is padded, and its latents are the same to the last bit whatever the batch, at up to a tenth more time where a
    policy keeps varying numbers of frames. On a GPU sums depend on the size of the batch in any case.
    """
    on_cpu = batch.workload.host.device.type == "cpu"
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(batch.history_length(row) if on_cpu else 0, []).append(row)
    for alike in groups.values():
        if before_frame is not None:
            before_frame(batch, alike)
        batch.advance(alike)
    if on_frame is not None:
        frames = batch.workload.predicted_frames
        on_frame(sum(frames(batch.step(row)) - frames(batch.step(row) - 1) for row in rows))
