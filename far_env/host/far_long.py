"""FAR-Long: FAR whose oldest frames are coarse, which bounds the cost of long histories (arXiv 2503.19325)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from far_env.host.blocks import Attention, LongAttention, initialise, patchify, unpatchify
from far_env.host.far import COARSE_TIME_FACTOR, FAR, frame_times

COARSE_COPIES = {
    "add_q_proj": "to_q",
    "add_k_proj": "to_k",
    "add_v_proj": "to_v",
    "to_add_out": "to_out.0",
    "norm_added_q": "norm_q",
    "norm_added_k": "norm_k",
}
"""Layers of attention for coarse tokens, and the fine ones from which they may be initialised."""


class FARLong(FAR):
    """FAR with a window: the newest ``short_term_ctx_winsize`` frames, the one being denoised included, are fine.

    Older frames are coarse: cut into patches of ``context_patch_size``, with separate embedding and attention projections and
    twice the time. The window attends to them; they do not attend to the window.

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
        num_frames = latents.shape[1]
        positions = torch.arange(num_frames, device=latents.device)
        visible = torch.ones(num_frames, num_frames, dtype=torch.bool, device=latents.device).tril()
        num_coarse = self.num_coarse(num_frames)
        return self.velocity(latents, timesteps, positions, visible, num_coarse=num_coarse, action=action)

    def velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        positions: Tensor,
        visible: Tensor,
        *,
        num_coarse: int = 0,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """Same as `FAR.velocity`, with the first ``num_coarse`` frames coarse; they never attend to the others."""
        times = frame_times(timesteps, latents)
        self._grid(latents, True)  # upstream refuses sizes that do not fit, even without coarse frames
        earlier: list[tuple[Tensor, Tensor]] | None = None
        counts = torch.full((latents.shape[1],), self.tokens_per_frame(latents), device=latents.device)
        counts[:num_coarse] = self.tokens_per_frame(latents, True)
        velocities = []
        for coarse, piece in ((True, slice(0, num_coarse)), (False, slice(num_coarse, latents.shape[1]))):
            frames, frame_time = latents[:, piece], times[:, piece] * (COARSE_TIME_FACTOR if coarse else 1)
            if frames.shape[1] == 0:
                continue
            actions = None if action is None else action[:, piece]
            modulations = self.modulate(frame_time, action=actions, dtype=latents.dtype)
            queries = positions[piece].repeat_interleave(counts[piece])
            keys = positions[: piece.stop].repeat_interleave(counts[: piece.stop])
            attended = visible[piece, : piece.stop].repeat_interleave(counts[piece], dim=0)
            attended = attended.repeat_interleave(counts[: piece.stop], dim=1)
            mask = self._mask(queries[None], keys[None], attended[None], latents.dtype)
            table = self._table(positions[piece][None], frames, coarse)
            x = self._embed(frames, coarse)
            memories = []
            for index, block in enumerate(self.transformer_blocks):
                # New tensors for every layer and pass, because autograd needs what was written unchanged.
                new = [x.new_empty(self.layer_shape(len(x), len(queries))) for _ in range(2)]
                memory = tuple(
                    new if earlier is None else (torch.cat(pair, dim=1) for pair in zip(earlier[index], new, strict=True))
                )
                x = block(x, modulations.blocks[index], table, mask, memory, coarse)
                memories.append(memory)
            earlier = memories
            velocities.append(self._project(x, modulations, frames, coarse))
        return torch.cat(velocities, dim=1)

    def num_coarse(self, num_frames: int) -> int:
        """How many of the oldest of ``num_frames`` frames are outside the window."""
        return max(0, num_frames - self.short_term_ctx_winsize)

    def _attention(self, num_heads: int, head_dim: int, last: bool) -> Attention:
        return LongAttention(num_heads, head_dim, last)

    def _ends(self, coarse: bool) -> tuple[int, nn.Module, nn.Module]:
        if not coarse:
            return super()._ends(coarse)
        return self.context_patch_size, self.context_embedder, self.context_proj_out


def make_transformer(config: Mapping[str, Any]) -> FAR:
    """A FARLong where the arguments hold a context_patch_size, else a FAR."""
    return (FARLong if "context_patch_size" in config else FAR)(**config)


def initialise_from(model: FAR, source: FAR) -> None:
    """Copy the weights of a transformer of the same size into ``model``, in place. The source may lack classes.

    The coarse parts of a FARLong are always initialised from the source's fine ones, so that a coarse frame is embedded as a
    blurred fine one and attended to from the start: projections are copies, the embedding is the mean over the fine patches it
    covers. The output projection of coarse frames is not changed.

    Raises:
        ValueError: if a weight is of another shape.
    """
    weights, state = source.state_dict(), model.state_dict()
    if isinstance(model, FARLong):
        for key in state:
            coarse = next((part for part in COARSE_COPIES if f".{part}." in key), None)
            if coarse is not None:
                weights[key] = weights[key.replace(coarse, COARSE_COPIES[coarse])]
        weights["context_embedder.weight"] = _blurred(source.x_embedder.weight, source.patch_size, model.context_patch_size)
        weights["context_embedder.bias"] = source.x_embedder.bias
    for key, value in state.items():
        if key.startswith("context_proj_out"):
            continue
        if source.condition is None and key.endswith("embedding_table.weight"):
            weights[key] = torch.zeros_like(value)  # so that the model begins as the source, whatever the class
        if key not in weights or weights[key].shape != value.shape:
            source_shape = tuple(weights[key].shape) if key in weights else "none"
            raise ValueError(f"{key} has shape {tuple(value.shape)}, in the transformer to start from {source_shape}")
        state[key] = weights[key]
    model.load_state_dict(state)


def _blurred(weight: Tensor, patch_size: int, coarse_size: int) -> Tensor:
    """An embedding (D, C·p²) of fine patches as one (D, C·P²) of coarse ones: the mean over the fine patches inside."""
    size = weight.shape[1] // patch_size**2 * coarse_size**2
    patches = unpatchify(torch.eye(size)[None, :, None], coarse_size, coarse_size, coarse_size)
    return (patchify(patches, patch_size) @ weight.detach().cpu().float().T)[0].mean(dim=1).T.to(weight)
