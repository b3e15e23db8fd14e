"""``far-env train-compressor``: a compressor of token memories is trained for a frozen host and saved with its card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from far_env.config import parse
from far_env.host.training.compressor_config import CompressorTraining


def train_compressor(args: Sequence[str]) -> None:
    """Train a compressor of token memories for a host."""
    config = parse(CompressorTraining, args, "far-env train-compressor", "Train a compressor of token memories for a host.")
    from far_env.evaluation.compressor_training import train

    train(config)
    print((Path(config.output_dir) / "README.md").read_text(encoding="utf-8"))
    print(f"compressor saved in {config.output_dir}")
