"""The settings of ``far-env train-compressor``. Imports no torch, so that ``--help`` answers quickly."""

from __future__ import annotations

from dataclasses import dataclass

from far_env.config import require_positive


@dataclass(frozen=True)
class CompressorTraining:
    """Everything that determines a trained compressor."""

    workload: str = "orbit"
    """Whose clips, host and use of actions it is trained with."""
    host: str | None = None
    """Train for another host than the workload's: a shipped one or a folder."""
    steps: int = 2_000
    """Optimiser steps."""
    batch_size: int = 12
    """Histories per step."""
    learning_rate: float = 1e-3
    """Highest learning rate of AdamW; it rises over the warm-up, and falls to 0 along half a cosine."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup: int = 50
    """Steps in which the learning rate rises."""
    clips: int = 320
    """Train clips that are encoded once; batches are drawn from them."""
    validation_clips: int = 32
    """Validation clips of the measured losses."""
    validate_every: int = 500
    """Steps between measurements of the validation loss; 0 for one at the end alone."""
    block_frames: int = 4
    """Frames that are compressed together: 1, 2, 4 or 8."""
    channels: int = 96
    """Channels of the high-resolution branch."""
    branches: str = "both"
    """both, or one branch alone: high or low."""
    max_sink: int = 2
    """Largest number of first frames at full resolution."""
    max_blocks: int = 8
    """Largest number of compressed blocks in a history."""
    min_recent: int = 2
    """Smallest number of newest frames at full resolution."""
    max_recent: int = 10
    """Largest number of them."""
    teacher: bool = True
    """Learn the velocities that the host predicts with all frames in place of the blocks; without, the host's own loss, on true
    frames, which has more noise."""
    predicted: int = 4
    """Frames predicted after each history, the last ones."""
    noise_mean: float = 0.8
    """Noise levels are sigmoid(N(noise_mean, 1)), except for the share pure_noise_share."""
    pure_noise_share: float = 0.5
    """Share of noise levels that are 1, where the history matters most."""
    context_noise: float = 0.15
    """Half of the histories carry noise of up to this sigma, in place of the errors of generated ones."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    run_dir: str = "runs/compressor"
    """Folder of the checkpoint, encoded clips and TensorBoard logs; the same command resumes from here."""
    output_dir: str = "runs/compressor/compressor"
    """Folder of the finished compressor: weights, config.json and card."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "auto"
    """float32, bfloat16 or auto."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "learning_rate", "warmup", "clips", "validation_clips", "channels")
        require_positive(self, "max_blocks", "min_recent", "predicted", "checkpoint_every")
        if self.max_recent < self.min_recent:
            raise ValueError(f"max_recent must be at least min_recent {self.min_recent}, got {self.max_recent}")
        for name in ("validate_every", "max_sink", "weight_decay", "context_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or above, got {getattr(self, name)}")
        if not 0 <= self.pure_noise_share <= 1:
            raise ValueError(f"pure_noise_share must be from 0 to 1, got {self.pure_noise_share}")
