"""FAR: a transformer that predicts the flow-matching velocity of video latents, causal by frame (arXiv 2503.19325)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.device import upload
from far_env.host.blocks import (
    Attention,
    AttentionCallback,
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
from far_env.host.linear import apply_linear

CLEAN_TIME = -1.0
"""The time of a clean context frame; noisy frames have times in (0, 1000]."""
COARSE_TIME_FACTOR = 2
"""Factor on the times of FAR-Long's coarse frames."""


@dataclass(frozen=True)
class Modulations:
    """The modulations of all blocks and of the final norm for some frames; with B = F = 1 they apply to all frames."""

    blocks: list[Modulation]
    final: Modulation


@dataclass(frozen=True)
class NextFrame:
    """Everything about a frame that stays the same while it is denoised.

    Attributes:
        memory: keys and values (layers, 2, B, T, heads, d) of clean frames; the last S tokens are reserved for this frame.
        table: rotary table of this frame.
        masks: per layer the attention mask, broadcastable to (B, heads, S, T), or None if every token attends to all.
    """

    memory: Tensor
    table: Tensor
    masks: Sequence[Tensor | None]


class FAR(nn.Module):
    """Frame-autoregressive transformer.

    Args:
        patch_size: side of a token in latent pixels.
        in_channels, out_channels: channels of the latents and of the velocity.
        num_layers, attention_head_dim, num_attention_heads: size; the width is heads × head dimension.
        axes_dims_rope: head dimensions for time, row and column; they sum to attention_head_dim.
        slope_scale: added to attention logits per frame of distance, times (j − i) ≤ 0.
        short_term_ctx_winsize: number of newest frames in FAR's training loss; no effect on inference.
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
            TransformerBlock(self._attention(num_attention_heads, attention_head_dim, index == num_layers - 1), dim)
            for index in range(num_layers)
        )
        self.norm_out = FinalNorm(dim)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)
        initialise(self, zeroed=("norm1.linear", "norm2.linear", "norm_out.linear", "proj_out"))

    @property
    def null_class(self) -> int | None:
        """The class index for "no label" or "no action"; None for an unconditional model."""
        return None if self.condition is None else self.class_embedder.num_classes

    @property
    def class_embedder(self) -> ConditionEmbedding:
        """The table of class vectors of a model with labels or actions."""
        return self.label_embedder if self.condition == "label" else self.action_embedder

    def forward(
        self, latents: Tensor, timesteps: Tensor, *, label: Tensor | None = None, action: Tensor | None = None
    ) -> Tensor:
        """Velocity of every frame, each attending to itself and the frames before it.

        Args:
            latents: (B, F, C, h, w), clean or noisy.
            timesteps: (B, F), or (B,) with one time for all frames; −1 for clean frames, else 1000·sigma.
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
        """Same as `forward`, with time positions (F,) and a boolean attention mask of frames ``visible`` (F, F) given."""
        modulations = self.modulate(frame_times(timesteps, latents), label=label, action=action, dtype=latents.dtype)
        tokens = self.tokens_per_frame(latents)
        per_token = positions.repeat_interleave(tokens)[None]
        attended = visible.repeat_interleave(tokens, dim=0).repeat_interleave(tokens, dim=1)[None]
        mask = self._mask(per_token, per_token, attended, latents.dtype)
        table = self._table(positions[None], latents)
        x = self._embed(latents)
        for block, modulation in zip(self.transformer_blocks, modulations.blocks, strict=True):
            x = block(x, modulation, table, mask)
        return self._project(x, modulations, latents)

    def modulate(
        self, timesteps: Tensor, *, label: Tensor | None = None, action: Tensor | None = None, dtype: torch.dtype
    ) -> Modulations:
        """Modulations from times (B, F) and classes, see `forward`. Upstream rounds times to the latents' dtype first.

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

    def null_conditions(self, batch: int, num_frames: int, device: torch.device) -> dict[str, Tensor]:
        """The label (B,) or action (B, F) argument of the null class; empty for an unconditional model."""
        if self.condition is None:
            return {}
        shape = (batch,) if self.condition == "label" else (batch, num_frames)
        return {self.condition: torch.full(shape, self.null_class, device=device)}

    def encode_context(
        self,
        frames: Tensor,
        past: Tensor | None = None,
        num_past: int = 0,
        *,
        positions: Tensor | None = None,
        shared: Callable[[float], Modulations] | None = None,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """Keys and values of clean frames, to which the frame that follows them attends.

        Args:
            frames: (B, n, C, h, w); rows may be padded at the end.
            past: keys and values (layers, 2, B, T, heads, d) of the ``num_past`` frames before them, or None for none. With
                FAR-Long, only of frames that are as coarse or fine now as when these were computed.
            positions: ascending time positions (num_past + n,) of all these frames; by default 0, 1, ….
            shared: modulations by time, if they are the same for all frames; else pass label (B,) or action (B, n).

        Returns:
            (layers, 2, B, tokens of the n frames, heads, d), see `token_counts`.
        """
        batch, num_frames = frames.shape[:2]
        counts = self.token_counts(num_past + num_frames, frames)
        num_known = sum(counts[:num_past])
        memory = self.new_memory(batch, sum(counts), frames)
        if past is not None:
            memory[:, :, :, :num_known] = past
        if positions is None:
            positions = torch.arange(num_past + num_frames, device=frames.device)
        all_coarse = self.num_coarse(num_past + num_frames + 1)
        num_coarse = max(0, min(all_coarse - num_past, num_frames))
        start = num_past
        for coarse, piece in ((True, slice(0, num_coarse)), (False, slice(num_coarse, num_frames))):
            part = frames[:, piece]
            if part.shape[1] == 0:
                continue
            time = CLEAN_TIME * (COARSE_TIME_FACTOR if coarse else 1)
            if shared is not None:
                modulations = shared(time)
            else:
                times = torch.full(part.shape[:2], time, device=part.device)
                actions = None if action is None else action[:, piece]
                modulations = self.modulate(times, label=label, action=actions, dtype=part.dtype)
            end = start + part.shape[1]
            self._write_context(part, memory[:, :, :, : sum(counts[:end])], positions[:end], all_coarse, modulations, coarse)
            start = end
        return memory[:, :, :, num_known:]

    def new_memory(self, batch: int, num_tokens: int, like: Tensor) -> Tensor:
        """Uninitialised keys and values (layers, 2, B, num_tokens, heads, d) of ``like``'s device and dtype."""
        return like.new_empty((len(self.transformer_blocks), 2, *self.layer_shape(batch, num_tokens)))

    def layer_shape(self, batch: int, num_tokens: int) -> tuple[int, int, int, int]:
        """Shape of the keys, or values, of one layer: (batch, num_tokens, heads, d)."""
        attention = self.transformer_blocks[0].attn
        return batch, num_tokens, attention.num_heads, attention.to_k.out_features // attention.num_heads

    def next_frame(self, memory: Tensor, latents: Tensor, lengths: Sequence[int]) -> NextFrame:
        """Prepare a frame that follows clean ones.

        Args:
            memory: keys and values (layers, 2, B, T + S, heads, d); a row begins with those of its clean frames in order, and
                its last S tokens are reserved for the new frame.
            latents: (B, 1, C, h, w); only its size, device and dtype are used.
            lengths: numbers of clean frames (B,).
        """
        num_new = self.tokens_per_frame(latents)
        num_tokens = memory.shape[3] - num_new
        lengths = list(lengths) if len(set(lengths)) > 1 else list(lengths)[:1]
        if len(lengths) == 1 and num_tokens == sum(self.token_counts(lengths[0], latents)):
            return self.frame_after(memory, latents, torch.arange(lengths[0] + 1, device=latents.device))
        keys = torch.full((len(lengths), num_tokens + num_new), -1)
        for row, length in enumerate(lengths):
            counts = torch.tensor(self.token_counts(length, latents), dtype=torch.int64)
            keys[row, : int(counts.sum())] = torch.arange(length).repeat_interleave(counts)
            keys[row, num_tokens:] = length
        masked = self.slope_scale != 0 or bool((keys < 0).any())
        keys = upload(keys, latents.device)
        positions = keys[:, -1:]
        mask = None
        if masked:
            mask = self._mask(positions.expand(-1, num_new), keys, (keys >= 0)[:, None].expand(-1, num_new, -1), latents.dtype)
        return NextFrame(memory, self._table(positions, latents), [mask] * len(self.transformer_blocks))

    def frame_after(self, memory: Tensor, latents: Tensor, positions: Tensor) -> NextFrame:
        """The same where every row has as many clean frames, which fill the memory: no token is masked.

        Args:
            positions: ascending time positions (K+1,) of the K clean frames and of the new one.
        """
        mask = None
        if self.slope_scale != 0:
            keys = self._per_token(positions, latents, self.num_coarse(len(positions)))[None]
            queries = keys[:, -self.tokens_per_frame(latents) :]
            everything = torch.ones(1, queries.shape[1], keys.shape[1], dtype=torch.bool, device=latents.device)
            mask = self._mask(queries, keys, everything, latents.dtype)
        return NextFrame(memory, self._table(positions[None, -1:], latents), [mask] * len(self.transformer_blocks))

    def denoise(
        self, noisy: Tensor, modulations: Modulations, frame: NextFrame, on_attention: AttentionCallback | None = None
    ) -> Tensor:
        """Velocity (B, 1, C, h, w) of one noisy frame per row, (B, 1, C, h, w), that follows clean ones.

        ``on_attention`` is called by every block in order.
        """
        x = self._embed(noisy)
        layers = zip(self.transformer_blocks, modulations.blocks, frame.masks, frame.memory, strict=True)
        for block, modulation, mask, layer in layers:
            x = block(x, modulation, frame.table, mask, (layer[0], layer[1]), on_attention=on_attention)
        return self._project(x, modulations, noisy)

    def write_clean(
        self,
        clean: Tensor,
        modulations: Modulations,
        frame: NextFrame,
        coarse: bool = False,
        on_attention: AttentionCallback | None = None,
    ) -> None:
        """Write keys and values of clean frames (B, n, C, h, w) over the last tokens of ``frame.memory``, in place.

        ``on_attention`` is called by every block in order.
        """
        self.write_tokens(self._embed(clean, coarse), modulations, frame, coarse, on_attention)

    def write_tokens(
        self,
        x: Tensor,
        modulations: Modulations,
        frame: NextFrame,
        coarse: bool = False,
        on_attention: AttentionCallback | None = None,
    ) -> None:
        """The same for tokens (B, n, S, D) that are embedded already."""
        *blocks, last = zip(self.transformer_blocks, modulations.blocks, frame.masks, frame.memory, strict=True)
        for block, modulation, mask, layer in blocks:
            x = block(x, modulation, frame.table, mask, (layer[0], layer[1]), coarse, on_attention)
        block, modulation, mask, layer = last
        if on_attention is None:
            # Only keys and values of the last block are needed.
            block.write_context(x, modulation, frame.table, (layer[0], layer[1]), coarse)
        else:
            block(x, modulation, frame.table, mask, (layer[0], layer[1]), coarse, on_attention)

    def frame_table(self, latents: Tensor, coarse: bool = False) -> Tensor:
        """Rotary table (1, S, 1, d / 2) of one frame of latents (…, h, w) at time position 0."""
        return self._table(torch.zeros(1, 1, device=latents.device), latents, coarse)

    def key_prototypes(self, frames: Tensor, modulations: Modulations) -> Tensor:
        """Mean over tokens and heads of the first layer's keys before rotation, at full resolution and of unit norm.

        Args:
            frames: clean (B, F, C, h, w).
            modulations: of these frames, at the time of clean frames.

        Returns:
            (B, F, d), float32. They depend on the frame, not on its position.
        """
        first = self.transformer_blocks[0]
        keys = first.attn.key(modulated_norm(self._embed(frames), *modulations.blocks[0][:2]).flatten(1, 2))
        return F.normalize(keys.float().unflatten(1, (frames.shape[1], -1)).mean(dim=(2, 3)), dim=-1)

    def num_coarse(self, num_frames: int) -> int:
        """How many of the oldest of ``num_frames`` frames are coarse: none."""
        return 0

    def token_counts(self, num_context: int, latents: Tensor) -> list[int]:
        """Tokens of each of ``num_context`` clean frames (…, h, w) that precede a new frame."""
        num_coarse = self.num_coarse(num_context + 1)
        coarse = [self.tokens_per_frame(latents, True)] * num_coarse
        return coarse + [self.tokens_per_frame(latents)] * (num_context - num_coarse)

    def tokens_per_frame(self, latents: Tensor, coarse: bool = False) -> int:
        """Tokens of one frame of latents (…, h, w)."""
        rows, columns = self._grid(latents, coarse)
        return rows * columns

    def _attention(self, num_heads: int, head_dim: int, last: bool) -> Attention:
        return Attention(num_heads, head_dim)

    def _ends(self, coarse: bool) -> tuple[int, nn.Module, nn.Module]:
        """Patch size, embedding and projection of frames."""
        return self.patch_size, self.x_embedder, self.proj_out

    def _grid(self, latents: Tensor, coarse: bool) -> tuple[int, int]:
        patch_size = self._ends(coarse)[0]
        height, width = latents.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(f"latents of {height}×{width} cannot be cut into patches of {patch_size}")
        return height // patch_size, width // patch_size

    def _embed(self, latents: Tensor, coarse: bool = False) -> Tensor:
        """(B, F, C, h, w) to (B, F, S, D)."""
        patch_size, embedder, _ = self._ends(coarse)
        self._grid(latents, coarse)
        return apply_linear(embedder, patchify(latents, patch_size))

    def _project(self, x: Tensor, modulations: Modulations, latents: Tensor, coarse: bool = False) -> Tensor:
        """(B, F, S, D) to velocities (B, F, C, h, w), with the size of ``latents``."""
        patch_size, _, projector = self._ends(coarse)
        return unpatchify(apply_linear(projector, modulated_norm(x, *modulations.final)), patch_size, *latents.shape[-2:])

    def _table(self, positions: Tensor, latents: Tensor, coarse: bool = False) -> Tensor:
        """Rotary table of frames at ``positions`` (B or 1, F), rounded to the latents' dtype first, as upstream does."""
        spacing = self._ends(coarse)[0] // self.patch_size
        return rotary_table(positions.to(latents.dtype), *self._grid(latents, coarse), self.axes_dims_rope, spacing)

    def _mask(self, queries: Tensor, keys: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
        """Attention mask (B, 1, Tq, Tk) from frame positions of tokens (B, Tq) and (B, Tk) and ``visible`` (B, Tq, Tk).

        It always has four axes: torch has no fused CPU attention for a mask of three.
        """
        if self.slope_scale == 0:
            return visible[:, None]
        distance = keys[:, None, :] - queries[:, :, None]
        return (self.slope_scale * distance).to(dtype).masked_fill(~visible, float("-inf"))[:, None]

    def _per_token(self, positions: Tensor, latents: Tensor, num_coarse: int) -> Tensor:
        """Time positions of all tokens of frames at ``positions`` (F,), the first ``num_coarse`` of which are coarse."""
        pieces = ((positions[:num_coarse], True), (positions[num_coarse:], False))
        return torch.cat([piece.repeat_interleave(self.tokens_per_frame(latents, coarse)) for piece, coarse in pieces])

    def _write_context(
        self,
        frames: Tensor,
        memory: Tensor,
        positions: Tensor,
        num_coarse: int,
        modulations: Modulations,
        coarse: bool,
    ) -> None:
        """Write keys and values of clean frames (B, n, C, h, w) over the last tokens of the memory.

        The memory holds frames at ``positions`` (F,), these last; the first ``num_coarse`` are coarse, all if it has fewer.
        """
        num_new = frames.shape[1]
        keys = self._per_token(positions, frames, num_coarse)
        mask = None
        if num_new > 1 or self.slope_scale != 0:
            queries = keys[-num_new * self.tokens_per_frame(frames, coarse) :]
            mask = self._mask(queries[None], keys[None], (keys <= queries[:, None])[None], frames.dtype)
        table = self._table(positions[None, -num_new:], frames, coarse)
        self.write_clean(frames, modulations, NextFrame(memory, table, [mask] * len(memory)), coarse)


def frame_times(timesteps: Tensor, latents: Tensor) -> Tensor:
    """Times (B, F) from (B, F), or from (B,) with one time for all frames."""
    if timesteps.ndim == 1:
        timesteps = timesteps[:, None]
    return timesteps.expand(latents.shape[:2])
