"""One training run from settings to table: train, keep the best scorer by validation, compare it on held-out clips."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from far_env.agents.checkpoints import LEARNED, RESULTS_FILE, SETTINGS_FILE, WEIGHTS_FILE, load_policy, save_scorer
from far_env.agents.policies import AgentPolicy
from far_env.agents.ppo import CHECKPOINT_FILE, AgentTraining, experiment_facts, train_scorer

from far_env.config import load_yaml, save_yaml
from far_env.envs.rendering import save_comparison
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.table import results_table
from far_env.io import make_run_dir, write_text
from far_env.provenance import add_to_facts, run_facts, save_facts
from far_env.workloads import Workload, check_decides, resolve_budgets

FREE_TO_CHANGE = ("resume", "run_dir", "device", "test_clips", "table")
"""Settings that may differ when a run is resumed; all others shape the training."""


def train(config: AgentTraining) -> None:
    """Train, keep the best scorer by validation, print and save the table on test clips."""
    torch.set_flush_denormal(True)
    table_policies = {name: load_policy(name) for name in config.table}
    workloads, budgets, run_dir, facts = begin_run(config)
    start = time.perf_counter()
    try:
        network = train_scorer(config, workloads, budgets, run_dir)
    except KeyboardInterrupt:
        how = "" if config.resume else " with --resume"
        print(f"\nstopped; run the same command{how} to go on from the last update in {run_dir}", file=sys.stderr)
        raise
    finally:
        add_to_facts(run_dir, {"training_seconds": round(time.perf_counter() - start, 1)})
    if not (run_dir / WEIGHTS_FILE).exists():
        about = experiment_facts(config, workloads, budgets) | {"commit": facts["commit"]}
        save_scorer(network, asdict(config.network), about, run_dir)

    policies = {LEARNED: AgentPolicy(network), **table_policies}
    clips = range(config.test_clips)
    results = [evaluate(workload, budget, policies, clips) for workload in workloads for budget in budgets]
    write_text(run_dir / RESULTS_FILE, json.dumps({"tables": [own.summary() for own in results]}, indent=2) + "\n")
    tables = "\n\n".join(map(results_table, results))
    write_text(run_dir / "results.txt", tables + "\n")
    shown = {"recent_fill": load_policy("recent_fill"), LEARNED: policies[LEARNED]}
    save_comparison(run_dir / "comparison.png", workloads[0], budgets[0], shown)
    print(tables)
    print(f"\nrun folder: {run_dir}\nnext: far-env export {run_dir} --out policy.py")


def begin_run(config: AgentTraining) -> tuple[list[Workload], tuple[int, ...], Path, dict[str, Any]]:
    """Check the settings, and note them and where the run takes place in its folder, new or to be gone on with.

    Returns:
        The workloads, the budgets, the run folder, and the facts that were noted.

    Raises:
        ValueError: if something would fail after the training, or the folder holds another run.
    """
    budgets, workloads = resolve_budgets(config.budget), config.make_workloads()
    for workload in workloads:
        _check_fits(config, workload, budgets)
    run_dir = make_run_dir(config.run_dir)
    check_run_dir(config, run_dir)
    facts = run_facts(workloads[0].host.device, workloads[0].host.dtype)
    save_facts(run_dir, facts)
    save_yaml(config, run_dir / SETTINGS_FILE)
    return workloads, budgets, run_dir, facts


def _check_fits(config: AgentTraining, workload: Workload, budgets: Sequence[int]) -> None:
    """Tell what would fail after the training before it."""
    for budget in budgets:
        check_decides(workload, budget)
    if config.validation_clips < len(budgets):
        raise ValueError(
            f"validation_clips is {config.validation_clips}, fewer than the {len(budgets)} budgets that share them"
        )
    wanted = {"train": config.train_clips, "validation": config.validation_clips, "test": config.test_clips}
    for split, count in wanted.items():
        available = workload.clips.num_clips(split)
        if count > available:
            raise ValueError(f"{split}_clips is {count}, but {workload.name}/{split} has {available}")


def check_run_dir(config: AgentTraining, run_dir: Path) -> None:
    """Raise ValueError where a run would be overwritten, or gone on with under other settings."""
    if not any((run_dir / name).exists() for name in (CHECKPOINT_FILE, WEIGHTS_FILE)):
        return
    if not config.resume:
        raise ValueError(f"{run_dir} already holds a run; add --resume to go on with it, or choose another --run-dir")
    before = asdict(load_yaml(AgentTraining, run_dir / SETTINGS_FILE))
    now = asdict(config)
    changed = [key for key in now if key not in FREE_TO_CHANGE and now[key] != before[key]]
    if changed:
        raise ValueError(f"{run_dir} holds a run with other settings ({', '.join(changed)}); choose another --run-dir")
