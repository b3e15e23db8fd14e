"""The commands ``far-env evaluate``, ``validate``, ``report`` and ``benchmark``: options in, tables, records, pages out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from far_env.config import parse
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.io import make_run_dir, write_text

if TYPE_CHECKING:
    from far_env.evaluation.comparison import Evaluation

ALL = "all"


@dataclass(frozen=True)
class EvaluateOptions:
    """Compare policies on the same clips with the same noise."""

    policies: str
    """Comma-separated: baselines, "all" of them, .py files with a policy class, run folders, pretrained/NAME, full_history."""
    workload: str = "pan"
    """One or more, separated by commas."""
    budget: str = "4"
    """Frames that may be kept, or full_history_budget, medium_history_budget, tight_history_budget; one or more."""
    seeds: str = "42"
    """Noise seeds; clip i is played with each of them plus i."""
    split: str = "test"
    clips: int = 256
    """The first so many clips of the split."""
    metrics: str = "psnr,ssim,lpips"
    host: str | None = None
    """A shipped host, a released transformer (see far-env weights list) or a host folder; by default the workload's own."""
    device: str = "auto"
    precision: str = "float32"
    """float32, bfloat16 (as the benchmark computes) or auto."""
    batch_size: int = 64
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""
    protocol: str | None = None
    """How those videos become clips: benchmark or far."""
    out: str | None = None
    """Results folder, for reports and validation; the same command goes on where it stopped, and more can be added."""
    show_clips: int = 8
    """Keep pictures of so many of the first clips there."""
    json: str | None = None
    """Write one JSON object to this file, or to the standard output if "-", instead of tables; several are under "tables"."""


@dataclass(frozen=True)
class ValidateOptions:
    """Play the records of a results folder again and compare."""

    folder: tyro.conf.Positional[str]
    """Written by far-env evaluate --out."""
    sample: int | None = None
    """So many records at random instead of all."""
    seed: int = 0
    """Of the sample."""
    tolerance: float = 1e-3
    """By how much metrics may differ, in dB for PSNR."""
    host: str | None = None
    """Where the host is, if not where it was."""
    device: str = "auto"
    batch_size: int = 64
    data_dir: str | None = None
    """Where the videos are, if not where they were."""


@dataclass(frozen=True)
class BenchmarkOptions:
    """Print a policy's line of metrics as the benchmark ar-video-kv-temporal-policy does."""

    policy: str
    """A .py file (which runs in a process of its own), a baseline, a run folder, pretrained/NAME or full_history."""
    workload: str = "ucf101_short_prediction"
    budget: str = "tight_history_budget"
    host: str | None = None
    """By default the released one; a shipped one, such as embedded, makes a dry run on made clips where no data is given."""
    clips: int | None = None
    """As many as the benchmark plays by default, if there are so many."""
    data_dir: str | None = None
    device: str = "auto"
    precision: str | None = None
    """By default bfloat16 on a GPU, float32 elsewhere."""
    policy_seconds: float = 10.0
    """How long one call of a policy file may take."""


@dataclass(frozen=True)
class ReportOptions:
    """Make one HTML page of an evaluation, and plots for papers."""

    results: tyro.conf.Positional[str]
    """Folder that far-env evaluate --out wrote."""
    out: str = "report.html"
    plots: str | None = None
    """Write plots into this folder too, as PNG and SVG."""
    policies: str | None = None
    """Comma-separated: only these; all by default."""
    reference: str | None = None
    """Policy that the others are compared with; recent_fill by default."""
    show_clips: int | None = None
    """At most so many clips of each workload in the player, for a smaller page."""


def run_evaluate(args: Sequence[str]) -> None:
    """Evaluate policies."""
    options = parse(EvaluateOptions, args, "far-env evaluate", EvaluateOptions.__doc__ or "")
    from far_env.evaluation.comparison import tabulate
    from far_env.evaluation.evaluate import evaluate_grid
    from far_env.policies import policy_facts
    from far_env.workloads import make_workload, resolve_budget

    names = listed(options.policies, "policies", "policy")
    budgets = sorted({min(resolve_budget(name), UNLIMITED_FRAMES) for name in listed(options.budget, "budget", "budget")})
    limited = [budget for budget in budgets if budget < UNLIMITED_FRAMES]
    seeds = [_seed(text) for text in listed(options.seeds, "seeds", "noise seed")]
    metrics = listed(options.metrics, "metrics", "metric")
    policies, optional = _load_policies(names, budgets)
    if options.json not in (None, "-"):
        make_run_dir(Path(options.json).parent)
    clip_options = {key: getattr(options, key) for key in ("data_dir", "protocol") if getattr(options, key) is not None}
    common = {"host": options.host, "device": options.device, "precision": options.precision, **clip_options}
    workloads = [make_workload(name, **common) for name in listed(options.workload, "workload", "workload")]
    start = time.perf_counter()
    with resumable(options.out):
        results = evaluate_grid(
            workloads,
            limited,
            policies,
            range(options.clips),
            seeds=seeds,
            split=options.split,
            metrics=metrics,
            batch_size=options.batch_size,
            optional=optional,
            out=None if options.out is None else Path(options.out),
            show_clips=options.show_clips,
            policy_facts={} if options.out is None else {name: policy_facts(name) for name in policies},
            clip_options={workload.name: _lasting(clip_options) for workload in workloads},
        )
    seconds = time.perf_counter() - start
    cells = [(workload.name, budget) for workload in workloads for budget in limited or budgets]
    asked = {"clip_ids": range(options.clips), "seeds": seeds, "seconds": seconds if len(cells) == 1 else None}
    tables = [tabulate(results, name, budget, **asked) for name, budget in cells]
    if options.json is None:
        print(_text(tables))
        if options.out is not None:
            print(f"\n{len(results.records)} records in {options.out}")
    elif options.json == "-":
        print(_json(tables))
    else:
        write_text(Path(options.json), _json(tables) + "\n")


def run_validate(args: Sequence[str]) -> int:
    """Play the records of an evaluation again."""
    options = parse(ValidateOptions, args, "far-env validate", ValidateOptions.__doc__ or "")
    from far_env.clips.worlds import WORLDS
    from far_env.evaluation.records import load
    from far_env.evaluation.validate import choose, report, validate
    from far_env.workloads import Workload, make_workload

    if options.batch_size < 1 or not options.tolerance >= 0:
        raise ValueError(
            f"batch size must be at least 1 and tolerance not negative, got {options.batch_size} and {options.tolerance}"
        )
    results = load(options.folder)
    records = choose(results.records, options.sample, options.seed)

    def make(name: str) -> Workload:
        made_with = results.settings.made_with[name]
        clip_options = dict(made_with["clip_options"])
        if options.data_dir is not None and name not in WORLDS:
            clip_options["data_dir"] = options.data_dir
        host = options.host or next(record.facts["host"] for record in records if record.workload == name)
        return make_workload(name, host=host, device=options.device, precision=made_with["dtype"], **clip_options)

    findings = validate(results, records, make, tolerance=options.tolerance, batch_size=options.batch_size)
    print(report(findings, options.tolerance, len(results.records)))
    return int(any(finding.difference is not None for finding in findings))


def run_report(args: Sequence[str]) -> None:
    """Make a page of an evaluation."""
    options = parse(ReportOptions, args, "far-env report", ReportOptions.__doc__ or "")
    from far_env.evaluation.plots import save_plots
    from far_env.evaluation.ranking import select_policies
    from far_env.evaluation.records import load
    from far_env.evaluation.report import report_page

    if options.show_clips is not None and options.show_clips < 0:
        raise ValueError(f"--show-clips must be at least 0, got {options.show_clips}")
    names = [] if options.policies is None else listed(options.policies, "policies", "policy")
    results = select_policies(load(options.results), names)
    if options.plots is not None:
        make_run_dir(options.plots)
    page = report_page(results, options.reference, options.show_clips)
    write_text(Path(options.out), page)
    print(f"wrote {options.out} ({len(page.encode()) / 1e6:.1f} MB)")
    if options.plots is not None:
        files = save_plots(results, Path(options.plots), options.reference)
        print(f"wrote {len(files)} plots into {options.plots}")


def run_benchmark(args: Sequence[str]) -> None:
    """Score a policy as the public benchmark does."""
    options = parse(BenchmarkOptions, args, "far-env benchmark", BenchmarkOptions.__doc__ or "")
    from far_env.evaluation import benchmark
    from far_env.workloads import resolve_budget

    max_frames = resolve_budget(options.budget)
    with _benchmark_policy(options) as policy:
        place = {"device": options.device, "precision": options.precision, "data_dir": options.data_dir}
        workload, dry = benchmark.benchmark_workload(options.workload, options.host, **place)
        wanted, there = benchmark.TASKS[options.workload].num_clips, workload.clips.num_clips("test")
        if dry:
            _tell(f"a dry run: host {workload.host.name} on clips of the world {workload.clips.name}, not the benchmark's data")
        if options.clips is None and there < wanted:
            _tell(f"the benchmark plays {wanted} clips, here are {there}")
        num_clips = min(wanted, there) if options.clips is None else options.clips
        score = benchmark.run_benchmark(workload, max_frames, policy, num_clips)
    for name, reason in score.unavailable.items():
        _tell(f"no {name}: {reason}")
    print(score.line())


@contextmanager
def _benchmark_policy(options: BenchmarkOptions) -> Iterator[RetentionPolicy | None]:
    """The policy, a file's in a process of its own."""
    from far_env.evaluation.policy_process import PolicyProcess
    from far_env.policies import load_policy

    path = Path(options.policy)
    if path.suffix != ".py" or not path.is_file():
        yield load_policy(options.policy)
        return
    if not options.policy_seconds > 0:
        raise ValueError(f"policy-seconds must be above 0, got {options.policy_seconds}")
    with PolicyProcess(path, call_seconds=options.policy_seconds) as policy:
        try:
            yield policy
        finally:
            if (sentence := policy.printed()) is not None:
                _tell(sentence)


def _load_policies(names: Sequence[str], budgets: Sequence[int]) -> tuple[dict[str, RetentionPolicy | None], set[str]]:
    """Policies by name in the order given, and those that only "all" asks for and that may be left out."""
    from far_env import baselines
    from far_env.evaluation.records import FULL_HISTORY
    from far_env.policies import load_policy

    optional = set(baselines.names()) - set(names) if ALL in names else set()
    wanted = dict.fromkeys(own for name in names for own in (baselines.names() if name == ALL else [name]))
    if UNLIMITED_FRAMES in budgets:
        wanted[FULL_HISTORY] = None
        if len(budgets) == 1 and len(wanted) > 1:
            others = ", ".join(name for name in wanted if name != FULL_HISTORY)
            raise ValueError(
                f"with full history no policy is asked; give a budget for {others}, or the policy {FULL_HISTORY} alone"
            )
    policies: dict[str, RetentionPolicy | None] = {}
    for name in wanted:
        try:
            policies[name] = load_policy(name)
        except ValueError as error:
            if name not in optional:
                raise
            _tell(f"left out {name}: {error}")
    return policies, optional


def _text(tables: Sequence[Evaluation]) -> str:
    from far_env.evaluation.table import pooled_table, results_table

    parts = [results_table(table) for table in tables]
    if len(tables) > 1 and (pooled := pooled_table(tables)):
        parts.append(pooled)
    return "\n\n".join(parts)


def _json(tables: Sequence[Evaluation]) -> str:
    """One table's object, or one with all tables and the pooled numbers."""
    from far_env.evaluation.comparison import pooled_summary

    if len(tables) == 1:
        return json.dumps(tables[0].summary(), indent=2)
    pooled = {name: {key: asdict(value) for key, value in own.items()} for name, own in pooled_summary(tables).items()}
    return json.dumps({"tables": [table.summary() for table in tables], "pooled": pooled}, indent=2)


def listed(text: str, option: str, noun: str) -> list[str]:
    """The parts of a comma-separated option, each once. Raises ValueError if there is none."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ValueError(f"--{option} names no {noun}; give one or more, separated by commas")
    return parts


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--seeds takes whole numbers from 0 on, got {text!r}")
    return int(text)


def _lasting(clip_options: dict[str, str]) -> dict[str, str]:
    """Clip options as they mean the same from another folder."""
    folder = clip_options.get("data_dir")
    return clip_options | ({} if folder is None else {"data_dir": str(Path(folder).resolve())})


@contextmanager
def resumable(out: str | None) -> Iterator[None]:
    """Tell on Ctrl-C where the episodes finished so far are."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            print(f"\nthe episodes finished so far are in {out}; the same command goes on from there", file=sys.stderr)
        raise


def _tell(sentence: str) -> None:
    print(f"far-env: {sentence}", file=sys.stderr)
