"""One training run from settings to table: learn in stages, keep the best scorer, compare it on held-out clips."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from far_env.agents.budgets import deciding_budgets
from far_env.agents.checkpoints import LEARNED, RESULTS_FILE, SETTINGS_FILE, WEIGHTS_FILE, save_scorer
from far_env.agents.config import TOKENS, AgentTraining
from far_env.agents.imitation import INDEX_FILE, ImitationStage, last_round
from far_env.agents.network import RetentionNetwork, network_with_weights
from far_env.agents.ppo import CHECKPOINT_FILE, PPOStage
from far_env.agents.surrogate import SurrogateVectorEnv
from far_env.agents.training_callbacks import Weights
from far_env.agents.validation import memory_of, scorer_policy
from far_env.clips.clip import SPLITS
from far_env.config import load_yaml, save_yaml
from far_env.device import denormals_flushed
from far_env.envs.rendering import save_comparison
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.table import results_table
from far_env.io import disk_errors, locked, make_run_dir, write_json, write_text
from far_env.policies import load_policy, load_token_policy
from far_env.provenance import add_to_facts, run_facts, save_facts, session_precision
from far_env.workload import Workload
from far_env.workloads import make_workload, resolve_budgets

FREE_TO_CHANGE = ("resume", "run_dir", "device", "test_clips", "table", "ray")
"""Settings that may differ when a run is resumed; all others determine the training."""
EXPERT_DATA_FOLDER = "expert_data"
SURROGATE_FOLDER = "surrogate"
_FILES_OF_STAGES = (
    CHECKPOINT_FILE,
    WEIGHTS_FILE,
    f"{SURROGATE_FOLDER}/{CHECKPOINT_FILE}",
    f"{EXPERT_DATA_FOLDER}/{INDEX_FILE}",
)
"""A folder with one of them holds a run."""


@denormals_flushed()
def train(config: AgentTraining) -> None:
    """Train, keep the scorer that is best on validation clips, print and save the table on test clips."""
    in_tokens = config.network.memory == TOKENS
    baselines = {name: (load_token_policy if in_tokens else load_policy)(name) for name in config.table}
    with opened_run(config) as run:
        with _timed(run):
            scorer = learn(run)
        save_run_scorer(run, scorer)
        tables = compare(run, {LEARNED: scorer_policy(scorer), **baselines})
    following = f"evaluate --memory tokens --policies {run.folder}" if in_tokens else f"export {run.folder} --out policy.py"
    print(f"{tables}\n\nrun folder: {run.folder}\nnext: far-env {following}")


@dataclass(frozen=True)
class Run:
    """A training run whose settings have been checked.

    Attributes:
        folder: the run folder.
        facts: provenance of this session, see `far_env.provenance.run_facts`.
    """

    config: AgentTraining
    workloads: list[Workload]
    budgets: tuple[int, ...]
    folder: Path
    facts: dict[str, Any]


class Stage(Protocol):
    """A part of the training that resumes from its files; a finished stage only returns its weights."""

    def run(self, start: Weights | None) -> Weights:
        """Train from these weights of the scorer, or from a new scorer; returns the weights it ends with."""


def stages(run: Run) -> list[Stage]:
    """The configured stages of a run, in order: imitation, PPO with the surrogate, PPO with the host."""
    config, experiment = run.config, (run.config, run.workloads, run.budgets)
    imitated = run.folder / EXPERT_DATA_FOLDER
    planned: list[Stage] = []
    if config.imitation.collects or config.imitation.start is not None:
        planned.append(ImitationStage(*experiment, imitated))
    if config.surrogate.total_timesteps:
        folder = run.folder / SURROGATE_FOLDER
        planned.append(PPOStage("PPO with the surrogate", *experiment, config.surrogate, SurrogateVectorEnv, folder, imitated))
    if config.ppo.total_timesteps:
        planned.append(PPOStage("PPO with the host", *experiment, config.ppo, FrameRetentionVectorEnv, run.folder, imitated))
    return planned


def learn(run: Run) -> RetentionNetwork:
    """Run the stages in order; each starts from the weights of the previous one.

    Raises:
        KeyboardInterrupt: on Ctrl-C; ``resume`` continues from the stages' files.
        ValueError: if such a file is damaged or was made with other settings or another host.
    """
    weights = None
    for stage in stages(run):
        weights = stage.run(weights)
    return network_with_weights(run.config.network, weights)


def compare(run: Run, policies: dict[str, Any]) -> str:
    """Evaluate the policies on test clips of every workload under every budget; save results, return the tables."""
    clips = range(run.config.test_clips)
    memory, kind = memory_of(run.config), run.config.network.memory
    results = [
        evaluate(workload, budget, policies, clips, memory=memory)
        for workload in run.workloads
        for budget in deciding_budgets(kind, workload, run.budgets)
    ]
    write_json(run.folder / RESULTS_FILE, {"tables": [result.summary() for result in results]})
    tables = "\n\n".join(map(results_table, results))
    write_text(run.folder / "results.txt", tables + "\n")
    if memory is None:
        pictured = {"recent_fill": load_policy("recent_fill"), LEARNED: policies[LEARNED]}
        first = run.workloads[0]
        save_comparison(run.folder / "comparison.png", first, deciding_budgets(kind, first, run.budgets)[0], pictured)
    return tables


@contextmanager
def opened_run(config: AgentTraining) -> Iterator[Run]:
    """Check the settings; create the run folder or open one to resume, and record settings and provenance in it.

    During the block no other process can open it.

    Raises:
        ValueError: if something would fail after the training, or if the folder holds another run, is used by another process
            or cannot be written.
    """
    config, workloads, budgets = checked(config)
    folder = make_run_dir(config.run_dir)
    with locked(folder), disk_errors(folder):
        check_run_dir(config, folder)
        facts = run_facts(workloads[0].host.device, workloads[0].host.dtype)
        save_yaml(config, folder / SETTINGS_FILE)
        save_facts(folder, facts)
        yield Run(config, workloads, budgets, folder, facts)


def checked(config: AgentTraining) -> tuple[AgentTraining, list[Workload], tuple[int, ...]]:
    """The settings with the numbers of clips that there are, the workloads and the budgets.

    Raises:
        ValueError: if something would fail after the training.
    """
    budgets, workloads = resolve_budgets(config.budget), make_workloads(config)
    for workload in workloads:
        _check_some_clips(workload)
    if config.allow_fewer_clips:
        config = _with_available_clips(config, workloads)
    for workload in workloads:
        _check_fits(config, workload, budgets)
    for stage in (config.surrogate, config.ppo):
        if stage.imitation_steps:
            last_round(config, workloads, budgets, stage.other_workload_names(config.workload_names))
    return config, workloads, budgets


def make_workloads(config: AgentTraining) -> list[Workload]:
    """The workloads to train on. Raises ValueError on an unknown name, or if a stage's environments cannot be shared evenly."""
    precision = session_precision(Path(config.run_dir), config.precision)
    place = {"host": config.host, "device": config.device, "precision": precision, "feedback": config.feedback}
    return [make_workload(name, **place, **config.source_options) for name in config.workload_names]


def save_run_scorer(run: Run, scorer: RetentionNetwork) -> None:
    """Write the scorer into the run folder, unless it is there already."""
    if not (run.folder / WEIGHTS_FILE).exists():
        save_scorer(scorer, run.config.network, _scorer_facts(run), run.folder)


def check_run_dir(config: AgentTraining, folder: Path) -> None:
    """Raise ValueError if a run would be overwritten, or resumed with other settings."""
    if not any((folder / name).exists() for name in _FILES_OF_STAGES):
        return
    if not config.resume:
        raise ValueError(f"{folder} already holds a run; add --resume to continue it, or choose another --run-dir")
    before, now = asdict(load_yaml(AgentTraining, folder / SETTINGS_FILE)), asdict(config)
    changed = [key for key in now if key not in FREE_TO_CHANGE and now[key] != before[key]]
    if changed:
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(changed)}); choose another --run-dir")


def _check_fits(config: AgentTraining, workload: Workload, budgets: Sequence[int]) -> None:
    """Raise ValueError before the training about what would fail after it."""
    deciding_budgets(config.network.memory, workload, budgets)
    if config.validation_clips < len(budgets):
        raise ValueError(
            f"validation_clips is {config.validation_clips}, fewer than the {len(budgets)} budgets that share them"
        )
    for split in SPLITS:
        count, available = getattr(config, f"{split}_clips"), workload.clips.num_clips(split)
        if count > available:
            raise ValueError(f"{split}_clips is {count}, but {workload.name}/{split} has {available}")


def _check_some_clips(workload: Workload) -> None:
    """Raise ValueError if a split of the workload is empty."""
    counts = {split: workload.clips.num_clips(split) for split in SPLITS}
    played = getattr(workload.clips, "benchmark_clips", None)
    if 0 not in counts.values():
        return
    empty = next(split for split, count in counts.items() if count == 0)
    reason = "give a folder with more videos"
    if played is not None and getattr(workload.clips, "protocol", None) == "benchmark":
        reason = (
            f"its {counts['test']} videos are clips that the benchmark plays, which are never trained on; give a folder with "
            f"more than {played + 1} videos"
        )
    raise ValueError(f"{workload.name}/{empty} has no clips: {reason}")


def _with_available_clips(config: AgentTraining, workloads: Sequence[Workload]) -> AgentTraining:
    """The settings with at most as many clips as every workload has; prints what there is less of."""
    fewer = {}
    for split in SPLITS:
        wanted, available = getattr(config, f"{split}_clips"), min(workload.clips.num_clips(split) for workload in workloads)
        if available < wanted:
            fewer[f"{split}_clips"] = available
            print(f"{split}_clips is {available}, not {wanted}: there are no more", file=sys.stderr)
    return replace(config, **fewer)


def _scorer_facts(run: Run) -> dict[str, Any]:
    """The facts about the scorer's training in policy.json."""
    config = run.config
    worlds, budgets = ", ".join(workload.name for workload in run.workloads), ", ".join(map(str, run.budgets))
    hosts = dict.fromkeys(f"{workload.host.name} ({workload.host.weights_hash})" for workload in run.workloads)
    clip_options = ", ".join(f"{name} {value}" for name, value in dict(config.clip_options or {}).items())
    clips = f"first {config.train_clips} train clips" + (f" with {clip_options}" if clip_options else "")
    fed_back = ", true frames fed back" * any(workload.true_feedback for workload in run.workloads)
    begun = "" if config.imitation.start is None else f", begun with {config.imitation.start}"
    return {
        "trained_on": f"{worlds}, budget {budgets}, {clips}, seed {config.seed}{fed_back}{begun}",
        "decisions": config.ppo.total_timesteps,
        "decisions_with_surrogate": config.surrogate.total_timesteps,
        "host": ", ".join(hosts),
        "commit": run.facts["commit"],
    }


@contextmanager
def _timed(run: Run) -> Iterator[None]:
    """Record how long the training takes; after Ctrl-C, print how to resume."""
    start = time.perf_counter()
    try:
        yield
    except KeyboardInterrupt:
        how = "" if run.config.resume else " with --resume"
        print(f"\nstopped; run the same command{how} to continue from the last update in {run.folder}", file=sys.stderr)
        raise
    finally:
        add_to_facts(run.folder, {"training_seconds": round(time.perf_counter() - start, 1)})
