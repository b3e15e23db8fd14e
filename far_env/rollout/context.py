"""The true frames that a rollout is given, as latents of the host: its context, and all others where they are fed back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.device import torch_defaults
from far_env.host.weights import Host


@torch_defaults()
def context_latents(host: Host, clips: Sequence[Clip], num_context: int) -> Tensor:
    """Scaled latents (B, num_context, C, h, w) of the first frames of clips of one source; encoded unless given as latents.

    Raises:
        ValueError: if a clip has fewer frames.
    """
    for clip in clips:
        if (available := len(clip.context(num_context))) < num_context:
            raise ValueError(f"clip {clip.clip_id} has {available} frames; a rollout needs {num_context} true ones")
    if num_context == 0:
        return torch.zeros((len(clips), 0, *host.latent_shape), device=host.device, dtype=host.dtype)
    context = torch.from_numpy(np.stack([clip.context(num_context) for clip in clips])).to(host.device, host.dtype)
    return host.autoencoder.encode(context) if clips[0].latents is None else context
