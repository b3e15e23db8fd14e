"""The context of a rollout: the true frames it begins with, as latents of the host."""

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
    """Scaled latents (B, num_context, C, h, w) of the first frames of clips of one source; encoded unless given as latents."""
    context = torch.from_numpy(np.stack([clip.context(num_context) for clip in clips])).to(host.device, host.dtype)
    return host.autoencoder.encode(context) if clips[0].latents is None else context
