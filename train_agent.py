"""Train a retention policy, compare it with others on held-out clips, and leave a run folder; the same as ``far-env train``.

    python train_agent.py --config configs/pan_tight.yaml
    python train_agent.py --config configs/pan_tight.yaml --run-dir runs/other --seed 1 --ppo.learning-rate 3e-4

The steps, in `far_env.agents.trainer.train`: make the workloads, learn in stages (imitation, PPO with a surrogate of the host,
PPO with the host), keep the scorer that is best on validation clips, and evaluate it beside baselines on test clips.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from far_env.agents.commands import train
from far_env.cli import run_guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded("train_agent.py", lambda: train(args, "train_agent.py"))


if __name__ == "__main__":
    sys.exit(main())
