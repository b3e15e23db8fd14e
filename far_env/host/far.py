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
    KeyValue,
    TransformerBlock,
    initialise,
    patchify,
    rotary_tables,
    unpatchify,
)

CLEAN_TIME = -1.0
"""The time of a clean context frame; noisy frames have times in (0, 1000]."""


@dataclass(frozen=True)
class ContextCache:
    """Keys and values of clean context frames, one pair per layer.

    Attributes:
        layers: rotated keys and values, each (B, heads, K·S, head_dim).
        lengths: int64 (B,), how many of the K frames are real in each row; the rest is padding at the end. None: all.
        num_frames: K.
    """

    layers: list[KeyValue]
    lengths: Tensor | None
    num_frames: int


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
        bias = self._attention_bias(positions, positions, visible, self._tokens_per_frame(latents))
        return self._run(latents, timesteps, positions[None], bias, None, label, action)[0]

    def encode_context(
        self,
        context: Tensor,
        *,
        lengths: Tensor | None = None,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> ContextCache:
        """Keys and values of clean context frames, computed once and reused by every `denoise` call.

        Args:
            context: (B, K, C, h, w), K ≥ 1; rows shorter than K are padded at the end.
            lengths: (B,) number of real frames per row; None where every row is full.
            label: (B,); action: (B, K). As in `forward`.
        """
        batch, num_frames = context.shape[:2]
        positions = torch.arange(num_frames, device=context.device)
        visible = torch.ones(num_frames, num_frames, dtype=torch.bool, device=context.device).tril()
        bias = self._attention_bias(positions, positions, visible, self._tokens_per_frame(context))
        times = torch.full((batch, num_frames), CLEAN_TIME, device=context.device)
        layers = self._run(context, times, positions[None], bias, None, label, action, velocity=False)[1]
        return ContextCache(layers, lengths, num_frames)

    def denoise(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        cache: ContextCache | None,
        *,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """Velocity of one noisy frame per row, which follows the cached context.

        Args:
            noisy: (B, 1, C, h, w).
            timesteps: (B, 1).
            cache: from `encode_context` with the same B, or None for no context.
            label: (B,); action: (B, 1), the action of the noisy frame.

        Returns:
            (B, 1, C, h, w).
        """
        device = noisy.device
        if cache is None:
            return self._run(noisy, timesteps, torch.zeros(1, 1, device=device), None, None, label, action)[0]
        context_positions = torch.arange(cache.num_frames + 1, device=device)
        if cache.lengths is None:
            positions = context_positions[-1:][None]
            visible = None if self.slope_scale == 0 else torch.ones(1, 1, len(context_positions), device=device) > 0
        else:
            positions = cache.lengths[:, None]
            visible = (context_positions < positions) | (context_positions == cache.num_frames)
            visible = visible[:, None]
        bias = None
        if visible is not None:
            key_positions = context_positions.expand(len(positions), -1).clone()
            key_positions[:, -1:] = positions
            bias = self._attention_bias(positions, key_positions, visible, self._tokens_per_frame(noisy))
        return self._run(noisy, timesteps, positions, bias, cache.layers, label, action)[0]

    def _tokens_per_frame(self, latents: Tensor) -> int:
        return (latents.shape[-2] // self.patch_size) * (latents.shape[-1] // self.patch_size)

    def _attention_bias(self, queries: Tensor, keys: Tensor, visible: Tensor, tokens: int) -> Tensor:
        """Who sees whom, per token: frame positions (B, Fq) and (B, Fk), visible (B, Fq, Fk) to (B, 1, Fq·S, Fk·S).

        Without a batch axis the first axis is 1. Four axes always: torch has no fused CPU attention for a mask of three.
        """
        bias = visible
        if self.slope_scale != 0:
            distance = keys[..., None, :] - queries[..., :, None]
            bias = (self.slope_scale * distance).to(torch.float32).masked_fill(~visible, float("-inf"))
        bias = bias.repeat_interleave(tokens, dim=-2).repeat_interleave(tokens, dim=-1)
        return bias.unsqueeze(-3) if bias.ndim == 3 else bias[None, None]

    def _condition(self, timesteps: Tensor, label: Tensor | None, action: Tensor | None, dtype: torch.dtype) -> Tensor:
        """SiLU of time plus class embedding, (B, F, D). Upstream rounds the time to the latents' dtype first."""
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
        return F.silu(embedding)

    def _run(
        self,
        latents: Tensor,
        timesteps: Tensor,
        positions: Tensor,
        bias: Tensor | None,
        past: list[KeyValue] | None,
        label: Tensor | None,
        action: Tensor | None,
        velocity: bool = True,
    ) -> tuple[Tensor | None, list[KeyValue]]:
        """All layers over frames at ``positions`` (B or 1, F); returns velocity (or None) and each layer's own keys, values."""
        batch, num_frames, _, height, width = latents.shape
        p = self.patch_size
        if height % p or width % p:
            raise ValueError(f"latents of {height}×{width} cannot be cut into patches of {p}")
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None].expand(-1, num_frames)
        condition = self._condition(timesteps.expand(batch, num_frames), label, action, latents.dtype)
        # Positions are rounded to the latents' dtype as upstream does; in bfloat16 that matters beyond frame 256.
        rotary = rotary_tables(positions.to(latents.dtype), height // p, width // p, self.axes_dims_rope)
        if bias is not None and bias.is_floating_point():
            bias = bias.to(latents.dtype)
        x = self.x_embedder(patchify(latents, p))
        keys_values = []
        for index, block in enumerate(self.transformer_blocks):
            x, own = block(x, condition, rotary, bias, None if past is None else past[index])
            keys_values.append(own)
        if not velocity:
            return None, keys_values
        return unpatchify(self.proj_out(self.norm_out(x, condition)), p, height, width), keys_values
