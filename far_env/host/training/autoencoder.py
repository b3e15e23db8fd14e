"""First stage of the embedded host: fit a small DCAE to frames of the procedural worlds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_env.clips.worlds import World
from far_env.config import require_positive
from far_env.host.autoencoder import Autoencoder
from far_env.host.training.loop import cosine_with_warmup, run_steps, set_learning_rate, step_generator


@dataclass(frozen=True)
class AutoencoderTraining:
    """How the autoencoder is trained."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers.AutoencoderDC; scaling_factor is measured after training."""
    steps: int = 2500
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    latent_noise: float = 0.1
    """Largest standard deviation of the noise put on latents, as a share of theirs; each frame draws its own up to this.
    The transformer's errors look like such noise, so this buys rollouts more decibels than it costs reconstructions."""
    frames_per_clip: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "learning_rate", "warmup", "frames_per_clip")
        if self.batch_size % self.frames_per_clip:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of frames_per_clip {self.frames_per_clip}")


def train_autoencoder(
    config: AutoencoderTraining,
    worlds: list[World],
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint_every: int = 500,
) -> Autoencoder:
    """Train (or finish training) and return the autoencoder in float32 with its measured scaling factor.

    Loss: L1 + 2·MSE in [−1, 1] pixels, with noise on the latents so that the decoder forgives errors in them.
    """
    torch.manual_seed(seed)
    model = Autoencoder(**config.model).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)

    def train_step(step: int) -> dict[str, float]:
        frames = _frame_batch(config, worlds, step).to(device, memory_format=torch.channels_last) * 2 - 1
        set_learning_rate(optimizer, cosine_with_warmup(step, config.steps, config.warmup))
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            latent = model.dcae.encode(frames).latent
            generator = step_generator(seed, 1, step)
            level = config.latent_noise * torch.rand((len(latent), 1, 1, 1), generator=generator)
            noise = (level * torch.randn(latent.shape, generator=generator)).to(latent)
            # The spread is not detached: otherwise the encoder would outgrow the noise without end.
            output = model.dcae.decode(latent + latent.std() * noise).sample
        error = output.float() - frames
        loss = error.abs().mean() + 2 * error.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mse = error.detach().square().mean() / 4
        return {"loss": loss.item(), "psnr": -10 * mse.log10().item()}

    state = {"model": model, "optimizer": optimizer}
    run_steps("autoencoder", run_dir, config.steps, state, train_step, checkpoint_every=checkpoint_every)
    model.eval()
    sample = _frame_batch(config, worlds, config.steps).to(device)
    with torch.no_grad():
        std = model.dcae.encode(sample * 2 - 1).latent.std().item()
    trained = Autoencoder(**{**config.model, "scaling_factor": round(1 / std, 4)}).to(device)
    trained.load_state_dict(model.state_dict())
    return trained.eval()


def _frame_batch(config: AutoencoderTraining, worlds: list[World], step: int) -> Tensor:
    """Frames (batch, 3, 64, 64) of train clips that no other step uses, the worlds taking turns."""
    num_clips = config.batch_size // config.frames_per_clip
    frames = []
    for index in range(step * num_clips, (step + 1) * num_clips):
        world = worlds[index % len(worlds)]
        clip = world.clip("train", index % world.num_clips("train"))
        picked = np.random.default_rng(index).choice(len(clip.frames), config.frames_per_clip, replace=False)
        frames.append(clip.frames[picked])
    return torch.from_numpy(np.concatenate(frames))
