"""Learning curves of runs as one figure: the validation score over the decisions learned from."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from far_env.agents.checkpoints import SETTINGS_FILE
from far_env.agents.config import AgentTraining, PPOSettings
from far_env.agents.options import LearningCurveOptions
from far_env.agents.trainer import SURROGATE_FOLDER
from far_env.agents.training_logs import TIMESTEPS, VALIDATED_AT
from far_env.config import load_yaml
from far_env.errors import first_line
from far_env.evaluation.plots import COLOURS, MARKERS, STYLE, save_figure


def curve(run: Path) -> tuple[str, list[tuple[int, float]]]:
    """The metric of a run's validations, and (decisions, mean score) of each; the sessions of a resumed run are joined.

    Decisions with the surrogate come first and are counted like those with the host.

    Raises:
        ValueError: if the folder contains no run, or one without validations.
    """
    settings = load_yaml(AgentTraining, run / SETTINGS_FILE)
    metric, before = settings.reward.metric, settings.surrogate.total_timesteps
    points = _validations(run / SURROGATE_FOLDER, settings.surrogate, metric) if before else {}
    points |= {before + decisions: score for decisions, score in _validations(run, settings.ppo, metric).items()}
    if not points:
        raise ValueError(f"{run} contains no validations: it is no run of far-env train with PPO, or has just begun")
    return metric, sorted(points.items())


def _validations(folder: Path, settings: PPOSettings, metric: str) -> dict[int, float]:
    """Decisions → mean validation score, from the logs of one stage."""
    update, points = settings.n_steps * settings.num_envs, {}
    for path in sorted(folder.glob("progress_*.csv")):
        if not path.stem.removeprefix("progress_").isdecimal():
            continue
        # A session's file repeats the last validation of the session before.
        begun = int(path.stem.removeprefix("progress_"))
        points = {decisions: score for decisions, score in points.items() if decisions <= begun}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    if score := line.get(f"validation/{metric}"):
                        validated = line.get(VALIDATED_AT)
                        if not validated:
                            # Older versions logged a validation with the decisions collected after it, the last one without.
                            logged = line.get(TIMESTEPS)
                            validated = int(logged) - update if logged else settings.total_timesteps
                        points[int(validated)] = float(score)
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} is damaged ({first_line(error)}); restore it or leave the run out") from error
    return points


def draw(options: LearningCurveOptions) -> None:
    """Write the figure. Raises ValueError without runs, if their metrics differ, or if the file cannot be written."""
    out = Path(options.out)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"curves are drawn into a .png or .svg file, not {out}")
    curves = {run: curve(run) for run in map(Path, options.runs)}
    names = Counter(run.name for run in curves)
    metrics = {metric for metric, _ in curves.values()}
    if len(metrics) != 1:
        raise ValueError(f"curves of one figure need one metric, got {', '.join(sorted(metrics)) or 'no runs'}")
    (metric,) = metrics
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, (run, (_, points)) in enumerate(curves.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 3}
            label = run.name if names[run.name] == 1 else str(run)
            axes.plot(*zip(*points, strict=True), linewidth=1.4, label=label, **style)
        axes.set_xlabel("decisions learned from")
        axes.set_ylabel(f"validation {metric.upper()}{' (dB)' if metric == 'psnr' else ''}")
        axes.legend()
        save_figure(figure, out, out.suffix[1:], f"runs {', '.join(options.runs)}")
