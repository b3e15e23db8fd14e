"""The executable specification of a rollout: one clip, no cache, no batch, in the order of the benchmark's description.

Any host will do: of it, encoding, decoding and one new unit from clean ones are used. With FAR a unit is a frame. Slow on
purpose. `far_env.rollout.engine` must equal it.
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
from far_env.frame_meta import frame_features, frame_meta_list
from far_env.host.protocol import as_wide_latent, join_units, split_units
from far_env.rollout.context import context_latents
from far_env.rollout.noise import workload_noise
from far_env.workload import Workload


@dataclass(frozen=True)
class Rollout:
    """The result of a finished rollout.

    Attributes:
        latents: generated latents (L, C, h, w), whatever was fed back.
        frames: the same, decoded, (n_predict, 3, H, W) in [0, 1].
        kept: per policy call, (step, true numbers of the units that stayed); those of the context are 0 … n-1.
        intervened: latents of the units that were generated from replaced histories, or None.
    """

    latents: Tensor
    frames: Tensor
    kept: list[tuple[int, list[int]]]
    intervened: Tensor | None = None


class SignalSource(Protocol):
    """Computes the signals of one rollout from the passes of `far_env.host.far_host.FARHost.generate`."""

    def generating(self) -> AbstractContextManager[None]:
        """The context in which one frame is denoised."""

    def finish(self, frame: Tensor) -> None:
        """Receives the frame (C, h, w) that was denoised."""

    def arrays(self, kept: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The signals of a history: latents (C, h, w) and their true numbers."""


MakeSignals = Callable[[Workload, Sequence[str], Tensor, int, Sequence[int]], SignalSource]
"""From the workload, the wanted names, context latents (n, C, h, w), the noise seed and the actions of all frames."""

Replaced = Callable[[Sequence[Tensor], Sequence[int], int], Sequence[Tensor]]
"""From the latents of the kept units, their true numbers and the step to as many in their place."""


@torch_defaults()
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
        ValueError: if the workload needs actions, a label or a prompt and the clip has none that fit, or is too short for
            feedback of true frames.
    """
    host, label, prompt = workload.host, workload.label_of(clip), workload.prompt_of(clip)
    actions = workload.actions_of(clip, workload.num_frames)
    num_given = workload.num_frames if workload.true_feedback else workload.num_context
    given_units = workload.units if workload.true_feedback else workload.units[: workload.context_units]
    given = split_units(host, context_latents(host, [clip], num_given)[0], given_units)
    noise = workload_noise(workload, noise_seed)
    context = given[: workload.context_units]
    kept, numbers = list(context), list(range(len(context)))
    max_units = workload.max_units(max_frames)
    generated, intervened, history = [], [], []
    wanted = wanted_signals(policy)
    signals = make_signals(workload, wanted, join_units(host, kept), noise_seed, actions) if wanted and make_signals else None
    for step in range(workload.predict_units):
        new = workload.context_units + step
        frame_actions = [actions[number] for number in [*numbers, new]] if workload.actions else []
        conditions = workload.conditions(frame_actions, label, prompt)
        with nullcontext() if signals is None else signals.generating():
            frame = host.generate(kept, noise[step], conditions)
        generated.append(frame)
        if replaced is not None:
            intervened.append(host.generate(replaced(kept, numbers, step) if kept else [], noise[step], conditions))
        kept.append(given[new] if workload.true_feedback else frame)
        numbers.append(new)
        if signals is not None:
            signals.finish(frame)
        if policy is not None and max_units < UNLIMITED_FRAMES and len(kept) > max_units:
            history_latents = torch.stack([as_wide_latent(unit, workload.most_latents) for unit in kept])
            metas = frame_meta_list(frame_features(history_latents[None])[0], step, workload.unit_sizes_mb(numbers))
            capacity_mb = workload.capacity_mb(max_units)
            state = RolloutState(step, capacity_mb, workload.predict_units)
            if signals is not None:
                state = ObservedRolloutState(step, capacity_mb, workload.predict_units, signals.arrays(kept, numbers))
            budget = {"max_frames": max_units, "capacity_mb": capacity_mb}
            ids = ask_policy(policy, metas, state, budget, clip=clip.clip_id).kept
            kept, numbers = [kept[i] for i in ids], [numbers[i] for i in ids]
            history.append((step, list(numbers)))
    latents = join_units(host, generated)
    decoded_from = [*context, *generated] if host.chunked else generated
    frames = host.decode(join_units(host, decoded_from)[None])[0][-workload.num_predict :]
    return Rollout(latents, frames, history, join_units(host, intervened) if intervened else None)
