"""Comparison of frames by the cells of their latents: how well the content of one frame could be copied from another."""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = 2**24
"""Bound of the memory for distances of cells that are compared at once; several such tensors are alive together."""


def cell_distances(targets: Tensor, sources: Tensor) -> Tensor:
    """The squared distance of each cell of a target to the nearest cell anywhere in a source, whatever way the content moved.

    Args:
        targets: latents (B, M, C, h, w).
        sources: latents (B, N, C, h, w).

    Returns:
        float32 (B, M, N, h·w), for each cell of the target, row by row.
    """
    return nearest_cells(targets, sources)[0]


def nearest_cells(targets: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """`cell_distances`, and the index of the nearest cell in the source, int64 (B, M, N, h·w)."""
    cells, others = (latents.float().flatten(3).transpose(2, 3) for latents in (targets, sources))
    lengths = others.square().sum(dim=-1)[:, None, :, None]
    together = max(1, _BYTES // (4 * len(cells) * others.shape[1] * cells.shape[2] * others.shape[2]))
    values, indices = [], []
    for part in cells.split(together, dim=1):
        products = part[:, :, None] @ others[:, None].transpose(-1, -2)
        nearest = (lengths - 2 * products).min(dim=-1)
        values.append((nearest.values + part.square().sum(dim=-1)[:, :, None]).clamp(min=0))
        indices.append(nearest.indices)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)
