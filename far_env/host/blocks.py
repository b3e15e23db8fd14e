"""The parts of a FAR transformer: patches, rotary positions, adaptive norms, attention, and the block that combines them.

Formulas: FAR (arXiv 2503.19325), built on DiT's adaptive norms (2212.09748), rotary positions over three axes as in FLUX and
RMS-normalised queries and keys. Parameter names are upstream's, so its state dicts load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.models import attention
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.host.linear import apply_linear, linear

NORM_EPS = 1e-6
ROPE_THETA = 10000.0

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, both (B, tokens, heads, head_dim)."""
Modulation = tuple[Tensor, ...]
"""Shift, factor and gate of a block's attention, then of its MLP, from a frame's time and class, each (B, F, 1, D)."""
AttentionCallback = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
"""Receives the inputs of a block's attention: queries (B, T, heads, d), keys (B, K, heads, d), the queries' rotary table and
the mask."""


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


def rotary_table(positions: Tensor, rows: int, columns: int, axes_dims: tuple[int, int, int], spacing: int = 1) -> Tensor:
    """The complex numbers of unit length by which every token's pairs of features are rotated.

    Args:
        positions: (..., F) frame indices, any dtype.
        rows, columns: tokens per frame along y and x.
        axes_dims: head dimensions for (t, y, x), each even.
        spacing: distance of neighbouring tokens along y and x; a token's position is its upper left corner.

    Returns:
        complex64 (..., F·rows·columns, 1, sum(axes_dims) / 2), angles computed in float64.
    """
    device = positions.device

    def angles(index: Tensor, dim: int) -> Tensor:
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        return index.double()[..., None] * ROPE_THETA**-exponent

    time = angles(positions, axes_dims[0])[..., :, None, None, :]
    down = angles(spacing * torch.arange(rows, device=device), axes_dims[1])[:, None, :]
    across = angles(spacing * torch.arange(columns, device=device), axes_dims[2])[None, :, :]
    shape = (*positions.shape, rows, columns)
    table = torch.cat([part.expand(*shape, part.shape[-1]) for part in (time, down, across)], dim=-1)
    table = table.flatten(-4, -2).unsqueeze(-2)
    return torch.complex(table.cos().float(), table.sin().float())


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (B, tokens, heads, d) by a `rotary_table` (B or 1, …), in float32; returns x's dtype."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """LayerNorm of x (B, F, S, D) without weights, times ``factor`` plus ``shift``, both (B or 1, F or 1, 1, D)."""
    if shift.numel() == x.shape[-1]:
        # One modulation for all frames, as in sampling without labels or actions: one fused kernel.
        return F.layer_norm(x, x.shape[-1:], factor.flatten(), shift.flatten(), eps=NORM_EPS)
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * factor + shift


class AdaptiveNorm(nn.Module):
    """Maps a frame's condition to the shift and factor of a `modulated_norm` and the gate of the branch that follows it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 3 * dim)

    def forward(self, condition: Tensor) -> Modulation:
        """Condition (B, F, D), after SiLU, to shift, factor and gate (B, F, 1, D)."""
        shift, scale, gate = self.linear(condition)[:, :, None].chunk(3, dim=-1)
        return shift, 1 + scale, gate


class FinalNorm(nn.Module):
    """The same for the norm before the output projection. Its chunks are (scale, shift), the reverse of the blocks'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, condition: Tensor) -> Modulation:
        """Condition (B, F, D), after SiLU, to shift and factor (B, F, 1, D)."""
        scale, shift = self.linear(condition)[:, :, None].chunk(2, dim=-1)
        return shift, 1 + scale


class Projections(NamedTuple):
    """The layers of attention for one kind of token, fine or coarse."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    norm_query: nn.Module
    norm_key: nn.Module
    out: nn.Module


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys."""

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

    def projections(self, coarse: bool) -> Projections:
        """The layers for tokens of full-resolution frames. Only FAR-Long has coarse ones."""
        return Projections(self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k, self.to_out[0])

    def query(self, x: Tensor, table: Tensor, coarse: bool = False) -> Tensor:
        """(B, tokens, D) to (B, tokens, heads, d)."""
        layers = self.projections(coarse)
        return rotate(layers.norm_query(self._split(apply_linear(layers.query, x))), table)

    def key_value(self, x: Tensor, table: Tensor, coarse: bool = False) -> tuple[Tensor, Tensor]:
        """(B, tokens, D) to keys and values, both (B, tokens, heads, d)."""
        return rotate(self.key(x, coarse), table), self._split(apply_linear(self.projections(coarse).value, x))

    def key(self, x: Tensor, coarse: bool = False) -> Tensor:
        """(B, tokens, D) to keys before rotation (B, tokens, heads, d)."""
        layers = self.projections(coarse)
        return layers.norm_key(self._split(apply_linear(layers.key, x)))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, coarse: bool = False) -> Tensor:
        """Attend and project.

        Args:
            query: (B, T, heads, d).
            key, value: (B, K, heads, d).
            mask: boolean (True attends) or additive float, broadcastable to (B, heads, T, K), or None.
            coarse: whether the queries are of coarse tokens.

        Returns:
            (B, T, D).
        """
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return apply_linear(self.projections(coarse).out, out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class LongAttention(Attention):
    """Attention with separate projections for the tokens of coarse frames.

    Args:
        last: whether this is the last block of a model, which has no output projection for coarse tokens.
    """

    def __init__(self, num_heads: int, head_dim: int, last: bool) -> None:
        super().__init__(num_heads, head_dim)
        dim = num_heads * head_dim
        self.norm_added_q = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.to_add_out = nn.Identity() if last else nn.Linear(dim, dim)

    def projections(self, coarse: bool) -> Projections:
        """The layers for coarse tokens, or for the others."""
        if not coarse:
            return super().projections(coarse)
        return Projections(
            self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k, self.to_add_out
        )


class FeedForward(attention.FeedForward):
    """Two linear layers with GELU between them: diffusers' module, whose parameters keep their names."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, mult=4, activation_fn="gelu-approximate")

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        first, _, second = self.net
        return apply_linear(second, linear(x, first.proj.weight, first.proj.bias, gelu=True))


class TransformerBlock(nn.Module):
    """x + gate·attention(norm(x)), then x + gate·mlp(norm(x)), with one modulation per frame."""

    def __init__(self, attention: Attention, dim: int) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(dim)
        self.attn = attention
        self.norm2 = AdaptiveNorm(dim)
        self.mlp = FeedForward(dim)

    def modulation(self, condition: Tensor) -> Modulation:
        """The modulation for a condition (B, F, D), after SiLU."""
        return (*self.norm1(condition), *self.norm2(condition))

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        table: Tensor,
        mask: Tensor | None,
        memory: KeyValue | None = None,
        coarse: bool = False,
        on_attention: AttentionCallback | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: (B, F, S, D).
            modulation: of x's frames.
            table: rotary table of x's tokens.
            mask: see `Attention.forward`.
            memory: None, or keys and values (B, K, heads, d) of all tokens that x attends to; x's are written to its end.
            coarse: whether x are coarse frames of FAR-Long.
            on_attention: called once, before the attention.

        Returns:
            (B, F, S, D).
        """
        shift, factor, gate, mlp_shift, mlp_factor, mlp_gate = modulation
        normed = modulated_norm(x, shift, factor).flatten(1, 2)
        key, value = self.attn.key_value(normed, table, coarse)
        if memory is not None:
            key, value = write_tail(memory, key, value)
        query = self.attn.query(normed, table, coarse)
        if on_attention is not None:
            on_attention(query, key, table, mask)
        attended = self.attn(query, key, value, mask, coarse)
        x = torch.addcmul(x, gate, attended.view_as(x))
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_factor)))

    def write_context(self, x: Tensor, modulation: Modulation, table: Tensor, memory: KeyValue, coarse: bool = False) -> None:
        """Write the keys and values of x into the memory as `forward` does, and compute nothing else."""
        normed = modulated_norm(x, *modulation[:2]).flatten(1, 2)
        write_tail(memory, *self.attn.key_value(normed, table, coarse))


def write_tail(memory: KeyValue, key: Tensor, value: Tensor) -> KeyValue:
    """Write keys and values (B, T, heads, d) over the last T tokens of the memory, in place; returns the memory."""
    for whole, new in zip(memory, (key, value), strict=True):
        whole[:, -new.shape[1] :] = new
    return memory


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
