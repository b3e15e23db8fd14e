"""The settings of ``far-env train-host``: validated dataclasses. Imports no torch, so that ``--help`` answers quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from far_env.config import require_positive


@dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of the autoencoder's training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers.AutoencoderDC; scaling_factor is measured after training."""
    steps: int = 2500
    """Optimiser steps."""
    batch_size: int = 32
    """Frames per step."""
    learning_rate: float = 2e-3
    """Highest learning rate."""
    warmup: int = 50
    """Steps in which the learning rate rises to its highest value."""
    latent_noise: float = 0.1
    """Largest standard deviation of the noise added to latents, relative to that of the latents; each frame draws its level
    uniformly up to this. The transformer's errors resemble such noise, so this gains rollouts more decibels than it costs
    reconstructions."""
    frames_per_clip: int = 4
    """Frames that are drawn from each clip of a batch."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "learning_rate", "warmup", "frames_per_clip")
        if self.batch_size % self.frames_per_clip:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of frames_per_clip {self.frames_per_clip}")


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of the transformer's training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of far_env.host.far.FAR, or, with a context_patch_size, of far_env.host.far_long.FARLong."""
    steps: int = 7_000
    """Optimiser steps."""
    clips_per_world: int = 8_000
    """Train clips that are encoded once; batches are drawn from them."""
    batch_size: int = 16
    """Histories per step."""
    muon_learning_rate: float = 0.02
    """Learning rate of the attention and MLP matrices."""
    adamw_learning_rate: float = 2e-3
    """Learning rate of all other parameters."""
    weight_decay: float = 0.01
    """Weight decay of both optimisers."""
    warmup: int = 100
    """Steps in which the learning rates rise to their highest values."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which becomes the host."""
    contiguous_every: int = 5
    """One batch in this many has contiguous histories, without dropped frames."""
    min_contiguous: int = 16
    """Shortest contiguous history of such a batch; the longest is the whole clip."""
    contiguous_predicted: int = 4
    """Frames predicted in such a batch, drawn again for every batch; predicting all would cost more than it improves."""
    max_older: int = 6
    """Largest number of random older frames in front of a tail."""
    max_tail: int = 6
    """Longest contiguous tail; the shortest has 2 frames, and the last frame is predicted."""
    noisy_copies: int = 2
    """Noise levels drawn per predicted frame; they share the clean history's cost."""
    noise_mean: float = 0.8
    """Noise levels are sigmoid(N(noise_mean, 1)), except for the share pure_noise_share."""
    pure_noise_share: float = 0.25
    """Share of noise levels that are 1."""
    context_noise: float = 0.15
    """Half of the histories carry noise of up to this sigma while their time is that of clean frames; this reduces drift."""

    def __post_init__(self) -> None:
        counts = ("steps", "clips_per_world", "batch_size", "contiguous_every", "min_contiguous", "contiguous_predicted")
        require_positive(self, *counts, "noisy_copies", "muon_learning_rate", "adamw_learning_rate", "warmup")
        if self.max_tail < 2:
            raise ValueError(f"max_tail must be at least 2, got {self.max_tail}: a tail is a frame and its successor")


@dataclass(frozen=True)
class HostTraining:
    """Everything that determines the trained host."""

    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    """Training of the autoencoder, the first stage."""
    transformer: TransformerTraining = field(default_factory=TransformerTraining)
    """Training of the transformer, the second stage."""
    worlds: tuple[str, ...] = ("pan", "cuts")
    """Procedural worlds to train on, in equal shares."""
    start_from: str | None = None
    """A host (shipped, or a folder) whose autoencoder is reused and whose transformer initialises this one."""
    autoencoder_of: str | None = None
    """The shipped host that contains this autoencoder; its file is then not written again."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    run_dir: str = "runs/host"
    """Folder of checkpoints, encoded clips and TensorBoard logs; the same command resumes from here."""
    output_dir: str = "runs/host/host"
    """Folder of the finished host: weights, config.json and model card."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "auto"
    """float32, bfloat16 or auto."""
    num_steps: int = 4
    """Default number of ODE steps of workloads on this host."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    quality_clips: int = 256
    """Test clips per world for the model card; 0 skips the measurement."""
    quality_budget: int = 4
    """Frame budget of recent_fill in the model card."""

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "checkpoint_every", "quality_budget")
