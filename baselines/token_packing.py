"""PackForcing over tokens, with the parts that can be left out to compare, and a compressed past without training.

Every part is a whole number of frames or blocks, the same in every layer and head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from far_env.baselines.filling import count, share
from far_env.baselines.token_rules import best, staying
from far_env.errors import unknown_name

if TYPE_CHECKING:
    from far_env.rollout.token_cache import CacheView
    from far_env.rollout.token_policy import TokenSizes

MIDDLES = ("compressed", "averaged", "strided", "none")
BLOCK_FRAMES = 4
"""Frames of a block where there is no compressor."""
PLACES = 4
"""Tokens of a frame that one token of a block stands for."""


@dataclass(frozen=True)
class Parts:
    """How a budget is divided.

    Attributes:
        num_sink: first frames that stay.
        num_blocks: largest number of blocks.
        full, block: tokens of a frame and of a block.
        length: frames of a block.
        budget: tokens of all parts together; what the others leave is for the newest frames.
    """

    num_sink: int
    num_blocks: int
    full: int
    block: int
    length: int
    budget: int

    def blocks_before(self, newest: int) -> int:
        """Blocks that frames have become by the time that the frame ``newest`` is in the memory: no more than needed."""
        blocks = 0
        while self._tokens(newest, blocks) > self.budget:
            blocks += 1
        return blocks

    def _tokens(self, newest: int, blocks: int) -> int:
        sinks = min(self.num_sink, newest + 1)
        recent = newest + 1 - sinks - blocks * self.length
        return (sinks + recent) * self.full + min(blocks, self.num_blocks) * self.block


class PackForcing:
    """Keeps first frames, a queue of blocks of a few compressed tokens, and as many newest frames as the budget has room for.

    Faithful: the three parts; the dual-branch compressor, trained for the host; the middle is a queue; each layer of a new
    frame attends to the blocks whose keys agree most with its queries at the first ODE step; positions in time are counted
    without gaps whenever something leaves. Adapted: blocks of four frames become four tokens, 16 times fewer, not 32; frames
    enter one at a time, so that the number of newest frames falls by four whenever a block is made; blocks that are not
    attended to count for the budget too; a compressor is trained on true histories with noise, not on generated ones, to
    predict what the host predicts with whole frames.

    To compare, ``middle=averaged`` has the means of the same tokens' keys and values in place of each compressed token,
    ``strided`` one token of each 16, ``none`` nothing in the same place; ``top_blocks=0`` attends to all blocks, and
    ``--max-gap 0`` leaves positions as they were.

    Source: PackForcing, arXiv 2603.25730. Parameters ``f_sink``, ``f_middle``, shares of the budget; ``top_blocks``;
    ``middle``; ``compressor``, a folder that far-env train-compressor wrote.
    """

    name = "packforcing"
    family = "anchor"
    source = "PackForcing, arXiv 2603.25730"
    every_frame = True

    def __init__(
        self,
        f_sink: float = 0.125,
        f_middle: float = 0.25,
        top_blocks: int = 4,
        middle: str = "compressed",
        compressor: str = "shipped",
    ) -> None:
        self.f_sink, self.f_middle = share(self.name, "f_sink", f_sink), share(self.name, "f_middle", f_middle)
        if middle not in MIDDLES:
            raise ValueError(f"{self.name}: {unknown_name('middle', middle, MIDDLES)}")
        self.middle = middle
        self.compressor = compressor if middle == "compressed" else None
        self.top_blocks = (count(self.name, "top_blocks", top_blocks) or None) if middle == "compressed" else None

    def parts(self, budget: int, full: int, length: int) -> Parts:
        """The parts of a budget. Raises ValueError if the newest frames have no room for a block."""
        block = full // PLACES
        num_sink = math.floor(self.f_sink * budget / full + 0.5)
        parts = Parts(num_sink, math.floor(self.f_middle * budget / block), full, block, length, budget)
        needed = (num_sink + length) * full + parts.num_blocks * block
        if budget < needed:
            raise ValueError(
                f"{self.name} with blocks of {length} frames needs {length} newest frames beside the other parts, {needed} "
                f"tokens under this budget of {budget}; use a larger one, or smaller shares f_sink and f_middle"
            )
        return parts

    def coarse_frames(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """None: coarse tokens of a FAR-Long are not used."""
        return []

    def compressed_blocks(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """The oldest frames after the sinks, as far as the budget needs it."""
        parts = self.parts(sizes.budget, sizes.full, sizes.block_frames)
        firsts = [parts.num_sink + parts.length * block for block in range(parts.blocks_before(frames[-1]))]
        return [first for first in firsts if first in frames]

    def retain(self, view: CacheView) -> Tensor:
        """All but the oldest blocks."""
        present = view.frame >= 0
        if self.middle == "compressed":
            block = view.tokens_per_frame // PLACES
            blocks = present & (view.cell >= view.tokens_per_frame)
            newest_first = torch.arange(view.frame.shape[-1], device=view.frame.device).expand_as(view.frame)
            kept = best(newest_first, blocks, math.floor(self.f_middle * view.budget / block) * block)
            return staying(present & ~blocks | kept)
        parts = self.parts(view.budget, view.tokens_per_frame, BLOCK_FRAMES)
        num_blocks = parts.blocks_before(view.newest)
        number = torch.div(view.frame - parts.num_sink, parts.length, rounding_mode="floor")
        middle = present & (number >= 0) & (number < num_blocks)
        if self.middle == "none":
            return staying(present & ~middle)
        kept = middle & (number >= num_blocks - parts.num_blocks)
        # Frames outside the middle are groups of their own.
        roots = view.quarters(torch.where(middle, number, num_blocks + 1 + view.frame))
        own = staying(present & ~middle)
        if self.middle == "strided":
            return torch.where(kept & (roots == staying(present)), roots, own)
        return torch.where(kept, roots, own)


class RecentAveraged:
    """Keeps the newest frames whole, and those before them with the means of each 2×2 tokens, as far back as the budget holds.

    FAR's two levels without training, on any host. The same decision in the environments of a token memory is to compress
    all but the newest frames.

    Source: FAR, arXiv 2503.19325, §3.4. Parameter ``f_recent``, the share of the budget for whole frames.
    """

    name = "recent_averaged"
    family = "anchor"
    source = "FAR, arXiv 2503.19325"

    def __init__(self, f_recent: float = 0.5) -> None:
        self.f_recent = share(self.name, "f_recent", f_recent)

    def coarse_frames(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """None: coarse tokens of a FAR-Long are not used."""
        return []

    def retain(self, view: CacheView) -> Tensor:
        """See the class."""
        full = view.tokens_per_frame
        num_whole = max(1, math.floor(self.f_recent * view.budget / full + 0.5))
        num_averaged = (view.budget - num_whole * full) // (full // PLACES)
        whole = view.frame > view.newest - num_whole
        averaged = ~whole & (view.frame > view.newest - num_whole - num_averaged) & (view.frame >= 0)
        return torch.where(averaged, view.quarters(view.frame), staying(whole))
