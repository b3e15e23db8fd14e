"""Extended rollouts, outside the benchmark: a demoted frame stays as FAR-Long's few coarse tokens, under a budget of tokens.

In the benchmark "demote_to_long_term" has the effect of keep. Here the frame stays at its coarse resolution (arXiv 2503.19325,
§3.3), so that a history of the same number of tokens can reach further back. Exact rather than fast: every ODE step passes the
whole history, nothing is cached.

Rules that differ from the benchmark's:

- The budget is a number of tokens and holds for every generated frame: a policy is asked before a frame is generated from a
  history of more tokens, hence also before the first one (``step`` −1), if the context is too long.
- Which frames are coarse is the policy's choice alone. A frame that was not demoted is fine however old it is, beyond the
  window that the host was trained with too; a demoted one may be anywhere, and stays coarse until it is dropped.
- The newest frame always stays and is always fine; a plan that demotes it keeps it.
- If a plan leaves more tokens than the budget, the oldest frames are dropped, coarse or fine, until the rest fits.
- FAR-Long's coarse frames do not attend to fine ones, not even to older ones; fine frames attend to all older frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import FrameMeta, RetentionPolicy, RolloutState, ask_policy, copy_for_clip
from far_env.device import torch_defaults
from far_env.frame_meta import frame_features, frame_meta_list, frame_size_mb
from far_env.host.far import CLEAN_TIME
from far_env.host.far_long import FARLong
from far_env.host.sampler import make_scheduler
from far_env.host.weights import Host
from far_env.rollout.context import context_latents
from far_env.rollout.noise import rollout_noise
from far_env.workloads import Workload

COARSE = "coarse"
"""The ``compression_state`` of a demoted frame."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one fine and of one coarse frame."""

    fine: int
    coarse: int

    def of(self, coarse: Sequence[bool]) -> int:
        """Tokens of a history whose frames are coarse or not."""
        return sum(self.coarse if is_coarse else self.fine for is_coarse in coarse)


@dataclass(frozen=True)
class ExtendedDecision:
    """The history after one answer of a policy, in true frame numbers (context frames come first).

    Attributes:
        step: the frame generated last; −1 before the first.
        fine, coarse: frames that stayed, by resolution.
        tokens: theirs together.
        seconds: how long the policy took.
    """

    step: int
    fine: tuple[int, ...]
    coarse: tuple[int, ...]
    tokens: int
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class ExtendedRollout:
    """The result of a finished rollout.

    Attributes:
        latents: generated latents (n_predict, C, h, w).
        tokens: number of tokens of the history that each generated frame was conditioned on.
        decisions: in the order they were made.
    """

    latents: Tensor
    tokens: list[int]
    decisions: list[ExtendedDecision]


@dataclass
class _Row:
    """One unfinished rollout: its history's latents, true numbers and resolutions, in time order."""

    policy: RetentionPolicy | None
    actions: tuple[int, ...]
    noise: Tensor
    frames: list[Tensor]
    numbers: list[int]
    coarse: list[bool]
    generated: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    decisions: list[ExtendedDecision] = field(default_factory=list)


@torch_defaults()
def token_counts(host: Host) -> TokenCounts:
    """Tokens of the host's frames.

    Raises:
        ValueError: if the host is not a FAR-Long, which alone has coarse frames.
    """
    if not isinstance(host.transformer, FARLong):
        raise ValueError(f"host {host.name} has no coarse frames; extended rollouts need a FAR-Long, such as far_b_long_dmlab")
    like = torch.empty(host.latent_shape)
    return TokenCounts(host.transformer.tokens_per_frame(like), host.transformer.tokens_per_frame(like, True))


def check_token_budget(host: Host, token_budget: int) -> TokenCounts:
    """`token_counts`, if the budget holds the newest frame. Raises ValueError otherwise."""
    counts = token_counts(host)
    if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < counts.fine:
        raise ValueError(
            f"the token budget must be a whole number and hold the newest frame, which has {counts.fine} tokens on host "
            f"{host.name}; got {token_budget!r}"
        )
    return counts


@torch.no_grad()
def play_extended(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    policy: RetentionPolicy,
    token_budget: int,
    *,
    on_frame: Callable[[int], None] | None = None,
) -> list[ExtendedRollout]:
    """Roll every clip out under the policy and a budget of tokens, rollouts with equal histories in one batch.

    Each clip gets a copy of the policy (`copy_for_clip`). It is asked with the benchmark's rows, in which coarse frames
    have ``long_term_resident`` True, ``compression_state`` "coarse" and the ``size_mb`` that is their share of tokens; the
    features are those of the latents, whatever the resolution. ``budget_state`` has, besides max_frames (whole fine frames that
    fit) and capacity_mb, the numbers token_budget, tokens_per_fine_frame and tokens_per_coarse_frame. Signals are not
    recorded.

    Args:
        token_budget: of the history, without the frame that is being generated.
        on_frame: called with the number of frames generated by each batched step.

    Raises:
        ValueError: if the host is not a FAR-Long, the budget cannot hold a frame, clips and seeds differ in number, or the
            workload feeds back true frames or gives none.
        PolicyError: if the policy raises or answers an invalid plan.
    """
    counts = check_token_budget(workload.host, token_budget)
    if workload.true_feedback:
        raise ValueError(f"extended rollouts feed back generated frames alone; {workload.name} was made with true ones")
    if workload.num_context == 0:
        raise ValueError(f"extended rollouts need given frames; {workload.name} generates videos from nothing")
    if len(clips) != len(noise_seeds):
        raise ValueError(
            f"a rollout needs a noise seed for every clip, got {len(clips)} clips and {len(noise_seeds)} noise seeds"
        )
    rows = [_begin(workload, clip, seed, policy) for clip, seed in zip(clips, noise_seeds, strict=True)]
    for step in range(workload.num_predict):
        by_resolutions: dict[tuple[bool, ...], list[_Row]] = {}
        for row, clip in zip(rows, clips, strict=True):
            if counts.of(row.coarse) > token_budget:
                _decide(workload, row, clip, step - 1, counts, token_budget)
            row.tokens.append(counts.of(row.coarse))
            by_resolutions.setdefault(tuple(row.coarse), []).append(row)
        for coarse, group in by_resolutions.items():
            kept, noise = (
                torch.stack([torch.stack(row.frames) for row in group]),
                torch.stack([row.noise[step] for row in group]),
            )
            new = workload.num_context + step
            actions = [[row.actions[number] for number in (*row.numbers, new)] for row in group] if workload.actions else None
            for row, frame in zip(group, denoise_extended(workload, kept, coarse, noise, actions), strict=True):
                row.generated.append(frame)
                row.frames.append(frame)
                row.numbers.append(new)
                row.coarse.append(False)
            if on_frame is not None:
                on_frame(len(group))
    return [ExtendedRollout(torch.stack(row.generated), row.tokens, row.decisions) for row in rows]


@torch_defaults()
@torch.no_grad()
def denoise_extended(
    workload: Workload,
    kept: Tensor,
    coarse: Sequence[bool],
    noise: Tensor,
    actions: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """One new frame per row, (B, C, h, w), after kept ones, some of them coarse.

    Args:
        kept: clean latents (B, K, C, h, w) in time order, which is also their positions.
        coarse: which of the K are, the same in every row.
        noise: (B, C, h, w).
        actions: of the kept frames and the new one, (B, K + 1); None for the null class on all of them.
    """
    transformer, device = workload.host.transformer, noise.device
    batch, num_kept = kept.shape[:2]
    # FAR-Long takes coarse frames first; their positions give their place in time.
    order = sorted(range(num_kept), key=lambda i: not coarse[i])
    positions = torch.tensor([*order, num_kept], device=device)
    visible = positions[None, :] <= positions[:, None]
    null = transformer.null_conditions(batch, num_kept + 1, device)
    conditions = null if actions is None else {"action": torch.tensor(actions, device=device)[:, positions]}
    scheduler = make_scheduler(workload.num_steps, device)
    context, frame = kept[:, order], noise
    for time in scheduler.timesteps:
        sequence = torch.cat([context, frame[:, None]], dim=1)
        times = torch.full(sequence.shape[:2], CLEAN_TIME, device=device)
        times[:, -1] = time
        inputs = (sequence, times, positions, visible)
        velocity = transformer.velocity(*inputs, num_coarse=sum(coarse), **conditions)[:, -1]
        if workload.guidance > 1:
            # classifier-free guidance, arXiv 2207.12598; the unconditional side has the null class on every frame
            unconditional = transformer.velocity(*inputs, num_coarse=sum(coarse), **null)[:, -1]
            velocity = unconditional + workload.guidance * (velocity - unconditional)
        frame = scheduler.step(velocity, time, frame).prev_sample
    return frame


def _begin(workload: Workload, clip: Clip, noise_seed: int, policy: RetentionPolicy) -> _Row:
    host, num_context = workload.host, workload.num_context
    return _Row(
        copy_for_clip(policy, noise_seed),
        workload.actions_of(clip, workload.num_frames),
        rollout_noise(noise_seed, workload.num_predict, host.latent_shape).to(host.device, host.dtype),
        list(context_latents(host, [clip], num_context)[0]),
        list(range(num_context)),
        [False] * num_context,
    )


def _decide(workload: Workload, row: _Row, clip: Clip, step: int, counts: TokenCounts, token_budget: int) -> None:
    """Ask the row's policy and cut its history down."""
    size_mb = frame_size_mb(workload.host.latent_shape)
    rows = frame_meta_list(frame_features(torch.stack(row.frames)[None])[0], step, size_mb)
    metas = [_coarse_meta(meta, counts) if coarse else meta for meta, coarse in zip(rows, row.coarse, strict=True)]
    capacity = token_budget / counts.fine * size_mb
    budget = {
        "max_frames": token_budget // counts.fine,
        "capacity_mb": capacity,
        "token_budget": token_budget,
        "tokens_per_fine_frame": counts.fine,
        "tokens_per_coarse_frame": counts.coarse,
    }
    state = RolloutState(step, capacity, workload.num_predict)
    answer = ask_policy(row.policy, metas, state, budget, clip=clip.clip_id, max_kept=len(metas))
    newest, demoted = len(metas) - 1, set(answer.demoted)
    coarse = {i: row.coarse[i] or (i in demoted and i != newest) for i in answer.kept}
    kept = list(answer.kept)
    while counts.of([coarse[i] for i in kept]) > token_budget:
        del kept[0]
    row.frames, row.numbers = [row.frames[i] for i in kept], [row.numbers[i] for i in kept]
    row.coarse = [coarse[i] for i in kept]
    by_resolution = [
        tuple(number for number, is_coarse in zip(row.numbers, row.coarse, strict=True) if is_coarse is wanted)
        for wanted in (False, True)
    ]
    row.decisions.append(ExtendedDecision(step, *by_resolution, counts.of(row.coarse), answer.seconds))


def _coarse_meta(meta: FrameMeta, counts: TokenCounts) -> FrameMeta:
    size_mb = meta.size_mb * counts.coarse / counts.fine
    return replace(meta, long_term_resident=True, compression_state=COARSE, size_mb=size_mb)
