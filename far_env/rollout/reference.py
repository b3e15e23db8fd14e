"""The executable specification of a rollout: one clip, no cache, no batch, in the order of the benchmark's own sentences.

Slow on purpose. `far_env.rollout.engine` must equal it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import (
    UNLIMITED_FRAMES,
    ObservedRolloutState,
    RetentionPolicy,
    RolloutState,
    ask_policy,
    wanted_signals,
)
from far_env.device import torch_defaults
from far_env.frame_meta import frame_features, frame_meta_list, frame_size_mb
from far_env.host.far import CLEAN_TIME
from far_env.host.sampler import make_scheduler
from far_env.rollout.context import context_latents
from far_env.rollout.noise import rollout_noise
from far_env.rollout.reference_signals import ReferenceSignals
from far_env.workloads import Workload


@dataclass(frozen=True)
class Rollout:
    """What a finished rollout leaves.

    Attributes:
        latents: generated latents (n_predict, C, h, w).
        frames: the same, decoded, (n_predict, 3, H, W) in [0, 1].
        kept: per policy call, (step, true frame numbers that stayed); context frames are 0 … n_context-1.
    """

    latents: Tensor
    frames: Tensor
    kept: list[tuple[int, list[int]]]


@torch.no_grad()
def reference_rollout(
    workload: Workload, clip: Clip, policy: RetentionPolicy | None, max_frames: int, noise_seed: int
) -> Rollout:
    """Generate the clip's continuation under a policy; ``policy`` None or a budget of 9999 keeps everything.

    Raises:
        PolicyError: if the policy raises or answers an invalid plan.
        ValueError: if the workload needs actions and the clip has none that fit.
    """
    host = workload.host
    actions = workload.actions_of(clip, workload.num_frames)
    noise = rollout_noise(noise_seed, workload.num_predict, host.latent_shape).to(host.device, host.dtype)
    kept = list(context_latents(host, [clip], workload.num_context)[0])
    numbers = list(range(workload.num_context))
    generated, history = [], []
    wanted = wanted_signals(policy)
    plain = ReferenceSignals(workload, wanted, torch.stack(kept), noise_seed, actions) if wanted else None
    for step in range(workload.num_predict):
        new = workload.num_context + step
        own_actions = [actions[number] for number in [*numbers, new]] if workload.actions else None
        with contextlib.nullcontext() if plain is None else plain.watching():
            frame = denoise_uncached(workload, torch.stack(kept), noise[step], own_actions)
        generated.append(frame)
        kept.append(frame)
        numbers.append(new)
        if plain is not None:
            plain.finish(frame)
        if policy is not None and max_frames < UNLIMITED_FRAMES and len(kept) > max_frames:
            metas = frame_meta_list(frame_features(torch.stack(kept)[None])[0], step, frame_size_mb(host.latent_shape))
            place = (step, workload.capacity_mb(max_frames), workload.num_predict)
            state = RolloutState(*place) if plain is None else ObservedRolloutState(*place, plain.arrays(kept, numbers))
            budget = {"max_frames": max_frames, "capacity_mb": workload.capacity_mb(max_frames)}
            ids = ask_policy(policy, metas, state, budget, clip=clip.clip_id).kept
            kept, numbers = [kept[i] for i in ids], [numbers[i] for i in ids]
            history.append((step, list(numbers)))
    latents = torch.stack(generated)
    with torch_defaults():
        frames = host.autoencoder.decode(latents[None])[0]
    return Rollout(latents, frames, history)


@torch_defaults()
@torch.no_grad()
def denoise_uncached(workload: Workload, kept: Tensor, noise: Tensor, actions: Sequence[int] | None = None) -> Tensor:
    """One new frame (C, h, w) after the kept ones (K, C, h, w), every ODE step over the whole sequence.

    Args:
        actions: of the kept frames and the new one, K + 1; None for the null class on all of them.
    """
    transformer = workload.host.transformer
    null = transformer.null_conditions(1, len(kept) + 1, noise.device)
    conditions = null if actions is None else {"action": torch.tensor([actions], device=noise.device)}
    scheduler = make_scheduler(workload.num_steps, noise.device)
    frame = noise
    for time in scheduler.timesteps:
        sequence = torch.cat([kept, frame[None]])[None]
        times = torch.full(sequence.shape[:2], CLEAN_TIME, device=noise.device)
        times[:, -1] = time
        velocity = transformer(sequence, times, **conditions)[0, -1]
        if workload.guidance > 1:
            # classifier-free guidance, arXiv 2207.12598; the unconditional side has the null class on every frame
            unconditional = transformer(sequence, times, **null)[0, -1]
            velocity = unconditional + workload.guidance * (velocity - unconditional)
        frame = scheduler.step(velocity, time, frame).prev_sample
    return frame
