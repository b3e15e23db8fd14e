"""The true frames that a rollout is given, as latents of the host: its context, and all others where they are fed back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.device import torch_defaults, upload
from far_env.host.protocol import Host, as_wide_latent, split_units
from far_env.workload import Workload


@torch_defaults()
def context_latents(host: Host, clips: Sequence[Clip], num_context: int) -> Tensor:
    """Latents (B, L, C, h, w) of the first frames of clips of one source; encoded unless given as latents.

    L = num_context unless the host is chunked.

    Raises:
        ValueError: if a clip has fewer frames, or latents where the host is chunked.
    """
    for clip in clips:
        if (available := len(clip.context(num_context))) < num_context:
            raise ValueError(f"clip {clip.clip_id} has {available} frames; a rollout needs {num_context} true ones")
    if host.chunked and any(clip.latents is not None for clip in clips):
        raise ValueError(f"host {host.name} encodes frames together, so it takes no clips that were encoded frame by frame")
    if num_context == 0:
        return torch.zeros((len(clips), 0, *host.latent_shape), device=host.device, dtype=host.dtype)
    context = upload(torch.from_numpy(np.stack([clip.context(num_context) for clip in clips])), host.device, host.dtype)
    return host.encode(context) if clips[0].latents is None else context


@torch_defaults()
@torch.no_grad()
def true_units(workload: Workload, clips: Sequence[Clip]) -> Tensor:
    """Latents (B, K, C, h, w) of all true units of clips, encoded from their frames, in the form of a history.

    A chunk is one wide latent, see `far_env.host.protocol.as_wide_latent`.
    """
    host = workload.host
    frames = torch.from_numpy(np.stack([clip.frames[: workload.num_frames] for clip in clips]))
    latents = host.encode(upload(frames, host.device, host.dtype))
    if not host.chunked:
        return latents
    wide = [[as_wide_latent(unit, workload.most_latents) for unit in split_units(host, row, workload.units)] for row in latents]
    return torch.stack([torch.stack(units) for units in wide])
