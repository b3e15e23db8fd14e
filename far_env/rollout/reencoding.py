"""What a streaming memory loses by never encoding anything again: its frames against those from the same frames encoded anew.

Both sides have the same kept frames, full or coarse, at the same positions, and the same noise. The benchmark always encodes
again. The comparison needs policies that keep whole frames, the same in every layer and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.device import torch_defaults
from far_env.host.far import CLEAN_TIME
from far_env.host.far_long import FARLong
from far_env.host.sampler import make_scheduler
from far_env.rollout.streaming import StreamingBatch
from far_env.rollout.token_cache import COARSE, TokenCache
from far_env.rollout.token_policy import TokenPolicy
from far_env.workload import Workload


@dataclass(frozen=True)
class ReencodingGap:
    """Differences of the latents of every generated frame (rows, n_predict), each from the history of the streaming rollout.

    Attributes:
        largest: maximum of the absolute difference.
        relative: root mean square of the difference, divided by that of the frame.
    """

    largest: Tensor
    relative: Tensor


@torch_defaults()
@torch.no_grad()
def reencoding_gap(
    workload: Workload, clips: Sequence[Clip], noise_seeds: Sequence[int], policy: TokenPolicy | None, budget: int | None
) -> ReencodingGap:
    """Play streaming rollouts, and generate every frame a second time from its kept frames encoded again.

    Raises:
        ValueError: if the policy keeps parts of frames, or on a workload with labels; and as `StreamingBatch`.
    """
    if workload.labels:
        raise ValueError(f"{workload.name} has labels, with which frames are not encoded again here")
    batch = StreamingBatch(workload, clips, noise_seeds, policy, budget)
    frames = [list(given[: workload.num_context]) for given in batch.given]
    actions = [workload.actions_of(clip, workload.num_frames) for clip in clips]
    largest, relative = [], []
    for step in range(workload.num_predict):
        number = workload.num_context + step
        again = []
        for row, history in enumerate(frames):
            kept = kept_whole(batch.cache, row)
            numbers = [*(kept_number for kept_number, _ in kept), number]
            latents = torch.stack([history[i] for i in numbers[:-1]]) if kept else batch.given[row, :0]
            coarse = [is_coarse for _, is_coarse in kept]
            row_actions = [[actions[row][i] for i in numbers]] if workload.actions else None
            again.append(denoise_reencoded(workload, latents[None], coarse, batch.noise[row, step][None], row_actions)[0])
        streamed = batch.advance()
        difference = (streamed - torch.stack(again)).float().flatten(1)
        largest.append(difference.abs().amax(dim=1))
        relative.append(difference.norm(dim=1) / streamed.float().flatten(1).norm(dim=1))
        for row, history in enumerate(frames):
            history.append(batch.given[row, number] if workload.true_feedback else streamed[row])
    return ReencodingGap(torch.stack(largest, dim=1).cpu(), torch.stack(relative, dim=1).cpu())


def kept_whole(cache: TokenCache, row: int) -> list[tuple[int, bool]]:
    """Number of every frame that a row keeps, ascending, and whether it is coarse.

    Raises:
        ValueError: if it keeps parts of frames, or not the same in every layer and head.
    """
    frame, kind, weight = cache.frame[:, row], cache.kind[:, row], cache.weight[:, row]
    kept = []
    for number in cache.kept_frames(row):
        of_frame = frame == number
        coarse = bool((kind[0, 0][of_frame[0, 0]] == COARSE).any())
        size = cache.tokens_per_coarse_frame if coarse else cache.tokens_per_frame
        kinds = kind[of_frame].unique()
        if not bool((of_frame.sum(dim=-1) == size).all()) or len(kinds) > 1 or not bool((weight[of_frame] == 1).all()):
            raise ValueError(f"frame {number} is kept in part or merged; only whole frames can be encoded again")
        kept.append((number, coarse))
    return kept


@torch_defaults()
@torch.no_grad()
def denoise_reencoded(
    workload: Workload,
    kept: Tensor,
    coarse: Sequence[bool],
    noise: Tensor,
    actions: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """One new frame per row, (B, C, h, w), after kept ones, every ODE step over the whole sequence.

    Args:
        kept: clean latents (B, K, C, h, w) in time order, which is also their positions.
        coarse: which of the K are, the same in every row. Coarse frames do not attend to full ones, not even to older ones;
            full frames attend to all older frames.
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
    options = {"num_coarse": sum(coarse)} if isinstance(transformer, FARLong) else {}
    scheduler = make_scheduler(workload.num_steps, device)
    context, frame = kept[:, order], noise
    for time in scheduler.timesteps:
        sequence = torch.cat([context, frame[:, None]], dim=1)
        times = torch.full(sequence.shape[:2], CLEAN_TIME, device=device)
        times[:, -1] = time
        inputs = (sequence, times, positions, visible)
        velocity = transformer.velocity(*inputs, **options, **conditions)[:, -1]
        if workload.guidance > 1:
            # classifier-free guidance, arXiv 2207.12598; the unconditional side has the null class on every frame
            unconditional = transformer.velocity(*inputs, **options, **null)[:, -1]
            velocity = unconditional + workload.guidance * (velocity - unconditional)
        frame = scheduler.step(velocity, time, frame).prev_sample
    return frame
