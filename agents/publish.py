"""Ship a finished run as a policy that comes with the package: its scorer, its settings, and a card of measured numbers.

    python -m far_env.agents.publish runs/pan_tight pan-tight

Everything on the card is read from the run folder. The policy is named ``pretrained/pan-tight`` from then on; shipping another
run under the same name replaces it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
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
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import ObservationSpec
from far_env.agents.ppo import AgentTraining

from far_env.cli import run_guarded
from far_env.config import load_yaml, parse, save_yaml
from far_env.envs.episodes import ROW_FEATURES
from far_env.evaluation.table import markdown_table, source_lines
from far_env.io import make_run_dir, write_text
from far_env.provenance import load_facts

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Options:
    """Ship a finished run as pretrained/NAME."""

    run: tyro.conf.Positional[str]
    """Run folder of train_agent.py."""
    name: tyro.conf.Positional[str]
    """Lower-case letters, digits and hyphens."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded("far_env.agents.publish", lambda: _main(args))


def ship(run: Path, name: str, shelf: Path = PRETRAINED_DIR) -> Path:
    """Copy a finished run's scorer and settings to the policies that ship, write its card, and return its folder.

    Raises:
        ValueError: if the run is not finished or is damaged, or if the name or the folder cannot be used.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"the name of a pretrained policy is made of lower-case letters, digits and hyphens, got {name!r}")
    network, facts = load_scorer(run)
    settings = load_yaml(AgentTraining, run / SETTINGS_FILE)
    results, sessions = _results(run, facts), load_facts(run)
    if not sessions:
        raise ValueError(f"{run} does not tell what made it (run.json is missing); train it again")
    folder = make_run_dir(shelf / name)
    told = {key: value for key, value in facts.items() if key != "network"}
    save_scorer(network, facts["network"], told, folder)
    save_yaml(settings, folder / SETTINGS_FILE)
    sha256 = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    card = _card(f"{PRETRAINED}{name}", sha256, network, facts, settings, results, sessions, _time(run, sessions))
    write_text(folder / CARD_FILE, card)
    return folder


def _results(run: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's final tables, one for each workload and budget.

    Raises:
        ValueError: if there are none, or if they were made with other hosts than the policy.
    """
    path = run / RESULTS_FILE
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
        hosts = dict.fromkeys(f"{table['host']} ({table['weights']})" for table in tables if table["policies"][LEARNED]["psnr"])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; only a finished run can be shipped") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run train_agent.py again to make its table anew") from error
    if (host := ", ".join(hosts)) != facts.get("host"):
        raise ValueError(f"{path} was made with host {host}, the policy with {facts.get('host')}; train it again")
    return tables


def _card(
    name: str,
    sha256: str,
    network: RetentionNetwork,
    facts: dict[str, Any],
    settings: AgentTraining,
    results: list[dict[str, Any]],
    sessions: list[dict[str, Any]],
    time: str,
) -> str:
    def told(key: str, separator: str = ", then ") -> str:
        """What the sessions say of themselves, each thing once, in order."""
        return separator.join(dict.fromkeys(str(session[key]) for session in sessions))

    stages = []
    if settings.imitation.true_clips:
        stages.append(
            f"imitation of an expert that knows the clip, on the true frames of {settings.imitation.true_clips:,} clips"
        )
    if settings.imitation.rounds:
        count = settings.imitation.rounds
        rounds = f"{count} round{'s' * (count > 1)} of imitation"
        stages.append(f"{rounds} of an expert that knows what the clip will show, in rollouts")
    kept = f"the scorer that is best on {settings.validation_clips} validation clips by {settings.reward.metric.upper()}"
    for ppo, where in ((settings.surrogate, "with a stand-in for the host"), (settings.ppo, "with the host")):
        if ppo.total_timesteps:
            stages.append(f"{ppo.total_timesteps:,} decisions of PPO {where}, of which {kept} is kept")
    sees = (
        f"of each kept frame {', '.join(ROW_FEATURES)} as the benchmark tells them, the budget and the step"
        f"{_beyond(network.view)}."
    )
    if network.view.memory:
        sees += " It remembers its decisions within a clip, hence the frames' true ages and what each looked like when new."
    if network.view.surroundings:
        sees += " It also remembers how frames changed around each one, and compares frames by that."
    if network.view.places:
        sees += " From that it concludes which frames show the same place or shot."
    if network.view.path:
        sees += " From that it concludes how far apart frames are along the camera's path."
    if network.sequential_eviction:
        sees += " Where several frames have to go, it drops one after the other, and scores the rest anew."
    export = "" if network.view.signals else f"far-env export {name} --out policy.py\n"
    shown = [
        table | {"policies": {name if own == LEARNED else own: row for own, row in table["policies"].items()}}
        for table in results
    ]
    sources = "\n".join(f"- {line}." for line in source_lines(results))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"""\
# {name}

A learned rule for which frames an autoregressive video model keeps: a set transformer over the frames of the history, which
scores each of them; the newest frame and the best positive ones stay.

- Trained on: {facts["trained_on"]}.
- Training: {"; then ".join(stages)}.
- Test: {results[0]["clips"]} {results[0]["split"]} clips for each world and budget, which training has not seen.
- Host: {facts["host"]}, {told("dtype")} on {told("machine")}.
- Sees: {sees}
- Command: `{told("command", "`, then `")}`; all settings are in {SETTINGS_FILE}.
- Time: {time}.
- Made by: commit {facts["commit"]}, torch {sessions[-1]["versions"]["torch"]}.
- Weights: {parameters:,} parameters, float32, SHA-256 {sha256}.

## Measured quality

{markdown_table(shown)}

{sources}
- Intervals are bootstraps over clips; differences are paired, clip by clip.

## Use

```sh
far-env evaluate --workload {settings.workload} --budget {settings.budget} --policies {name},recent_fill
{export}```
"""


def _beyond(view: ObservationSpec) -> str:
    """What a scorer sees that the benchmark does not show."""
    if not view.signals:
        return "; no pixels, no latents, no attention"
    return f"; beyond the benchmark {', '.join(view.signals)} of the kept frames, so that it cannot be exported"


def _time(run: Path, sessions: list[dict[str, Any]]) -> str:
    """How long the training took; runs whose sessions do not tell have the time of PPO's updates in their logs."""
    known = [session.get("training_seconds") for session in sessions]
    if None not in known:
        return f"{sum(known) / 60:.1f} minutes"
    logs = [csv.DictReader(path.read_text().splitlines()) for path in sorted(run.glob("progress_*.csv"))]
    elapsed = [max((float(row["time/time_elapsed"] or 0) for row in log), default=0) for log in logs]
    return f"{sum(elapsed) / 60:.1f} minutes of PPO; imitation was not timed"


def _main(args: list[str]) -> None:
    options = parse(Options, args, "python -m far_env.agents.publish", Options.__doc__ or "")
    print(f"shipped {ship(Path(options.run), options.name)}; its card is {CARD_FILE} there")


if __name__ == "__main__":
    sys.exit(main())
