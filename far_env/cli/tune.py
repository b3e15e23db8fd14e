"""``far-env tune``: parameters of policies by their score on validation clips → files that far-env evaluate plays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from far_env.cli.console import keeping_episodes
from far_env.cli.options import split_list, whole_number
from far_env.config import parse, parse_mapping
from far_env.io import make_run_dir
from far_env.policies import TunedForm, policy_variants


@dataclass(frozen=True)
class TuneOptions:
    """Choose the parameters of policies by their score on validation clips.

    Every policy has a grid of parameters (see far-env baselines NAME). For each policy, workload and budget a file
    OUT/POLICY_WORKLOAD_BUDGET.json names the best form and the number of validation rollouts that finding it took; give it to
    far-env evaluate --policies. The same command resumes where it stopped.
    """

    policies: tyro.conf.Positional[str]
    """Comma-separated names of baselines, or of an installed package's policies that can be tuned."""
    out: str
    """Folder for the tuned forms, and the episodes below OUT/episodes."""
    workload: str = "pan"
    """One or more workloads, separated by commas."""
    budget: str = "4"
    """Frames that may be kept; one or more numbers or the benchmark's names."""
    clips: int = 32
    """Validation clips, from the first on, for the forms that reach the last round."""
    halvings: int = 2
    """Rounds before the last: each time the better half of the forms plays on, with twice as many clips; 0 plays all forms on
    all clips."""
    seeds: str = "42"
    """Noise seeds; clip i is played with each of them plus i."""
    metric: str = "psnr"
    """psnr, ssim or lpips."""
    host: str | None = None
    """A host, as for far-env evaluate; by default that of the workload."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "float32"
    """float32, bfloat16 or auto."""
    batch_size: int = 64
    """Rollouts that are played together."""
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""
    clip_options: str = ""
    """Options of the clips in YAML, as for far-env evaluate."""
    feedback: str | None = None
    """generated or true, as for far-env evaluate; by default that of the workload."""


def tune(args: Sequence[str]) -> None:
    """Choose the parameters of policies by their score on validation clips."""
    options = parse(TuneOptions, args, "far-env tune", TuneOptions.__doc__ or "")
    from far_env.clips.clip import check_clip_options
    from far_env.evaluation.tuning import rungs, tune_into
    from far_env.workload import check_decides
    from far_env.workloads import make_workload, resolve_budgets

    names = split_list(options.policies, "policies", "policy")
    budgets = resolve_budgets(options.budget)
    for name in names:
        for budget in budgets:
            rungs(len(policy_variants(name, budget)), options.clips, options.halvings)
    clip_options = check_clip_options(parse_mapping(options.clip_options, "clip-options"))
    clip_options |= {} if options.data_dir is None else {"data_dir": options.data_dir}
    common = {key: getattr(options, key) for key in ("host", "device", "precision", "feedback")}
    workloads = [make_workload(name, **common, **clip_options) for name in split_list(options.workload, "workload", "workload")]
    for workload in workloads:
        for budget in budgets:
            check_decides(workload, budget)
    search = {key: getattr(options, key) for key in ("clips", "metric", "halvings", "batch_size")}
    search["seeds"] = [whole_number(text, "seeds") for text in split_list(options.seeds, "seeds", "noise seed")]
    out = make_run_dir(options.out)
    with keeping_episodes(options.out):
        for name in names:
            for workload in workloads:
                for budget in budgets:
                    print(_line(*tune_into(out, workload, budget, name, **search)), flush=True)


def _line(form: TunedForm, path: Path) -> str:
    return (
        f"{path}: {form.default} with {form.parameters}: {form.metric} {form.value:.3f}, by default {form.default_value:.3f}, "
        f"on {form.clips} validation clips of {form.workload}, budget {form.budget}; {form.num_variants} forms, "
        f"{form.validation_rollouts} rollouts"
    )
