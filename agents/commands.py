"""The commands of the learned policies; each module is imported when its command is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from far_env.config import parse


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained policy as one self-contained Python file for the benchmark."""

    run: tyro.conf.Positional[str]
    """Run folder of train_agent.py, or pretrained/NAME for a policy that ships."""
    out: str = "policy.py"


def train(args: Sequence[str]) -> int | None:
    """Train a retention policy, compare it on held-out clips and leave a run folder."""
    from far_env.agents.ppo import AgentTraining
    from far_env.agents.trainer import train

    return train(parse(AgentTraining, args, "far-env train", AgentTraining.__doc__ or ""))


def export(args: Sequence[str]) -> None:
    """Write a trained policy as one self-contained Python file for the benchmark."""
    options = parse(ExportOptions, args, "far-env export", ExportOptions.__doc__ or "")
    from far_env.agents.checkpoints import scorer_folder
    from far_env.agents.export import export_run

    export_run(scorer_folder(options.run), Path(options.out))
    print(f"wrote {options.out}")


def publish(args: Sequence[str]) -> int:
    """Publish a finished run as a pretrained policy."""
    from far_env.agents import publish

    return publish.main(args)


def sweep(args: Sequence[str]) -> int:
    """Search for better training options."""
    from far_env.agents import sweep

    return sweep.main(args)


def regret(args: Sequence[str]) -> int:
    """Measure what policies lose against searches that know the clip."""
    from far_env.agents import regret

    return regret.main(args)


def learning_curves(args: Sequence[str]) -> int:
    """Draw the validation scores of runs."""
    from far_env.agents import learning_curves

    return learning_curves.main(args)


def reproduce(args: Sequence[str]) -> None:
    """Measure the tables of RESULTS.md anew."""
    from far_env.agents import reproduce

    reproduce.run_reproduce(args)
