"""``far-env extended``: quality under budgets of tokens, where demoted frames stay as coarse tokens. Not the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from far_env.cli.console import keeping_episodes
from far_env.cli.options import split_list, whole_number
from far_env.config import parse, require_positive
from far_env.io import locked, make_run_dir
from far_env.policies import FULL_HISTORY, load_policy, policy_facts


@dataclass(frozen=True)
class ExtendedOptions:
    """Compare policies under budgets of tokens, demoted frames being coarse. Not the benchmark; for FAR-Long hosts alone."""

    out: str
    """Folder for the figure and the numbers; the same command resumes where it stopped."""
    workload: str = "orbit"
    """A registered workload."""
    tokens: str = "64,128,192,256"
    """Tokens of the history that each generated frame may attend to; one or more."""
    policies: str = f"recent_fill,sink_recent_fine,far_coarse,packforcing_coarse,{FULL_HISTORY}"
    """Comma-separated: the policies for token budgets (sink_recent_fine, far_coarse, packforcing_coarse), baselines, .py files,
    run folders, pretrained/NAME, policies of plugins, or full_history: the host's default, with its window fine and all older
    frames coarse. A path that holds a comma is put in double quotes."""
    clips: int = 16
    """Number of clips, from the first of the split on."""
    seed: int = 42
    """Noise seed; clip i is played with it plus i."""
    split: str = "test"
    """train, validation or test."""
    host: str | None = None
    """A FAR-Long: shipped, released or a host folder; by default the host of the workload."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "float32"
    """float32, bfloat16 or auto."""
    batch_size: int = 16
    """Clips that are played together."""
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""


def extended(args: Sequence[str]) -> None:
    """Compare policies under token budgets, with coarse frames."""
    options = parse(ExtendedOptions, args, "far-env extended", ExtendedOptions.__doc__ or "")
    from far_env.clips.clip import check_clip_id
    from far_env.evaluation.extended import ExtendedRun, load_parts, parts_table, save_quality_figure
    from far_env.provenance import run_facts, save_facts, session_precision
    from far_env.rollout.extended import check_token_budget
    from far_env.workloads import make_workload

    require_positive(options, "clips", "batch_size")
    if options.seed < 0:
        raise ValueError(f"--seed takes a whole number from 0 on, got {options.seed}")
    budgets = sorted({whole_number(text, "tokens") for text in split_list(options.tokens, "tokens", "token budget")})
    names = split_list(options.policies, "policies", "policy")
    policies = {name: load_policy(name) for name in names}
    facts = {name: policy_facts(name) for name in names}
    clip_options = {} if options.data_dir is None else {"data_dir": options.data_dir}
    precision = session_precision(Path(options.out), options.precision)
    place = {"host": options.host, "device": options.device, "precision": precision}
    workload = make_workload(options.workload, **place, **clip_options)
    for budget in budgets:
        check_token_budget(workload.host, budget)
    check_clip_id(workload.clips, options.split, options.clips - 1)
    folder = make_run_dir(options.out)
    run = ExtendedRun(workload, options.split, options.clips, options.seed, options.batch_size, options.data_dir)
    with locked(folder):
        saved = load_parts(folder, run.settings())
        save_facts(folder, run_facts(workload.host.device, workload.host.dtype))
        with keeping_episodes(folder, "parts"):
            parts = run.play(policies, facts, budgets, saved, folder)
    source = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in run.settings().items())
    save_quality_figure(parts, folder, f"{workload.name}, {options.clips} clips, extended (not the benchmark)", source)
    print(f"{parts_table(parts)}\n\nextended, not the benchmark: {source}\n\nnumbers and figure in {Path(options.out)}")
