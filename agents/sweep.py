"""Search of a training run's settings by their score on validation clips, with Optuna (``pip install "far-env[sweep]"``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_env.agents.config import AgentTraining
from far_env.agents.options import Sweep
from far_env.agents.trainer import learn, opened_run
from far_env.agents.validation import validation_scores
from far_env.config import config_path, from_dict, load_yaml, save_yaml
from far_env.errors import unknown_name
from far_env.io import make_run_dir, read_json, write_json

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
BEST_FILE = "best.yaml"


def sweep(options: Sweep) -> None:
    """Train trial after trial until ``options.trials`` are finished, and write the best one's configuration.

    The next trial depends on the seed and the finished trials alone, so a stopped sweep repeats the trial that was stopped,
    whose training resumes from the last checkpoint.

    Raises:
        ValueError: if Optuna is missing, on an unknown setting, or if the folder contains another sweep.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError('a sweep needs Optuna; install it with pip install "far-env[sweep]"') from error
    base = load_yaml(AgentTraining, config_path(options.base))
    for name in options.search:
        changed(base, {name: setting(base, name)})
    folder = make_run_dir(options.run_dir)
    _check_same(folder, options, base)
    storage = f"sqlite:///{(folder / STUDY_FILE).resolve()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
    states = optuna.trial.TrialState
    for unfinished in study.get_trials(states=(states.RUNNING,)):
        study.tell(unfinished.number, state=states.FAIL)
    while (number := len(study.get_trials(states=(states.COMPLETE,)))) < options.trials:
        study.sampler = optuna.samplers.TPESampler(seed=options.seed * 10_000 + number)
        trial = study.ask()
        chosen = {name: _suggest(trial, name, search_range) for name, search_range in options.search.items()}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        config = changed(base, {**chosen, "run_dir": str(folder / digest), "resume": True})
        print(f"trial {number + 1} of {options.trials}: {_text(chosen)}")
        score = _score(config)
        study.tell(trial, score)
        current, best = (config.reward.sign * value for value in (score, study.best_value))
        print(f"validation {config.reward.metric} {current:.3f}; best so far {best:.3f}")
    best = study.best_params
    save_yaml(changed(base, {**best, "run_dir": str(folder / "best")}), folder / BEST_FILE)
    print(f"\nbest of {options.trials}: {_text(best)}\nnext: far-env train --config {folder / BEST_FILE}")


def setting(config: AgentTraining, name: str) -> Any:
    """The value of a setting such as ppo.learning_rate. Raises ValueError if there is none."""
    value: Any = asdict(config)
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            keys = list(value) if isinstance(value, dict) else []
            raise ValueError(f"search: {name}: {unknown_name('setting', key, keys)}")
        value = value[key]
    return value


def changed(config: AgentTraining, values: Mapping[str, Any]) -> AgentTraining:
    """The configuration with these settings changed. Raises ValueError on an unknown setting or an invalid value."""
    plain = asdict(config)
    for name, value in values.items():
        setting(config, name)
        *path, last = name.split(".")
        inner = plain
        for key in path:
            inner = inner[key]
        inner[last] = value
    return from_dict(AgentTraining, plain, "search")


def _score(config: AgentTraining) -> float:
    """Train, and score the best scorer on validation clips; higher is better."""
    with opened_run(config) as run:
        scores = validation_scores(config, run.workloads, run.budgets, learn(run))
    return config.reward.sign * sum(scores.values()) / len(scores)


def _suggest(trial: optuna.Trial, name: str, search_range: dict[str, Any]) -> Any:
    if "choices" in search_range:
        return trial.suggest_categorical(name, search_range["choices"])
    low, high = search_range["low"], search_range["high"]
    log = bool(search_range.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, float(low), float(high), log=log)


def _check_same(folder: Path, options: Sweep, base: AgentTraining) -> None:
    """Record what is searched. Raises ValueError if the folder contains a sweep of something else."""
    about = {"search": options.search, "seed": options.seed, "base": json.loads(json.dumps(asdict(base)))}
    path = folder / "sweep.json"
    if path.exists() and read_json(path, "choose another run_dir") != about:
        raise ValueError(f"{folder} contains another sweep (see sweep.json); choose another run_dir")
    write_json(path, about)


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
