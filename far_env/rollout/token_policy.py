"""What decides which entries of a streaming rollout stay: the protocol, and the check of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from far_env.rollout.token_cache import CacheView


@runtime_checkable
class TokenPolicy(Protocol):
    """Decides which entries stay. It is copied for every batch and asked for all rows, layers and heads at once.

    It may also have these attributes:

    - ``attention_frames``: of how many of the newest frames it reads received attention; 0 by default, for none.
    - ``query_moments``: whether it reads moments of queries; False by default.
    - ``coarse_frames(frames, sizes) -> frames``: which of the frames that a row keeps at full resolution, ascending and with
      the newest, become coarse; by default those outside the host's window. Only asked on a FAR-Long, with `TokenSizes`. The
      newest always stays full.
    - ``enter(step, total_steps, latents)``: is given the latents (R, C, h, w) of every frame before it is encoded. The step is
      negative for given frames, −1 for the last of them.
    - ``every_frame``: whether it is asked after every frame, not only where a head has too many entries; False by default.
    - ``compressor``: the name of the compressor that it needs, see `far_env.host.compressor.load_compressor`; None by default.
      It then also has ``compressed_blocks(frames, sizes) -> firsts``: the first frames of blocks, ascending, among the frames
      that a row keeps at full resolution, of which the newest is not in the memory yet.
    - ``top_blocks``: how many of the compressed blocks each layer of a new frame attends to, see
      `far_env.rollout.block_selection.BlockSelection`; None by default, for all.
    """

    def retain(self, view: CacheView) -> Tensor:
        """The slot into which every entry goes, see `far_env.rollout.token_cache.TokenCache.regroup`.

        At most ``view.budget`` entries may stay in each head, those of the newest frame unchanged among them.
        """


@dataclass(frozen=True)
class TokenSizes:
    """What a policy receives where it chooses coarse frames or blocks to compress.

    Attributes:
        budget: entries that may stay in each head.
        full, coarse: tokens of a frame; the latter None on hosts without coarse frames.
        window: frames at full resolution that the host was trained with, beside the one to come.
        block: tokens of a compressed block, None without a compressor.
        block_frames: its frames.
    """

    budget: int
    full: int
    coarse: int | None
    window: int
    block: int | None = None
    block_frames: int | None = None


def check_answer(into: object, view: CacheView) -> None:
    """Raise ValueError, in one sentence, unless a policy's answer is valid."""
    shape = tuple(view.frame.shape)
    if not isinstance(into, Tensor) or into.dtype != torch.int64 or tuple(into.shape) != shape:
        got = f"{into.dtype} {tuple(into.shape)}" if isinstance(into, Tensor) else type(into).__name__
        raise ValueError(f"must answer an int64 tensor of the shape {shape}, got {got}")
    num_slots = shape[-1]
    if bool(((into < -1) | (into >= num_slots)).any()):
        raise ValueError(f"merges into a slot that is not in −1 to {num_slots - 1}")
    empty, own = view.frame < 0, torch.arange(num_slots, device=into.device).expand_as(into)
    if bool((into[empty] >= 0).any()):
        raise ValueError("keeps a slot that is empty")
    stays = into == own
    if bool((~stays.gather(-1, into.clamp(min=0)) & (into >= 0)).any()):
        raise ValueError("merges into an entry that does not stay")
    newest = view.frame == view.newest
    if not bool(stays[newest].all()) or bool((newest.gather(-1, into.clamp(min=0)) & ~newest & (into >= 0)).any()):
        raise ValueError("drops or merges entries of the newest frame, which stays as it is")
    if (most := int(stays.sum(dim=-1).max())) > view.budget:
        raise ValueError(f"keeps {most} entries of a head, with a budget of {view.budget}")
