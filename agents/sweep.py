"""Search settings of a training run by their score on validation clips, with Optuna (``pip install -e ".[sweep]"``).

    python -m far_env.agents.sweep --config configs/sweep.yaml

Trials are kept in a database in the sweep's folder, each trains in a run folder of its own, and a stopped sweep goes on where
it stopped. Test clips are never looked at. ``best.yaml`` is the best trial's configuration, for train_agent.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_env.agents.ppo import AgentTraining, train_scorer, validation_scores
from far_env.agents.trainer import begin_run

from far_env.cli import run_guarded
from far_env.config import from_dict, load_yaml, parse, require_positive, save_yaml
from far_env.errors import unknown_name
from far_env.io import make_run_dir, write_text

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
BEST_FILE = "best.yaml"
RANGE_KEYS = ("low", "high", "log", "choices")


@dataclass(frozen=True)
class Sweep:
    """What is searched."""

    base: str = "configs/pan_tight.yaml"
    """Configuration of train_agent.py; its seed, clips and all that is not searched stay as they are."""
    run_dir: str = "runs/sweep"
    trials: int = 20
    seed: int = 0
    """Of the search (a tree-structured Parzen estimator)."""
    search: dict = field(default_factory=dict)
    """Setting, such as ppo.learning_rate → {low, high, log} or {choices}; whole numbers where low and high are."""

    def __post_init__(self) -> None:
        require_positive(self, "trials")
        if not self.search:
            raise ValueError("a sweep needs something to search: give settings and their ranges under search")
        for name, given in self.search.items():
            if not isinstance(given, dict) or not ("choices" in given) ^ {"low", "high"}.issubset(given):
                raise ValueError(f"search: {name} needs either low and high, or choices; got {given!r}")
            for key in given:
                if key not in RANGE_KEYS:
                    raise ValueError(f"search: {name}: {unknown_name('key', key, RANGE_KEYS)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_guarded("far_env.agents.sweep", lambda: sweep(parse(Sweep, args, "far_env.agents.sweep", __doc__ or "")))


def sweep(options: Sweep) -> None:
    """Train trial after trial until as many are finished as are asked for, and write the best one's configuration.

    What is tried next depends on the seed and the finished trials alone, so a stopped sweep tries the same again and its
    training goes on from the last checkpoint.

    Raises:
        ValueError: if Optuna is missing, on an unknown setting, or if the folder holds another sweep.
    """
    try:
        import optuna
    except ImportError as error:
        raise ValueError('a sweep needs Optuna; install it with pip install -e ".[sweep]"') from error
    base = load_yaml(AgentTraining, options.base)
    for name in options.search:
        changed(base, {name: setting(base, name)})
    folder = make_run_dir(options.run_dir)
    _check_same(folder, options, base)
    storage = f"sqlite:///{(folder / STUDY_FILE).resolve()}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize", load_if_exists=True)
    states = optuna.trial.TrialState
    for left in study.get_trials(states=(states.RUNNING,)):
        study.tell(left.number, state=states.FAIL)
    while (number := len(study.get_trials(states=(states.COMPLETE,)))) < options.trials:
        study.sampler = optuna.samplers.TPESampler(seed=options.seed * 10_000 + number)
        trial = study.ask()
        chosen = {name: _suggest(trial, name, given) for name, given in options.search.items()}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        config = changed(base, {**chosen, "run_dir": str(folder / digest), "resume": True})
        print(f"trial {number + 1} of {options.trials}: {_told(chosen)}")
        score = _score(config)
        study.tell(trial, score)
        shown, best = (config.reward.sign * value for value in (score, study.best_value))
        print(f"validation {config.reward.metric} {shown:.3f}; best so far {best:.3f}")
    best = study.best_params
    save_yaml(changed(base, {**best, "run_dir": str(folder / "best")}), folder / BEST_FILE)
    print(f"\nbest of {options.trials}: {_told(best)}\nnext: python train_agent.py --config {folder / BEST_FILE}")


def setting(config: AgentTraining, name: str) -> Any:
    """The value of a setting such as ppo.learning_rate. Raises ValueError if there is none."""
    value: Any = asdict(config)
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            known = list(value) if isinstance(value, dict) else []
            raise ValueError(f"search: {name}: {unknown_name('setting', key, known)}")
        value = value[key]
    return value


def changed(config: AgentTraining, values: Mapping[str, Any]) -> AgentTraining:
    """The configuration with other values of some settings. Raises ValueError on an unknown one or a value that cannot be."""
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
    workloads, budgets, run_dir, _ = begin_run(config)
    network = train_scorer(config, workloads, budgets, run_dir)
    scores = validation_scores(config, workloads, budgets, network)
    return config.reward.sign * sum(scores.values()) / len(scores)


def _suggest(trial: optuna.Trial, name: str, given: dict[str, Any]) -> Any:
    if "choices" in given:
        return trial.suggest_categorical(name, given["choices"])
    low, high = given["low"], given["high"]
    log = bool(given.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, float(low), float(high), log=log)


def _check_same(folder: Path, options: Sweep, base: AgentTraining) -> None:
    """Note what is searched, or refuse a folder where something else was."""
    about = {"search": options.search, "seed": options.seed, "base": json.loads(json.dumps(asdict(base)))}
    path = folder / "sweep.json"
    if path.exists() and json.loads(path.read_text()) != about:
        raise ValueError(f"{folder} holds another sweep (see sweep.json); choose another run_dir")
    write_text(path, json.dumps(about, indent=2) + "\n")


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
