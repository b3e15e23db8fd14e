"""The host that the project is about: a FAR transformer (arXiv 2503.19325) with its autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from far_env.device import torch_defaults
from far_env.host.autoencoder import Autoencoder
from far_env.host.cuda_graphs import CudaCapture, CudaGraphs
from far_env.host.far import CLEAN_TIME, FAR
from far_env.host.protocol import Conditions, Host
from far_env.host.sampler import make_scheduler


@dataclass(frozen=True)
class FARHost(Host):
    """The frozen video model on one device.

    Attributes:
        name: the name or folder from which it was loaded.
        transformer, autoencoder: in eval mode, without gradients.
        weights_hash: eight hex digits: of the SHA-256 of config.json, which holds those of both weight files, or, of a released
            model, of the transformer's file.
        latent_shape: (C, h, w) of one frame at ``frame_size``.
        frame_size: side of its square frames in pixels.
        num_steps: default number of ODE steps of its workloads.
    """

    name: str
    transformer: FAR
    autoencoder: Autoencoder
    weights_hash: str
    latent_shape: tuple[int, int, int]
    frame_size: int = 64
    num_steps: int = 20

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights, in which it computes."""
        return next(self.transformer.parameters()).dtype

    @property
    def condition(self) -> str | None:
        """What the transformer is conditioned on: "action", "label" or None."""
        return self.transformer.condition

    @property
    def num_classes(self) -> int:
        """Actions or labels that the transformer knows, without the null class; 0 if it has none."""
        return self.transformer.null_class or 0

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one frame at full resolution."""
        return self.transformer.tokens_per_frame(torch.empty(self.latent_shape))

    @cached_property
    def cuda_graphs(self) -> CudaGraphs | None:
        """CUDA graphs of its next frames, on a GPU. They live as long as the host, and a host with other weights has others."""
        return CudaGraphs(self.transformer, CudaCapture(self.device)) if self.device.type == "cuda" else None

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (B, F, 3, H, W) in [0, 1] to scaled latents (B, F, C, h, w)."""
        return self.autoencoder.encode(frames)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w) to frames (B, F, 3, H, W), clamped to [0, 1]."""
        return self.autoencoder.decode(latents)

    @torch_defaults()
    @torch.no_grad()
    def generate(self, kept: Sequence[Tensor], noise: Tensor, conditions: Conditions) -> Tensor:
        """One new frame (C, h, w) after the kept ones (C, h, w), every ODE step over the whole sequence.

        Without actions and label, the null class is on all frames.
        """
        transformer = self.transformer
        null = transformer.null_conditions(1, len(kept) + 1, noise.device)
        classes = null
        if conditions.actions:
            classes = {"action": torch.tensor([conditions.actions], device=noise.device)}
        elif conditions.label is not None:
            classes = {"label": torch.tensor([conditions.label], device=noise.device)}
        scheduler = make_scheduler(conditions.num_steps, noise.device)
        frame = noise
        for time in scheduler.timesteps:
            sequence = torch.stack([*kept, frame])[None]
            times = torch.full(sequence.shape[:2], CLEAN_TIME, device=noise.device)
            times[:, -1] = time
            velocity = transformer(sequence, times, **classes)[0, -1]
            if conditions.guidance > 1:
                # classifier-free guidance, arXiv 2207.12598; the unconditional side has the null class on every frame
                unconditional = transformer(sequence, times, **null)[0, -1]
                velocity = unconditional + conditions.guidance * (velocity - unconditional)
            frame = scheduler.step(velocity, time, frame).prev_sample
        return frame


def require_far(host: Host, what: str) -> FARHost:
    """Return the host if it is a FAR. Raises ValueError, saying what needs one, if it is another."""
    if not isinstance(host, FARHost):
        raise ValueError(f"{what} needs a FAR or FAR-Long host, and {host.name} is another one")
    return host
