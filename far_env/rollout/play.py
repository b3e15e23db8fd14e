"""Whole rollouts of clips under a policy, or under decisions that were made before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

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
from far_env.errors import PolicyError
from far_env.frame_meta import frame_meta_list
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.history_memory import check_histories_fit
from far_env.rollout.memo import FrameMemo
from far_env.workload import Workload

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
    policy: RetentionPolicy | list[RetentionPolicy | None] | None,
    max_frames: int | Sequence[int],
    *,
    strict: bool = True,
    memo: FrameMemo | None = None,
    on_frame: Callable[[int], None] | None = None,
    before_frame: BeforeFrame | None = None,
    failures: dict[int, str] | None = None,
) -> tuple[RolloutBatch, list[list[Decision]]]:
    """Roll every clip out under the policy, all in one batch.

    Each clip gets a copy of the policy (`copy_for_clip`). The policy is asked only where its answer can still influence
    a frame. A policy that declares ``signals`` receives them in an `ObservedRolloutState`.

    Args:
        policy: None keeps everything, as does a budget of 9999. A list has one for each clip, which request the same signals.
        max_frames: the budget, or one for each clip.
        strict: refuse malformed plans, see `far_env.contract.ask_policy`.
        memo: holds frames of earlier rollouts, and receives those of this one.
        on_frame: called with the number of frames that each batched step adds to all rows together.
        before_frame: called before each batched step.
        failures: receives why a policy fails, under all its rows with that budget. These stop, and the others go on. None
            raises the error.

    Returns:
        The rollouts, one row per clip, finished unless they have failed, and each row's decisions.

    Raises:
        PolicyError: if the policy raises or answers an invalid plan, unless there are ``failures``; if it requests an unknown
            signal, or one that is not recorded with this workload and host.
        ValueError: if the histories need more memory than is free, or if policies request different signals.
    """
    policies = policy if isinstance(policy, list | tuple) else [policy] * len(clips)
    budgets = [int(max_frames)] * len(clips) if isinstance(max_frames, Integral) else list(max_frames)
    if not len(clips) == len(noise_seeds) == len(policies) == len(budgets):
        counts = f"{len(clips)} clips, {len(noise_seeds)} noise seeds, {len(policies)} policies and {len(budgets)} budgets"
        raise ValueError(f"a rollout needs a noise seed, a policy and a budget for every clip, got {counts}")
    limited = [is_limited(workload, *row) for row in zip(policies, budgets, strict=True)]
    budgets = [workload.max_units(budget) for budget in budgets]
    requests = {wanted_signals(policy) for policy, cut in zip(policies, limited, strict=True) if cut} or {()}
    if len(requests) > 1:
        raise ValueError(f"policies of one batch must request the same signals, got {' and '.join(map(str, sorted(requests)))}")
    [wanted] = requests
    last = workload.num_frames - 1
    check_histories_fit(
        workload,
        [max(workload.num_context, min(n, last)) if cut else last for n, cut in zip(budgets, limited, strict=True)],
    )
    batch = RolloutBatch(workload, len(clips), memo, wanted)
    rows = range(len(clips))
    batch.begin(rows, clips, noise_seeds)
    decisions: list[list[Decision]] = [[] for _ in rows]
    stopped: dict[int, str] = {} if failures is None else failures

    def stop(row: int, error: PolicyError) -> None:
        if failures is None:
            raise error
        alike = [i for i in rows if policies[i] is policies[row] and budgets[i] == budgets[row]]
        # The error itself would keep the frames of its traceback alive, and with them the batch and processes of policies.
        stopped.update(dict.fromkeys(alike, str(error)))

    copies: list[RetentionPolicy | None] = []
    for row, seed in enumerate(noise_seeds):
        try:
            copies.append(None if row in stopped else copy_for_clip(policies[row], seed))
        except PolicyError as error:
            copies.append(None)
            stop(row, error)
    while active := [row for row in rows if row not in stopped and not batch.finished(row)]:
        _advance(batch, active, on_frame, before_frame)
        full = [row for row in active if limited[row] and batch.history_length(row) > budgets[row] and not batch.finished(row)]
        if not full:
            continue
        features = torch.from_numpy(batch.features(full))
        signals = batch.signals(full) if wanted else [None] * len(full)
        for row, *observed in zip(full, features, signals, strict=True):
            if row in stopped:
                continue
            try:
                decisions[row].append(_decide(batch, row, copies[row], budgets[row], *observed, clips[row].clip_id, strict))
            except PolicyError as error:
                stop(row, error)
    return batch, decisions


def is_limited(workload: Workload, policy: RetentionPolicy | None, max_frames: int) -> bool:
    """Whether the policy is ever asked: full history drops nothing."""
    return policy is not None and workload.max_units(max_frames) < UNLIMITED_FRAMES


def _decide(
    batch: RolloutBatch,
    row: int,
    policy: RetentionPolicy,
    max_frames: int,
    features: Tensor,
    signals: Mapping[str, np.ndarray] | None,
    clip_id: int,
    strict: bool,
) -> Decision:
    """Ask the policy about the history of a row, and cut it down; ``features`` are (K', 4), padded at the end if K' > K."""
    workload, step, numbers = batch.workload, batch.step(row) - 1, batch.frame_numbers(row)
    metas = frame_meta_list(features[: len(numbers)], step, workload.unit_sizes_mb(numbers))
    capacity = workload.capacity_mb(max_frames)
    state = RolloutState(step, capacity, workload.predict_units)
    if signals is not None:
        state = ObservedRolloutState(step, capacity, workload.predict_units, signals)
    budget = {"max_frames": max_frames, "capacity_mb": capacity}
    answer = ask_policy(policy, metas, state, budget, clip=clip_id, strict=strict)
    batch.retain(row, answer.kept)
    return Decision(step, tuple(batch.frame_numbers(row)), tuple(numbers[i] for i in answer.demoted), answer.seconds)


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
