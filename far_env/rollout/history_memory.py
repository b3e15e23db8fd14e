"""What the keys and values of histories take, and a refusal before the first frame where that cannot fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from far_env.device import free_bytes
from far_env.host.far_host import FARHost, require_far
from far_env.workload import Workload


def history_bytes(workload: Workload, num_frames: int) -> int:
    """Bytes of keys and values of a history of ``num_frames`` frames of one rollout while the next frame is generated.

    They are there twice: kept frame by frame, and put together with those of the new frame. 2 (keys and values) × layers ×
    heads × head dimension × tokens × bytes of a number; with guidance for two classes. FAR-Long's oldest frames have fewer
    tokens.

    Raises:
        ValueError: if the host is not a FAR, which alone has them.
    """
    host = require_far(workload.host, "the memory of a history")
    latent = torch.empty(1, *host.latent_shape, device="meta", dtype=host.dtype)
    kept = sum(host.transformer.token_counts(num_frames, latent))
    tokens = 2 * kept + host.transformer.tokens_per_frame(latent)
    _, _, heads, dim = host.transformer.layer_shape(1, 1)
    branches = 2 if workload.guidance > 1 else 1
    return 2 * len(host.transformer.transformer_blocks) * heads * dim * branches * tokens * host.dtype.itemsize


def check_histories_fit(workload: Workload, lengths: Sequence[int]) -> None:
    """Raise ValueError if histories of these many frames, one per rollout, need more memory than the device has free.

    Hosts other than FAR are not checked: what they need is theirs to know.
    """
    if not isinstance(workload.host, FARHost):
        return
    longest = max(lengths)
    needed, free = sum(history_bytes(workload, length) for length in lengths), free_bytes(workload.host.device)
    if free is not None and needed > free:
        raise ValueError(
            f"{workload.name}: keys and values of a history of {longest} frames of {workload.host.name} need "
            f"{history_bytes(workload, longest) / 2**30:.2f} GiB, of all {len(lengths)} rollouts {needed / 2**30:.2f} GiB, "
            f"and {free / 2**30:.2f} GiB are free: use a smaller batch, a smaller budget or bfloat16"
        )
