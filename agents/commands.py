"""The commands of ``far-env`` that train, publish, share and measure agents.

Nothing heavy is imported before a command's options are parsed, so that ``--help`` is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from far_env.agents.options import (
    ExportOptions,
    LearningCurveOptions,
    PublishOptions,
    PushOptions,
    RegretOptions,
    ReproduceOptions,
    Sweep,
    TrainOptions,
)
from far_env.config import parse

Options = TypeVar("Options")

TRAIN_DESCRIPTION = """\
Train a retention policy, compare it with others on held-out clips, and leave a run folder.

The run folder contains policy.safetensors and policy.json (the scorer), config.yaml, run.json (command, commit, versions),
results.json, results.txt, comparison.png, TensorBoard logs, and the checkpoints from which --resume continues.
far-env export RUN_DIR turns it into a benchmark file.
"""


def train(args: Sequence[str], prog: str = "far-env train") -> None:
    """Train a retention policy."""
    options = parse(TrainOptions, args, prog, TRAIN_DESCRIPTION)
    if options.dry_run:
        from far_env.agents.dry_run import dry_run

        dry_run(options.settings, options.tflops)
        return
    from far_env.agents.trainer import train as train_agent

    train_agent(options.settings)


def export(args: Sequence[str]) -> None:
    """Write a trained policy as one Python file."""
    options = _parse(ExportOptions, args, "export")
    from far_env.agents.checkpoints import scorer_folder, source
    from far_env.agents.export import export_run
    from far_env.hub import is_hub_name

    folder = scorer_folder(options.run)
    export_run(folder, Path(options.out), source(options.run) if is_hub_name(options.run) else None)
    print(f"wrote {options.out}")


def publish(args: Sequence[str]) -> None:
    """Publish a finished run as a pretrained policy."""
    options = _parse(PublishOptions, args, "publish")
    from far_env.agents.publish import CARD_FILE, publish_run

    folder = publish_run(Path(options.run), options.name)
    print(f"published pretrained/{options.name} in {folder}; its model card is {CARD_FILE} there")


def push(args: Sequence[str]) -> None:
    """Share a policy, a host or results on the Hugging Face hub."""
    options = _parse(PushOptions, args, "push")
    from far_env.agents.push import push_folder

    print(f"pushed; {push_folder(options.folder, options.to, private=options.private)} is what was pushed")


def sweep(args: Sequence[str]) -> None:
    """Search settings of a training run."""
    options = _parse(Sweep, args, "sweep")
    from far_env.agents.sweep import sweep as run_sweep

    run_sweep(options)


def regret(args: Sequence[str]) -> None:
    """Measure the regret of policies against searches."""
    options = _parse(RegretOptions, args, "regret")
    from far_env.agents.regret import measure_regret

    measure_regret(options)


def learning_curves(args: Sequence[str]) -> None:
    """Draw the learning curves of runs."""
    options = _parse(LearningCurveOptions, args, "learning-curves")
    from far_env.agents.learning_curves import draw

    draw(options)
    print(f"wrote {options.out}")


def reproduce(args: Sequence[str]) -> None:
    """Measure the tables of RESULTS.md again."""
    options = _parse(ReproduceOptions, args, "reproduce")
    from far_env.agents.reproduce import reproduce as reproduce_tables

    reproduce_tables(options)


def _parse(cls: type[Options], args: Sequence[str], name: str) -> Options:
    return parse(cls, args, f"far-env {name}", cls.__doc__ or "")
