"""``far-env train-host``: a host is trained on worlds, videos or recorded episodes and saved with its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from far_env.config import parse
from far_env.host.training.config import HostTraining


def train_host(args: Sequence[str]) -> None:
    """Train a host on worlds, videos or recorded episodes."""
    config = parse(HostTraining, args, "far-env train-host", "Train a host on worlds, videos or recorded episodes.")
    from far_env.evaluation.host_training import train_host
    from far_env.host.training.processes import is_first_process

    host = train_host(config)
    if not is_first_process():
        return
    print((Path(config.output_dir) / "README.md").read_text(encoding="utf-8"))
    print(f"host {host.weights_hash} saved in {config.output_dir}")
