"""Learning curves of runs as one figure: the validation score over the decisions learned from.

python -m far_env.agents.learning_curves runs/pan_tight runs/pan_no_imitation --out curves.png
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from far_env.agents.checkpoints import SETTINGS_FILE
from far_env.agents.ppo import SURROGATE_FOLDER, AgentTraining, PPOSettings
from matplotlib import rc_context
from matplotlib.figure import Figure

from far_env.cli import run_guarded
from far_env.config import load_yaml
from far_env.evaluation.plots import COLOURS, MARKERS, STYLE, save_figure


@dataclass(frozen=True)
class Options:
    """Draw the learning curves of runs that were validated by the same metric."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of train_agent.py."""
    out: str = "curves.png"
    """A .png or .svg file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded(
        "far_env.agents.learning_curves", lambda: draw(tyro.cli(Options, args=args, prog="far_env.agents.learning_curves"))
    )


def curve(run: Path) -> tuple[str, list[tuple[int, float]]]:
    """The metric that a run was validated by, and (decisions, mean score) of each validation; a resumed run's are joined.

    Decisions with the stand-in come first, and count as those with the host do.

    Raises:
        ValueError: if the folder holds no run, or one without validations.
    """
    settings = load_yaml(AgentTraining, run / SETTINGS_FILE)
    metric, practised = settings.reward.metric, settings.surrogate.total_timesteps
    points = _validations(run / SURROGATE_FOLDER, settings.surrogate, metric) if practised else {}
    points |= {practised + decisions: score for decisions, score in _validations(run, settings.ppo, metric).items()}
    if not points:
        raise ValueError(f"{run} holds no validations: it is no run of train_agent.py with PPO, or has just begun")
    return metric, sorted(points.items())


def _validations(folder: Path, settings: PPOSettings, metric: str) -> dict[int, float]:
    """Decisions → score, from the logs of one stage."""
    update, points = settings.n_steps * settings.num_envs, {}
    for path in sorted(folder.glob("progress_*.csv")):
        # A session's file repeats what the one before it logged last.
        begun = int(path.stem.removeprefix("progress_"))
        points = {decisions: score for decisions, score in points.items() if decisions <= begun}
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if score := line.get(f"validation/{metric}"):
                    # Logged with the decisions that were collected after it, and at the end with none.
                    logged = line.get("time/total_timesteps")
                    points[int(logged) - update if logged else settings.total_timesteps] = float(score)
    return points


def draw(options: Options) -> None:
    """Write the figure. Raises ValueError without runs, if their metrics differ, or if the file cannot be written."""
    out = Path(options.out)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"curves are drawn into a .png or .svg file, not {out}")
    curves = {Path(run).name: curve(Path(run)) for run in options.runs}
    metrics = {metric for metric, _ in curves.values()}
    if len(metrics) != 1:
        raise ValueError(f"curves of one figure need one metric, got {', '.join(sorted(metrics)) or 'no runs'}")
    (metric,) = metrics
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, (name, (_, points)) in enumerate(curves.items()):
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 3}
            axes.plot(*zip(*points, strict=True), linewidth=1.4, label=name, **look)
        axes.set_xlabel("decisions learned from")
        axes.set_ylabel(f"validation {metric.upper()}{' (dB)' if metric == 'psnr' else ''}")
        axes.legend()
        save_figure(figure, out, out.suffix[1:], f"runs {', '.join(options.runs)}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
