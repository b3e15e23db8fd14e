"""FAR: a transformer that predicts the flow-matching velocity of video latents, causal by frame (arXiv 2503.19325)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.host.blocks import (
    ConditionEmbedding,
    FinalNorm,
    Modulation,
    TransformerBlock,
    initialise,
    modulated_norm,
    patchify,
    rotary_table,
    unpatchify,
)

CLEAN_TIME = -1.0
"""The time of a clean context frame; noisy frames have times in (0, 1000]."""


@dataclass(frozen=True)
class Modulations:
    """What the times and classes of some frames do to every block and to the final norm; frames with B = F = 1 are shared."""

    blocks: list[Modulation]
    final: Modulation


@dataclass(frozen=True)
class NextFrame:
    """Everything about a frame that stays the same while it is denoised.

    Attributes:
        memory: keys and values (layers, 2, B, (K + 1)·S, heads, d) of K clean frames; the last S tokens are room for the frame.
        table: its rotary table.
        mask: who sees whom (B or 1, 1, S, (K + 1)·S), or None where every token sees all.
    """

    memory: Tensor
    table: Tensor
    mask: Tensor | None


class FAR(nn.Module):
    """Frame-autoregressive transformer.

    Args:
        patch_size: side of a token in latent pixels.
        in_channels, out_channels: channels of the latents and of the velocity.
        num_layers, attention_head_dim, num_attention_heads: size; the width is heads × head dimension.
        axes_dims_rope: head dimensions given to time, row and column; they sum to attention_head_dim.
        slope_scale: added to attention logits per frame of distance, times (j − i) ≤ 0.
        short_term_ctx_winsize: frames the upstream training loss looks at; no effect on inference.
        condition_cfg: None, {"type": "label", "num_classes": n} or {"type": "action", "num_action_classes": n}.

    Raises:
        ValueError: on sizes that do not fit together or an unknown condition.
    """

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 32,
        out_channels: int = 32,
        num_layers: int = 12,
        attention_head_dim: int = 64,
        num_attention_heads: int = 12,
        axes_dims_rope: tuple[int, int, int] = (16, 24, 24),
        slope_scale: float = 0.0,
        short_term_ctx_winsize: int = 16,
        condition_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope {tuple(axes_dims_rope)} must sum to attention_head_dim {attention_head_dim}")
        dim = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.slope_scale = slope_scale
        self.short_term_ctx_winsize = short_term_ctx_winsize
        self.x_embedder = nn.Linear(in_channels * patch_size**2, dim)
        self.time_features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.condition = None if condition_cfg is None else condition_cfg["type"]
        if self.condition == "label":
            self.label_embedder = ConditionEmbedding(condition_cfg["num_classes"], dim)
        elif self.condition == "action":
            self.action_embedder = ConditionEmbedding(condition_cfg["num_action_classes"], dim)
        elif self.condition is not None:
            raise ValueError(f"condition_cfg type {self.condition!r} is unknown; use 'label', 'action' or None")
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(num_attention_heads, attention_head_dim) for _ in range(num_layers)
        )
        self.norm_out = FinalNorm(dim)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)
        initialise(self, zeroed=("norm1.linear", "norm2.linear", "norm_out.linear", "proj_out"))

    @property
    def null_class(self) -> int | None:
        """Index that stands for "no label" or "no action"; None for an unconditional model."""
        if self.condition is None:
            return None
        return (self.label_embedder if self.condition == "label" else self.action_embedder).num_classes

    def forward(
        self, latents: Tensor, timesteps: Tensor, *, label: Tensor | None = None, action: Tensor | None = None
    ) -> Tensor:
        """Velocity of every frame, each attending to itself and the frames before it.

        Args:
            latents: (B, F, C, h, w), clean or noisy.
            timesteps: (B, F), or (B,) for all frames alike; −1 for clean frames, else 1000·sigma.
            label: (B,) class indices, for label-conditioned models.
            action: (B, F) indices, action i belongs to frame i, for action-conditioned models.

        Returns:
            (B, F, C, h, w), velocity = noise − clean.
        """
        num_frames = latents.shape[1]
        positions = torch.arange(num_frames, device=latents.device)
        visible = torch.ones(num_frames, num_frames, dtype=torch.bool, device=latents.device).tril()
        return self.velocity(latents, timesteps, positions, visible, label=label, action=action)

    def velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        positions: Tensor,
        visible: Tensor,
        *,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """As `forward`, with the frames' time positions (F,) and who sees whom, boolean (F, F), given by the caller."""
        batch, num_frames, _, height, width = latents.shape
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None]
        modulations = self.modulate(timesteps.expand(batch, num_frames), label=label, action=action, dtype=latents.dtype)
        x, table = self._embed(latents), self._table(positions[None], latents)
        mask = self._mask(positions[None], positions[None], visible[None], latents)
        for block, modulation in zip(self.transformer_blocks, modulations.blocks, strict=True):
            x = block(x, modulation, table, mask, None)
        return self._project(x, modulations, height, width)

    def modulate(
        self, timesteps: Tensor, *, label: Tensor | None = None, action: Tensor | None = None, dtype: torch.dtype
    ) -> Modulations:
        """What times (B, F) and classes do; see `forward`. Upstream rounds times to the latents' dtype first.

        Raises:
            ValueError: if the model needs a label or actions and gets none.
        """
        features = self.time_features(timesteps.to(dtype).flatten()).to(dtype)
        embedding = self.timestep_embedder(features).unflatten(0, timesteps.shape)
        if self.condition == "label":
            if label is None:
                raise ValueError("this model is conditioned on labels: pass label, a (B,) tensor of class indices")
            embedding = embedding + self.label_embedder(label)[:, None]
        elif self.condition == "action":
            if action is None:
                raise ValueError("this model is conditioned on actions: pass action, one index per frame")
            embedding = embedding + self.action_embedder(action)
        condition = F.silu(embedding)
        return Modulations([block.modulation(condition) for block in self.transformer_blocks], self.norm_out(condition))

    def encode_context(
        self,
        frames: Tensor,
        past: Tensor | None = None,
        *,
        modulations: Modulations | None = None,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """Keys and values of clean frames, which no later frame changes.

        Args:
            frames: (B, n, C, h, w), at positions K, K + 1, …; rows may be padded at the end.
            past: keys and values (layers, 2, B, K·S, heads, d) of the frames before them, or None for K = 0.
            modulations: of clean frames, where the caller has them already; else label (B,) or action (B, n) as in `forward`.

        Returns:
            (layers, 2, B, n·S, heads, d).
        """
        batch, num_frames = frames.shape[:2]
        tokens = self.tokens_per_frame(frames)
        num_past = 0 if past is None else past.shape[3] // tokens
        if modulations is None:
            times = torch.full((1, 1) if self.condition is None else (batch, num_frames), CLEAN_TIME, device=frames.device)
            modulations = self.modulate(times, label=label, action=action, dtype=frames.dtype)
        positions = torch.arange(num_past + num_frames, device=frames.device)
        own = positions[num_past:]
        table = self._table(own[None], frames)
        mask = None
        if num_frames > 1 or self.slope_scale != 0:
            mask = self._mask(own[None], positions[None], (positions <= own[:, None])[None], frames)
        memory = self.new_memory(batch, num_past + num_frames, frames)
        if past is not None:
            memory[:, :, :, : past.shape[3]] = past
        x = self._embed(frames)
        *blocks, last = self.transformer_blocks
        for block, modulation, layer in zip(blocks, modulations.blocks, memory, strict=False):
            x = block(x, modulation, table, mask, (layer[0], layer[1]))
        last.remember(x, modulations.blocks[-1], table, (memory[-1, 0], memory[-1, 1]))
        return memory[:, :, :, num_past * tokens :]

    def new_memory(self, batch: int, num_frames: int, like: Tensor) -> Tensor:
        """Uninitialised keys and values (layers, 2, B, num_frames·S, heads, d) for latents such as ``like``."""
        attention = self.transformer_blocks[0].attn
        tokens = num_frames * self.tokens_per_frame(like)
        head_dim = attention.to_k.out_features // attention.num_heads
        shape = (len(self.transformer_blocks), 2, batch, tokens, attention.num_heads, head_dim)
        return like.new_empty(shape)

    def next_frame(self, memory: Tensor, latents: Tensor, lengths: Tensor | None = None) -> NextFrame:
        """Prepare a frame that follows K clean ones.

        Args:
            memory: from `new_memory` for K + 1 frames; the first K·S tokens hold the clean frames' keys and values.
            latents: tells size, device and dtype of the frame, (B, 1, C, h, w).
            lengths: (B,) how many of the K frames are real in each row, the rest being padding; None where all are.
        """
        num_context = memory.shape[3] // self.tokens_per_frame(latents) - 1
        slots = torch.arange(num_context + 1, device=latents.device)
        if lengths is None:
            positions = slots[-1:][None]
            keys, visible = slots[None], torch.ones(1, 1, num_context + 1, dtype=torch.bool, device=latents.device)
        else:
            positions = lengths[:, None]
            keys = torch.where(slots == num_context, positions, slots)
            visible = ((slots < positions) | (slots == num_context))[:, None]
        unmasked = lengths is None and self.slope_scale == 0
        mask = None if unmasked else self._mask(positions, keys, visible, latents)
        return NextFrame(memory, self._table(positions, latents), mask)

    def denoise(self, noisy: Tensor, modulations: Modulations, frame: NextFrame) -> Tensor:
        """Velocity (B, 1, C, h, w) of one noisy frame per row, (B, 1, C, h, w), that follows clean ones."""
        x = self._embed(noisy)
        for block, modulation, layer in zip(self.transformer_blocks, modulations.blocks, frame.memory, strict=True):
            x = block(x, modulation, frame.table, frame.mask, (layer[0], layer[1]))
        return self._project(x, modulations, *noisy.shape[-2:])

    def tokens_per_frame(self, latents: Tensor) -> int:
        """Tokens of one frame of latents (…, h, w)."""
        return (latents.shape[-2] // self.patch_size) * (latents.shape[-1] // self.patch_size)

    def _embed(self, latents: Tensor) -> Tensor:
        """(B, F, C, h, w) to (B, F, S, D)."""
        height, width = latents.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latents of {height}×{width} cannot be cut into patches of {self.patch_size}")
        return self.x_embedder(patchify(latents, self.patch_size))

    def _project(self, x: Tensor, modulations: Modulations, height: int, width: int) -> Tensor:
        """(B, F, S, D) to velocities (B, F, C, height, width)."""
        return unpatchify(self.proj_out(modulated_norm(x, *modulations.final)), self.patch_size, height, width)

    def _table(self, positions: Tensor, latents: Tensor) -> Tensor:
        """Rotary table of frames at ``positions`` (B or 1, F), rounded to the latents' dtype first, as upstream does."""
        rows, columns = (side // self.patch_size for side in latents.shape[-2:])
        return rotary_table(positions.to(latents.dtype), rows, columns, self.axes_dims_rope)

    def _mask(self, queries: Tensor, keys: Tensor, visible: Tensor, latents: Tensor) -> Tensor:
        """Who sees whom, per token: frame positions (B, Fq) and (B, Fk), visible (B, Fq, Fk) to (B, 1, Fq·S, Fk·S).

        Four axes always: torch has no fused CPU attention for a mask of three.
        """
        mask = visible
        if self.slope_scale != 0:
            distance = keys[..., None, :] - queries[..., :, None]
            mask = (self.slope_scale * distance).to(latents.dtype).masked_fill(~visible, float("-inf"))
        tokens = self.tokens_per_frame(latents)
        return mask.repeat_interleave(tokens, dim=-2).repeat_interleave(tokens, dim=-1).unsqueeze(1)
