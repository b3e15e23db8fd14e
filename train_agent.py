"""Train a retention policy, compare it on held-out clips, leave a run folder.

    python train_agent.py --config configs/pan_tight.yaml
    python train_agent.py --config configs/pan_tight.yaml --run-dir runs/other --seed 1 --ppo.learning-rate 3e-4

The run folder holds policy.safetensors and policy.json (the scorer), config.yaml, run.json (command, commit, versions),
results.json, results.txt, comparison.png, TensorBoard logs and the checkpoint that --resume goes on from.
``far-env export RUN`` turns it into a benchmark file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from far_env.agents.ppo import AgentTraining
from far_env.agents.trainer import train

from far_env.cli import run_guarded
from far_env.config import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded("train_agent.py", lambda: train(parse(AgentTraining, args, "train_agent.py", __doc__ or "")))


if __name__ == "__main__":
    sys.exit(main())
