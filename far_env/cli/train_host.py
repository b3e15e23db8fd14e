"""``far-env train-host``: a host is trained on the procedural worlds and saved with its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from far_env.config import parse
from far_env.host.training.config import HostTraining


def train_host(args: Sequence[str]) -> None:
    """Train a host on procedural worlds."""
    config = parse(HostTraining, args, "far-env train-host", "Train a host on procedural worlds.")
    from far_env.evaluation.host_training import train_host

    host = train_host(config)
    print((Path(config.output_dir) / "README.md").read_text(encoding="utf-8"))
    print(f"host {host.weights_hash} saved in {config.output_dir}")
