"""Whole frames of a token memory are kept, compressed to a quarter of their tokens, or dropped, the same in every head.

A frame is compressed without training: each 2×2 tokens become one, by the means of their keys and values, which counts as four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from far_env.host.compressor import SPACING
from far_env.rollout.token_cache import CacheView

DROP, COMPRESS, KEEP = ACTIONS = range(3)


def compressed_size(tokens_per_frame: int) -> int:
    """Tokens of a compressed frame."""
    return tokens_per_frame // SPACING**2


def granted(wanted: Sequence[int], sizes: Sequence[int], tokens_per_frame: int, budget: int) -> list[int]:
    """What becomes of frames, oldest first, of which the newest is kept: newer ones come first where tokens are short.

    A frame that was to be kept and does not fit is compressed; one that does not fit even so is dropped. A frame that is
    compressed already stays as it is unless it is dropped: COMPRESS and KEEP are the same.

    Args:
        wanted: DROP, COMPRESS or KEEP for each frame.
        sizes: tokens of each frame now.
        tokens_per_frame: of a frame at full resolution.
        budget: tokens of all together; at least those of a frame.
    """
    small, answer, left = compressed_size(tokens_per_frame), [], budget
    for index in reversed(range(len(wanted))):
        action = KEEP if index == len(wanted) - 1 else wanted[index]
        if sizes[index] == small:
            action = min(action, COMPRESS)
        if action == KEEP and tokens_per_frame > left:
            action = COMPRESS
        if action == COMPRESS and small > left:
            action = DROP
        left -= (0, small, tokens_per_frame)[action]
        answer.append(action)
    return answer[::-1]


def regrouping(view: CacheView, actions: Sequence[Mapping[int, int]]) -> Tensor:
    """The answer, see `far_env.rollout.token_cache.TokenCache.regroup`, by which frames are kept, compressed or dropped.

    Args:
        view: of a memory with the same entries in every layer and head of a row.
        actions: per row, from the number of every frame in the memory to its action.
    """
    own = torch.arange(view.frame.shape[-1], device=view.frame.device)
    quarters = view.quarters(view.frame)
    into = quarters.clone()
    for row, of_frames in enumerate(actions):
        numbers = view.frame[0, row, 0].tolist()
        action = torch.tensor([of_frames.get(number, DROP) for number in numbers], device=own.device)
        target = torch.where(action == COMPRESS, quarters[0, row, 0], own)
        into[:, row] = torch.where(action == DROP, -1, target)
    return into
