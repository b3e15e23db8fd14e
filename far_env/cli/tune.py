"""``far-env tune``: parameters of policies by their score on validation clips → files that far-env evaluate plays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from far_env.cli.console import keeping_episodes
from far_env.cli.options import split_list, whole_number
from far_env.config import parse, parse_mapping
from far_env.io import make_run_dir, write_json
from far_env.policies import TunedForm, policy_variants

if TYPE_CHECKING:
    from far_env.workloads import Workload


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
    """float32 or bfloat16."""
    batch_size: int = 64
    """Clips that are played together."""
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
    from far_env.evaluation.tuning import rungs
    from far_env.workloads import check_decides, make_workload, resolve_budgets

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
    out = make_run_dir(options.out)
    with keeping_episodes(options.out):
        for name in names:
            for workload in workloads:
                for budget in budgets:
                    print(_line(*_tuned(options, name, workload, budget, out)), flush=True)


def _tuned(options: TuneOptions, name: str, workload: Workload, budget: int, out: Path) -> tuple[TunedForm, Path]:
    """Tune one policy, and write its file."""
    from far_env.evaluation.tuning import tune as search

    stem = re.sub(r"[^\w.-]", "_", f"{name}_{workload.name}_{budget}")
    form = search(
        workload,
        budget,
        name,
        out / "episodes" / stem,
        clips=options.clips,
        seeds=[whole_number(text, "seeds") for text in split_list(options.seeds, "seeds", "noise seed")],
        metric=options.metric,
        halvings=options.halvings,
        batch_size=options.batch_size,
    )
    path = out / f"{stem}.json"
    write_json(path, asdict(form))
    return form, path


def _line(form: TunedForm, path: Path) -> str:
    return (
        f"{path}: {form.default} with {form.parameters}: {form.metric} {form.value:.3f}, by default {form.default_value:.3f}, "
        f"on {form.clips} validation clips of {form.workload}, budget {form.budget}; {form.num_variants} forms, "
        f"{form.validation_rollouts} rollouts"
    )
