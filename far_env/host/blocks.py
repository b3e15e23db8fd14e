"""The parts of a FAR transformer: patches, rotary positions, adaptive norms, attention and the block that joins them.

Formulas: FAR (arXiv 2503.19325), built on DiT's adaptive norms (2212.09748), rotary positions over three axes as in FLUX and
RMS-normalised queries and keys. Parameter names are upstream's, so its state dicts load strictly.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
ROPE_THETA = 10000.0

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, both (B, heads, tokens, head_dim)."""


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """(B, F, C, h, w) to tokens (B, F, S, C·p²): features ordered channel, row, column; tokens row by row."""
    batch, frames, channels, height, width = latents.shape
    p = patch_size
    grid = latents.reshape(batch, frames, channels, height // p, p, width // p, p)
    return grid.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Inverse of `patchify`: (B, F, S, C·p²) to (B, F, C, height, width)."""
    batch, frames = tokens.shape[:2]
    p = patch_size
    grid = tokens.reshape(batch, frames, height // p, width // p, -1, p, p)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, frames, -1, height, width)


def rotary_tables(positions: Tensor, rows: int, columns: int, axes_dims: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token of frames at the given time positions.

    Args:
        positions: (..., F) frame indices, any dtype.
        rows, columns: tokens per frame along y and x.
        axes_dims: head dimensions given to (t, y, x), each even.

    Returns:
        cos and sin, both float32 (..., F·rows·columns, sum(axes_dims) / 2), angles computed in float64.
    """
    device = positions.device

    def angles(index: Tensor, dim: int) -> Tensor:
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        return index.double()[..., None] * ROPE_THETA**-exponent

    time = angles(positions, axes_dims[0])[..., :, None, None, :]
    down = angles(torch.arange(rows, device=device), axes_dims[1])[:, None, :]
    across = angles(torch.arange(columns, device=device), axes_dims[2])[None, :, :]
    shape = (*positions.shape, rows, columns)
    table = torch.cat([part.expand(*shape, part.shape[-1]) for part in (time, down, across)], dim=-1)
    table = table.flatten(-4, -2)
    return table.cos().float(), table.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, heads, tokens, d) by the tables (B or 1, tokens, d/2); float32 inside, x's dtype out."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class AdaptiveNorm(nn.Module):
    """LayerNorm without weights, shifted and scaled by the frame's condition; also returns the branch's gate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, F, S, D), condition (B, F, D) already through SiLU; returns (B, F, S, D) and the gate (B, F, 1, D)."""
        shift, scale, gate = self.linear(condition)[:, :, None].chunk(3, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift, gate


class FinalNorm(nn.Module):
    """The adaptive norm before the output projection. Its chunks come as (scale, shift), the reverse of the blocks'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, F, S, D), condition (B, F, D) already through SiLU; returns (B, F, S, D)."""
        scale, shift = self.linear(condition)[:, :, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys; optionally over keys and values of an earlier call too."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_q = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Attend.

        Args:
            x: (B, tokens, D).
            rotary: tables of x's tokens, see `rotary_tables`.
            mask: boolean (True attends) or additive float, broadcastable to (B, heads, tokens, past + tokens), or None.
            past: keys and values that precede x's own, or None.

        Returns:
            (B, tokens, D) and x's own keys and values.
        """
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        query = rotate(self.norm_q(query), *rotary)
        key = rotate(self.norm_k(key), *rotary)
        own = (key, value)
        if past is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(past, own, strict=True))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2)), own


class TransformerBlock(nn.Module):
    """x + gate·attention(norm(x)), then x + gate·mlp(norm(x)); the condition is one vector per frame."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.norm1 = AdaptiveNorm(dim)
        self.attn = Attention(num_heads, head_dim)
        self.norm2 = AdaptiveNorm(dim)
        self.mlp = FeedForward(dim, mult=4, activation_fn="gelu-approximate")

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """x (B, F, S, D), condition (B, F, D); see `Attention.forward` for the rest."""
        normed, gate = self.norm1(x, condition)
        attended, own = self.attn(normed.flatten(1, 2), rotary, mask, past)
        x = x + gate * attended.view_as(x)
        normed, gate = self.norm2(x, condition)
        return x + gate * self.mlp(normed), own


class ConditionEmbedding(nn.Module):
    """A table of class vectors with one extra row for the null class, which also replaces classes dropped in training."""

    dropout: float = 0.1

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, classes: Tensor) -> Tensor:
        """Class indices of any shape (the value ``num_classes`` is the null class) to vectors (..., D)."""
        if self.training and self.dropout > 0:
            dropped = torch.rand(classes.shape, device=classes.device) < self.dropout
            classes = classes.masked_fill(dropped, self.num_classes)
        return self.embedding_table(classes)


def initialise(model: nn.Module, zeroed: tuple[str, ...]) -> None:
    """Xavier-uniform linear weights and zero biases; linear layers whose name ends in one of ``zeroed`` start at zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith(zeroed):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))
