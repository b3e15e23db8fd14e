"""Publish a finished run as a pretrained policy: its scorer, its settings, and a model card of measured numbers.

Everything on the card is read from the run folder.
"""

from __future__ import annotations

import csv
import hashlib
import re
from pathlib import Path
from typing import Any

from far_env.agents.checkpoints import (
    LEARNED,
    PRETRAINED,
    PRETRAINED_DIR,
    RESULTS_FILE,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    load_scorer,
    save_scorer,
)
from far_env.agents.config import TOKENS, AgentTraining, NetworkConfig
from far_env.config import load_yaml, save_yaml
from far_env.evaluation.table import markdown_table, source_lines
from far_env.io import make_run_dir, read_json, write_text
from far_env.provenance import load_facts

CARD_FILE = "README.md"


def publish_run(run: Path, name: str, directory: Path = PRETRAINED_DIR) -> Path:
    """Copy a finished run's scorer and settings to a folder of the directory, and write its model card; returns the folder.

    Raises:
        ValueError: if the run is not finished or is damaged, or if the name or the folder cannot be used.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"the name of a pretrained policy is made of lower-case letters, digits and hyphens, got {name!r}")
    folder = directory / name
    write_published(run, folder, f"{PRETRAINED}{name}")
    return folder


def write_published(run: Path, folder: Path, name: str) -> None:
    """Write a finished run's scorer and settings, and a card for a policy of this name, into the folder.

    Raises:
        ValueError: if the run is not finished or is damaged, or if the folder cannot be written.
    """
    network, facts = load_scorer(run)
    settings = load_yaml(AgentTraining, run / SETTINGS_FILE)
    results, sessions = _results(run, facts), load_facts(run)
    if not sessions:
        raise ValueError(f"{run} has no record of how it was made (run.json is missing); train it again")
    make_run_dir(folder)
    save_scorer(network, settings.network, {key: value for key, value in facts.items() if key != "network"}, folder)
    save_yaml(settings, folder / SETTINGS_FILE)
    card = model_card(
        name,
        settings,
        facts | sessions_summary(sessions),
        results,
        time=_training_time(run, sessions),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        sha256=hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
    )
    write_text(folder / CARD_FILE, card)


def _results(run: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's final tables, one for each workload and budget.

    Raises:
        ValueError: if there are none, or if they were made with other hosts than the policy.
    """
    path = run / RESULTS_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing; only a finished run can be published")
    content = read_json(path, "run far-env train again to measure its table anew")
    try:
        tables = content["tables"]
        hosts = dict.fromkeys(f"{table['host']} ({table['weights']})" for table in tables if table["policies"][LEARNED]["psnr"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run far-env train again to measure its table anew") from error
    if (host := ", ".join(hosts)) != facts.get("host"):
        raise ValueError(f"{path} was made with host {host}, the policy with {facts.get('host')}; train it again")
    return tables


def sessions_summary(sessions: list[dict[str, Any]]) -> dict[str, str]:
    """The card's facts from a run's sessions; a run that was resumed has several."""

    def all_of(key: str, separator: str = ", then ") -> str:
        return separator.join(dict.fromkeys(str(session[key]) for session in sessions))

    try:
        return {
            "place": f"{all_of('dtype')} on {all_of('machine')}",
            "command": all_of("command", "`, then `"),
            "torch": sessions[-1]["versions"]["torch"],
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"run.json of the run is damaged (it lacks {error}); train it again") from error


def model_card(
    name: str,
    settings: AgentTraining,
    facts: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    time: str,
    parameters: int,
    sha256: str,
) -> str:
    """The card in Markdown.

    Args:
        facts: of policy.json and `sessions_summary`.
        results: the run's tables.
        time: of the training.
        parameters: their number.
        sha256: of the weights.
    """
    named = [
        table | {"policies": {name if policy == LEARNED else policy: row for policy, row in table["policies"].items()}}
        for table in results
    ]
    measured = "\n".join([markdown_table(named), "", *(f"- {line}." for line in source_lines(results))])
    tested = f"{results[0]['clips']} {results[0]['split']} clips"
    about = facts | {"tested": tested, "time": time, "parameters": f"{parameters:,}", "sha256": sha256}
    return card_text(name, settings, about, measured)


def card_text(name: str, settings: AgentTraining, about: dict[str, str], measured: str) -> str:
    """The Markdown template of a card, filled.

    Args:
        about: trained_on, tested, host, place, command, time, commit, torch, parameters and sha256.
        measured: the table of results and its sources.
    """
    in_tokens = settings.network.memory == TOKENS
    exported = "" if settings.network.signals or in_tokens else f"far-env export {name} --out policy.py\n"
    memory, dropped = ("--memory tokens ", "dropped or compressed") if in_tokens else ("", "dropped")
    return f"""\
# {name}

A learned policy that decides which history frames an autoregressive video model keeps: an edge-conditioned set
transformer over the frames seen so far assigns a score to each frame of the history; the newest frame stays, and of the others
the one with the lowest score is {dropped}, until the history fits the budget.

- Trained on: {about["trained_on"]}.
- Training: {_stages(settings)}.
- Test: {about["tested"]} for each world and budget, which were not used in training.
- Host: {about["host"]}, {about["place"]}.
- Inputs: {_inputs(settings.network)}
- Command: `{about["command"]}`; all settings are in {SETTINGS_FILE}.
- Time: {about["time"]}.
- Made by: commit {about["commit"]}, torch {about["torch"]}.
- Weights: {about["parameters"]} parameters, float32, SHA-256 {about["sha256"]}.

## Measured quality

{measured}
- Intervals are bootstraps over clips; differences are paired, clip by clip.

## Use

```sh
far-env evaluate {memory}--workload {settings.workload} --budget {settings.budget} --policies {name},recent_fill
{exported}```
"""


def _stages(settings: AgentTraining) -> str:
    """The stages of the training, in order."""
    imitation, stages = settings.imitation, []
    if imitation.start is not None:
        stages.append(f"the weights of {imitation.start} to begin with")
    if imitation.true_clips:
        clips = f"{imitation.true_clips:,} clips"
        stages.append(f"imitation of an expert that uses the true rest of the clip, on the true frames of {clips}")
    for kind, clips in imitation.collected_rounds:
        where = "true frames" if kind == "true" else "rollouts"
        stages.append(f"imitation of the expert's decisions in the scorer's own {where} of {clips:,} clips")
    kept = (
        f"keeping the scorer that is best on {settings.validation_clips} validation clips by {settings.reward.metric.upper()}"
    )
    for ppo, where in ((settings.surrogate, "a surrogate of the host"), (settings.ppo, "the host")):
        if ppo.total_timesteps:
            on = f" on {ppo.workload.replace(',', ', ')}" if ppo.workload else ""
            steps = f", after each update {ppo.imitation_steps} steps of imitation of the others" if ppo.imitation_steps else ""
            stages.append(f"{ppo.total_timesteps:,} decisions of PPO with {where}{on}{steps}, {kept}")
    return "; then ".join(stages)


def _inputs(network: NetworkConfig) -> str:
    """The scorer's inputs."""
    inputs = (
        "of each kept frame the benchmark's feature_drift, temporal_similarity and motion_strength; the budget and the step"
    )
    if network.signals:
        inputs += f"; beyond the benchmark {', '.join(network.signals)} of the kept frames, so that it cannot be exported."
    else:
        inputs += "; no pixels, no latents, no attention."
    remembers = "It remembers what all calls for a clip contained, of dropped frames too: which frames were compared, and how."
    return f"{inputs} {remembers}" if network.dropped_frames else inputs


def _training_time(run: Path, sessions: list[dict[str, Any]]) -> str:
    """The duration of the training; for runs whose sessions do not record it, the time of PPO's updates from their logs."""
    seconds = [session.get("training_seconds") for session in sessions]
    if None not in seconds:
        return f"{sum(seconds) / 60:.1f} minutes"
    logs = [csv.DictReader(path.read_text(encoding="utf-8").splitlines()) for path in sorted(run.glob("progress_*.csv"))]
    elapsed = [max((float(row["time/time_elapsed"] or 0) for row in log), default=0) for log in logs]
    return f"{sum(elapsed) / 60:.1f} minutes of PPO; imitation was not timed"
