"""FAR-Long: FAR whose oldest frames are coarse, so that long histories stay affordable (arXiv 2503.19325)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from far_env.host.blocks import Attention, LongAttention, initialise
from far_env.host.far import COARSE_TIME_FACTOR, FAR, frame_times


class FARLong(FAR):
    """FAR with a window: the newest ``short_term_ctx_winsize`` frames, the one being denoised included, are seen in full.

    Older frames are cut into patches of ``context_patch_size``, have embedding and attention projections of their own, twice
    the time, and are seen by the window but do not see it.

    Args:
        context_patch_size: side of a coarse token in latent pixels.
        config: everything else, see `FAR`. Labels are not supported.

    Raises:
        ValueError: on sizes that do not fit together, or a label condition.
    """

    def __init__(self, context_patch_size: int = 4, **config: Any) -> None:
        super().__init__(**config)
        if self.condition == "label":
            raise ValueError("FARLong takes actions or nothing as condition, not labels")
        if context_patch_size % self.patch_size:
            raise ValueError(f"context_patch_size {context_patch_size} must be a multiple of patch_size {self.patch_size}")
        self.context_patch_size = context_patch_size
        dim = self.x_embedder.out_features
        pixels = context_patch_size**2
        self.context_embedder = nn.Linear(self.in_channels * pixels, dim)
        self.context_proj_out = nn.Linear(dim, self.proj_out.out_features // self.patch_size**2 * pixels)
        initialise(self.context_embedder, zeroed=())
        for parameter in self.context_proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, latents: Tensor, timesteps: Tensor, *, label: Tensor | None = None, action: Tensor | None = None
    ) -> Tensor:
        """Velocity of every frame, coarse ones included; see `FAR.forward`."""
        times = frame_times(timesteps, latents)
        num_frames = latents.shape[1]
        num_coarse = self.num_coarse(num_frames)
        self._grid(latents, True)  # upstream refuses sizes that do not fit, even without coarse frames
        positions = torch.arange(num_frames, device=latents.device)
        known: list[tuple[Tensor, Tensor]] | None = None
        known_keys = positions[:0]
        velocities = []
        for coarse, piece in ((True, slice(0, num_coarse)), (False, slice(num_coarse, num_frames))):
            frames, own_times = latents[:, piece], times[:, piece] * (COARSE_TIME_FACTOR if coarse else 1)
            if frames.shape[1] == 0:
                continue
            actions = None if action is None else action[:, piece]
            modulations = self.modulate(own_times, action=actions, dtype=latents.dtype)
            queries = positions[piece].repeat_interleave(self.tokens_per_frame(frames, coarse))
            keys = torch.cat([known_keys, queries])
            mask = self._mask(queries[None], keys[None], (keys <= queries[:, None])[None], latents.dtype)
            table = self._table(positions[piece][None], frames, coarse)
            x = self._embed(frames, coarse)
            memories = []
            for index, block in enumerate(self.transformer_blocks):
                # Tensors of its own for every layer and pass: autograd needs what was written to stay as it is.
                room = [x.new_empty(self.layer_shape(len(x), len(queries))) for _ in range(2)]
                memory = tuple(
                    room if known is None else (torch.cat(pair, dim=1) for pair in zip(known[index], room, strict=True))
                )
                x = block(x, modulations.blocks[index], table, mask, memory, coarse)
                memories.append(memory)
            known, known_keys = memories, keys
            velocities.append(self._project(x, modulations, frames, coarse))
        return torch.cat(velocities, dim=1)

    def num_coarse(self, num_frames: int) -> int:
        """Those that the window leaves out."""
        return max(0, num_frames - self.short_term_ctx_winsize)

    def _attention(self, num_heads: int, head_dim: int, last: bool) -> Attention:
        return LongAttention(num_heads, head_dim, last)

    def _ends(self, coarse: bool) -> tuple[int, nn.Module, nn.Module]:
        if not coarse:
            return super()._ends(coarse)
        return self.context_patch_size, self.context_embedder, self.context_proj_out
