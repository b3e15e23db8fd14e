"""The executable specification of a rollout: one clip, no cache, no batch, in the order of the benchmark's description.

Slow on purpose. `far_env.rollout.engine` must equal it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

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
    wanted_signals,
)
from far_env.device import torch_defaults
from far_env.frame_meta import frame_features, frame_meta_list, frame_size_mb
from far_env.host.far import CLEAN_TIME
from far_env.host.sampler import make_scheduler
from far_env.rollout.context import context_latents
from far_env.rollout.noise import workload_noise
from far_env.workloads import Workload


@dataclass(frozen=True)
class Rollout:
    """The result of a finished rollout.

    Attributes:
        latents: generated latents (n_predict, C, h, w), whatever was fed back.
        frames: the same, decoded, (n_predict, 3, H, W) in [0, 1].
        kept: per policy call, (step, true frame numbers that stayed); context frames are 0 … n_context-1.
        intervened: latents of the frames that were generated from replaced histories, or None.
    """

    latents: Tensor
    frames: Tensor
    kept: list[tuple[int, list[int]]]
    intervened: Tensor | None = None


class SignalSource(Protocol):
    """Computes the signals of one rollout from the passes of `denoise_uncached`."""

    def generating(self) -> AbstractContextManager[None]:
        """The context in which one frame is denoised."""

    def finish(self, frame: Tensor) -> None:
        """Receives the frame (C, h, w) that was denoised."""

    def arrays(self, kept: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The signals of a history: latents (C, h, w) and their true numbers."""


MakeSignals = Callable[[Workload, Sequence[str], Tensor, int, Sequence[int]], SignalSource]
"""From the workload, the wanted names, context latents (n, C, h, w), the noise seed and the actions of all frames."""

Replaced = Callable[[Sequence[Tensor], Sequence[int], int], Sequence[Tensor]]
"""From the kept latents (C, h, w), their true numbers and the step to as many latents in their place."""


@torch.no_grad()
def reference_rollout(
    workload: Workload,
    clip: Clip,
    policy: RetentionPolicy | None,
    max_frames: int,
    noise_seed: int,
    make_signals: MakeSignals | None = None,
    replaced: Replaced | None = None,
) -> Rollout:
    """Generate the clip's continuation under a policy; ``policy`` None or a budget of 9999 keeps everything.

    With feedback of true frames, the encoded true frame enters the history after each generated one.

    Args:
        make_signals: computes what the policy declares as ``signals``; without, it receives a plain `RolloutState`, as from
            the benchmark.
        replaced: an intervention on the memory: from each history a frame is generated that enters no history.

    Raises:
        PolicyError: if the policy raises or answers an invalid plan.
        ValueError: if the workload needs actions and the clip has none that fit, or is too short for feedback of true frames.
    """
    host, label = workload.host, workload.label_of(clip)
    actions = workload.actions_of(clip, workload.num_frames)
    given = context_latents(host, [clip], workload.num_frames if workload.true_feedback else workload.num_context)[0]
    noise = workload_noise(workload, noise_seed, workload.num_predict)
    kept = list(given[: workload.num_context])
    numbers = list(range(workload.num_context))
    generated, intervened, history = [], [], []
    wanted = wanted_signals(policy)
    signals = make_signals(workload, wanted, given[: len(kept)], noise_seed, actions) if wanted and make_signals else None
    for step in range(workload.num_predict):
        new = workload.num_context + step
        frame_actions = [actions[number] for number in [*numbers, new]] if workload.actions else None
        with nullcontext() if signals is None else signals.generating():
            frames = torch.stack(kept) if kept else given[:0]
            frame = denoise_uncached(workload, frames, noise[step], frame_actions, label)
        generated.append(frame)
        if replaced is not None:
            others = torch.stack(replaced(kept, numbers, step)) if kept else given[:0]
            intervened.append(denoise_uncached(workload, others, noise[step], frame_actions, label))
        kept.append(given[new] if workload.true_feedback else frame)
        numbers.append(new)
        if signals is not None:
            signals.finish(frame)
        if policy is not None and max_frames < UNLIMITED_FRAMES and len(kept) > max_frames:
            metas = frame_meta_list(frame_features(torch.stack(kept)[None])[0], step, frame_size_mb(host.latent_shape))
            capacity_mb = workload.capacity_mb(max_frames)
            state = RolloutState(step, capacity_mb, workload.num_predict)
            if signals is not None:
                state = ObservedRolloutState(step, capacity_mb, workload.num_predict, signals.arrays(kept, numbers))
            budget = {"max_frames": max_frames, "capacity_mb": capacity_mb}
            ids = ask_policy(policy, metas, state, budget, clip=clip.clip_id).kept
            kept, numbers = [kept[i] for i in ids], [numbers[i] for i in ids]
            history.append((step, list(numbers)))
    latents = torch.stack(generated)
    with torch_defaults():
        frames = host.autoencoder.decode(latents[None])[0]
    return Rollout(latents, frames, history, torch.stack(intervened) if intervened else None)


@torch_defaults()
@torch.no_grad()
def denoise_uncached(
    workload: Workload, kept: Tensor, noise: Tensor, actions: Sequence[int] | None = None, label: int | None = None
) -> Tensor:
    """One new frame (C, h, w) after the kept ones (K, C, h, w), every ODE step over the whole sequence.

    Args:
        actions: of the kept frames and the new one, K + 1.
        label: of the clip. Without actions and label, the null class is on all frames.
    """
    transformer = workload.host.transformer
    null = transformer.null_conditions(1, len(kept) + 1, noise.device)
    conditions = null
    if actions is not None:
        conditions = {"action": torch.tensor([actions], device=noise.device)}
    elif label is not None:
        conditions = {"label": torch.tensor([label], device=noise.device)}
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
