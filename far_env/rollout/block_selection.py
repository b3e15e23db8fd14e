"""Which compressed blocks each layer of a new frame attends to: those whose keys agree most with its queries (PackForcing)."""

from __future__ import annotations

import torch
from torch import Tensor

from far_env.host.far import NextFrame
from far_env.rollout.token_cache import COMPRESSED, NO_FRAME, TokenCache


class BlockSelection:
    """Lets each layer attend to the compressed blocks whose keys agree most with a frame's queries at the first ODE step.

    A block's affinity is the mean of query · key / √d over all queries, heads and tokens of the block (arXiv 2603.25730). With
    guidance it is that of the conditional side, and holds for both. Of equal blocks the newer wins. Where a layer has as many
    blocks or fewer, nothing changes. It is a `far_env.host.sampler.FrameProbe`.

    Args:
        cache: the entries that ``frame`` was prepared from.
        frame: the frame to come.
        number: blocks that each row and layer attends to.

    Attributes:
        frame: to be solved in its place; its masks change at the first step.
    """

    def __init__(self, cache: TokenCache, frame: NextFrame, number: int) -> None:
        self._cache, self._number, self._layer = cache, number, 0
        self._blocks = torch.where(cache.kind == COMPRESSED, cache.frame, NO_FRAME)
        of_rows = self._blocks.transpose(0, 1).flatten(1)
        self._chooses = max((len(blocks[blocks >= 0].unique()) for blocks in of_rows), default=0) > number
        masks = frame.masks
        if self._chooses:
            shape = (frame.memory.shape[2], cache.kind.shape[2], 1, frame.memory.shape[3])
            masks = [frame.memory.new_zeros(shape) if mask is None else mask.clone() for mask in frame.masks]
        self.frame = NextFrame(frame.memory, frame.table, masks)

    def attention(self, query: Tensor, key: Tensor, table: Tensor, mask: Tensor | None) -> None:
        """Choose the blocks of the next layer, at the first step, before it attends."""
        layer, self._layer = self._layer, self._layer + 1
        if not self._chooses or layer >= len(self.frame.masks):
            return
        rows, slots = self._cache.num_rows, self._cache.num_slots
        affinity = torch.einsum("rshd,rthd->rht", query[-rows:].float(), key[-rows:, :slots].float())
        affinity = affinity / (query.shape[1] * query.shape[-1] ** 0.5)
        for row, blocks in enumerate(self._blocks[layer]):
            newest_first = blocks[blocks >= 0].unique().flip(0)
            if len(newest_first) <= self._number:
                continue
            means = torch.stack([affinity[row][blocks == first].mean() for first in newest_first])
            chosen = newest_first[means.argsort(descending=True, stable=True)[: self._number]]
            hidden = (blocks >= 0) & ~torch.isin(blocks, chosen)
            for branch in range(self._cache.num_branches):
                self.frame.masks[layer][branch * rows + row, :, 0, :slots].masked_fill_(hidden, float("-inf"))

    def velocity(self, step: int, latent: Tensor, velocity: Tensor) -> None:
        """Nothing is recorded."""
