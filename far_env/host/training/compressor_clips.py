"""Clips for training a compressor: latents, the low-resolution branch's small latents of every block, and actions.

They are computed once, in chunks; a chunk that is on disk is not computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip, ClipSource
from far_env.host.compressor import encode_small, small_pictures
from far_env.host.far_host import FARHost
from far_env.progress import show_progress
from far_env.tensor_files import load_tensors, save_tensors

CHUNK = 20
"""Clips in a file."""


@dataclass(frozen=True)
class BlockClips:
    """Encoded clips of one length.

    Attributes:
        latents: float16 (N, T, C, h, w).
        small: float16 (N, T − n + 1, C, h / 2, w / 2), of the block of n frames that begins at each frame.
        actions: int64 (N, T), or None for a host without.
    """

    latents: Tensor
    small: Tensor
    actions: Tensor | None


def encode_clips(
    source: ClipSource, split: str, count: int, num_frames: int, block_frames: int, host: FARHost, actions: bool, folder: Path
) -> BlockClips:
    """The first ``count`` clips of a split, cut to ``num_frames``.

    Raises:
        ValueError: if the split has fewer clips or frames, or clips lack the actions that are needed.
    """
    if (available := source.num_clips(split)) < count:
        raise ValueError(f"{source.name} has {available} {split} clips, {count} are needed; ask for fewer")
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    parts = []
    for numbers in show_progress(chunks, description=f"encode {source.name}/{split}", unit="chunks", delay=1):
        path = folder / f"{split}_{numbers.start:05d}_{numbers.stop:05d}.pt"
        if not path.exists():
            clips = [_encoded(source.clip(split, number), num_frames, block_frames, host, actions) for number in numbers]
            keys = clips[0].keys()
            save_tensors(path, {key: torch.stack([clip[key] for clip in clips]) for key in keys})
        parts.append(load_tensors(path))
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return BlockClips(whole["latents"], whole["small"], whole.get("actions"))


def _encoded(clip: Clip, num_frames: int, block_frames: int, host: FARHost, actions: bool) -> dict[str, Tensor]:
    given = clip.context(num_frames)
    if len(given) < num_frames:
        raise ValueError(f"clip {clip.clip_id} has {len(given)} frames, {num_frames} are needed")
    latents = torch.from_numpy(given)[None].to(host.device, host.dtype)
    if clip.latents is None:
        latents = host.autoencoder.encode(latents)
    pictures = small_pictures(host.autoencoder, latents)[0]
    blocks = pictures.unfold(0, block_frames, 1).mean(dim=-1)
    encoded = {"latents": latents[0], "small": torch.cat([encode_small(host.autoencoder, part) for part in blocks.split(32)])}
    encoded = {key: value.half().cpu() for key, value in encoded.items()}
    if actions:
        if clip.actions is None:
            raise ValueError(f"the host takes actions, and clip {clip.clip_id} has none")
        encoded["actions"] = torch.from_numpy(np.asarray(clip.actions[:num_frames], np.int64))
    return encoded
