"""First stage of training a host: fit a small DCAE to frames of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from torch import Tensor

from far_env.host.autoencoder import Autoencoder
from far_env.host.training.config import AutoencoderTraining
from far_env.host.training.episodes import Episodes
from far_env.host.training.histories import draw_sources
from far_env.host.training.loop import cosine_with_warmup, run_steps, set_learning_rate, step_generator
from far_env.host.training.muon import ConvolutionMuon, split_parameters


def train_autoencoder(
    config: AutoencoderTraining,
    sources: Sequence[Episodes],
    shares: Sequence[float],
    run_dir: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpoint_every: int = 500,
) -> Autoencoder:
    """Train (or finish training) and return the autoencoder in float32 with its measured scaling factor.

    Loss: L1 + 2·MSE in [−1, 1] pixels, with noise on the latents so that the decoder becomes robust to errors in them.
    """
    torch.manual_seed(seed)
    model = Autoencoder(**config.model).to(device, memory_format=torch.channels_last)
    optimizers = _make_optimizers(config, model)

    def train_step(step: int) -> dict[str, float]:
        frames = _frame_batch(config, sources, shares, step).to(device, memory_format=torch.channels_last) * 2 - 1
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, cosine_with_warmup(step, config.steps, config.warmup))
        model.train()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            latent = model.dcae.encode(frames).latent
            generator = step_generator(seed, 1, step)
            level = config.latent_noise * torch.rand((len(latent), 1, 1, 1), generator=generator)
            noise = (level * torch.randn(latent.shape, generator=generator)).to(latent)
            # The standard deviation is not detached: otherwise the encoder could outgrow the noise without limit.
            output = model.dcae.decode(latent + latent.std() * noise).sample
        error = output.float() - frames
        loss = error.abs().mean() + 2 * error.square().mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        mse = error.detach().square().mean() / 4
        return {"loss": loss.item(), "psnr": -10 * mse.log10().item()}

    state = {"model": model, **optimizers}
    run_steps("autoencoder", run_dir, config.steps, state, train_step, checkpoint_every=checkpoint_every)
    model.eval()
    scale_to_unit_variance(model)
    sample = _frame_batch(config, sources, shares, config.steps).to(device)
    with torch.no_grad():
        std = model.dcae.encode(sample * 2 - 1).latent.std().item()
    trained = Autoencoder(**{**config.model, "scaling_factor": round(1 / std, 4)}).to(device)
    trained.load_state_dict(model.state_dict())
    return trained.eval()


@torch.no_grad()
def scale_to_unit_variance(model: torch.nn.Module) -> None:
    """Scale the kernels before batch norms so that what they put out has about unit variance; what the model does is the same.

    A batch norm makes the size of these kernels irrelevant, so in training it grows, until float16 cannot hold the statistics.
    """
    for block in model.modules():
        if isinstance(block, ResBlock) and isinstance(block.norm, torch.nn.BatchNorm2d):
            scale = block.norm.running_var.mean().sqrt()
            block.conv2.weight /= scale
            block.norm.running_mean /= scale
            block.norm.running_var /= scale.square()


def _make_optimizers(config: AutoencoderTraining, model: Autoencoder) -> dict[str, torch.optim.Optimizer]:
    """AdamW for everything, or, with a learning rate of Muon, Muon for the kernels between the first and the last layer."""
    if config.muon_learning_rate is None:
        return {"optimizer": torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)}
    kernels, others = split_parameters(model, lambda name, p: p.ndim == 4 and "conv_in" not in name and "conv_out" not in name)
    return {
        "optimizer": torch.optim.AdamW(others, lr=config.learning_rate, weight_decay=0.01),
        "muon": ConvolutionMuon(kernels, lr=config.muon_learning_rate, weight_decay=0.01),
    }


def _frame_batch(config: AutoencoderTraining, sources: Sequence[Episodes], shares: Sequence[float], step: int) -> Tensor:
    """Frames (batch, 3, H, W) of train windows that no other step uses, as long as there are enough."""
    num_clips = config.batch_size // config.frames_per_clip
    numbers = range(step * num_clips, (step + 1) * num_clips)
    frames = []
    for number, source in zip(numbers, draw_sources(shares, num_clips, (6, step), numbers.start), strict=True):
        window = sources[source].draw(number)
        # A short window gives some frames twice.
        repeated = len(window) < config.frames_per_clip
        picked = np.random.default_rng(number).choice(len(window), config.frames_per_clip, replace=repeated)
        frames.append(window[picked])
    return torch.from_numpy(np.concatenate(frames))
