"""``far-env evaluate``: policies × workloads × budgets on the same clips → tables, or one JSON object, and a results folder."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from far_env.cli.console import keeping_episodes, remark
from far_env.cli.options import ALL, check_policy_seconds, split_list, whole_number
from far_env.config import parse, parse_mapping
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.errors import MetricUnavailable, PolicyError, unknown_name
from far_env.io import make_run_dir, write_text
from far_env.policies import (
    FULL_HISTORY,
    is_policy_file,
    load_policy,
    load_token_policy,
    policy_facts,
    policy_names,
    token_policy_facts,
    token_policy_names,
)

if TYPE_CHECKING:
    from far_env.distributed.evaluation import ActorPlayer
    from far_env.evaluation.batches import TokenMemory
    from far_env.evaluation.comparison import Evaluation
    from far_env.rollout.token_policy import TokenPolicy


@dataclass(frozen=True)
class EvaluateOptions:
    """Compare policies on the same clips with the same noise.

    A policy that fails is left out of the tables where it fails, with the reason, and the exit status is 2. A clip whose file
    is damaged is left out of every policy's numbers, and the exit status is 1. The rest is played and saved. The same command
    with --out tries a failed policy again, and adds the missing episodes once the clip's file is restored.
    """

    policies: str
    """Comma-separated: baselines, "all" of them, .py files with a policy class, run folders, pretrained/NAME, policies of
    plugins, full_history. A path that holds a comma is put in double quotes: --policies 'recent_fill,"runs/a,b"'."""
    workload: str = "pan"
    """One or more workloads, separated by commas."""
    budget: str = "4"
    """Frames that may be kept, or full_history_budget, medium_history_budget, tight_history_budget; one or more. With --memory
    tokens: tokens that every head may keep."""
    memory: str = "frames"
    """frames, as in the benchmark, which are encoded again for each new one; or tokens, whose keys and values are computed once
    (not the benchmark). Policies are then token policies, such as recent_fill, sink_recent, h2o or snapkv."""
    max_gap: int = 1
    """With --memory tokens: the largest distance in time between neighbouring kept frames; 1 numbers them without gaps, as the
    benchmark does, 0 keeps true distances."""
    seeds: str = "42"
    """Noise seeds; clip i is played with each of them plus i."""
    trajectories: int = 1
    """Continuations of every clip for each noise seed. With several, tables have the mean over them and the mean of every
    clip's best one, as FAR's authors report (100 on UCF-101 and BAIR). A number can be raised later, with the same --out."""
    split: str = "test"
    """train, validation or test; mazes also have test_unseen_style."""
    clips: int = 256
    """Number of clips."""
    first_clip: int = 0
    """The first of them; by default the first of the split."""
    runs: str = ""
    """Rows that are the mean over several training runs, in YAML: --runs '{mine: [runs/seed0, runs/seed1, runs/seed2]}'.
    Their policies need not be among --policies; intervals of such a row are over clips and runs."""
    robust: bool = False
    """Add columns of the interquartile mean of PSNR and of the probability of improvement; JSON always has them."""
    metrics: str = "psnr,ssim,lpips"
    """Comma-separated: psnr, ssim, lpips; far_psnr and far_lpips, as FAR's tables have them; fvd, of all videos together;
    kept_ssim, kept_lpips and colour_drift, which need no true continuation."""
    intervene: str = "none"
    """Comma-separated: swap, noise, blank, shuffle. A column has the PSNR of frames that are generated while the kept frames
    but the newest are replaced by those of another clip, by noise, by grey, or put in another order; decisions stay."""
    host: str | None = None
    """A shipped host, a released transformer (see far-env weights list), a plugin's host or a host folder; by default the
    host of the workload."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "float32"
    """float32, bfloat16 (as the benchmark computes) or auto."""
    batch_size: int = 64
    """Rollouts that are played together."""
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""
    protocol: str | None = None
    """Protocol by which those videos become clips: benchmark or far."""
    clip_options: str = ""
    """Options of the clips in YAML, such as those of a world: --clip-options '{objects: 2, noise: 0.03}'."""
    feedback: str | None = None
    """generated, or true: the true frame enters the history in place of each generated one, so that errors do not accumulate;
    by default that of the workload, generated unless it says otherwise."""
    num_context: int | None = None
    """Frames that are given, for workloads of recorded clips; by default the workload's."""
    num_predict: int | None = None
    """Frames that are predicted, for workloads of recorded clips; by default the workload's."""
    out: str | None = None
    """Results folder, for reports and validation; the same command resumes where it stopped, and more can be added."""
    show_clips: int = 8
    """Number of clips, from the first on, whose pictures are stored there."""
    policy_seconds: float = 10.0
    """How long one call of a policy file may take; such files run in separate processes."""
    ray: bool = False
    """Play the episodes by actors of Ray (extra ray), on this machine or on several; records and tables stay the same."""
    address: str | None = None
    """With --ray: a running cluster, auto or HOST:PORT; by default one is started on this machine for the evaluation."""
    actors: int = 1
    """With --ray: processes, each of which holds the host on one device."""
    gpus_per_actor: float = 0.0
    """With --ray: GPUs of each, at most 1; with 0.5 two share a GPU. With 0 they compute on the CPU."""
    cpus_per_actor: int = 1
    """With --ray: CPU cores of each, and the threads with which it computes."""
    json: str | None = None
    """Write one JSON object to this file, or to the standard output if "-", instead of tables; several are under "tables"."""


def evaluate(args: Sequence[str]) -> int:
    """Compare policies on the same clips with the same noise."""
    options = parse(EvaluateOptions, args, "far-env evaluate", EvaluateOptions.__doc__ or "")
    from far_env.clips.clip import check_clip_options
    from far_env.evaluation.comparison import check_runs, tabulate, with_runs
    from far_env.evaluation.evaluate import evaluate_grid
    from far_env.evaluation.fvd import FVD, FeatureStore, VideoFeatures, fvd_unavailable, with_fvd
    from far_env.evaluation.records import cell
    from far_env.evaluation.results_folder import session_precision
    from far_env.rollout.noise import trajectory_seeds
    from far_env.workloads import make_workload

    names = split_list(options.policies, "policies", "policy")
    runs = check_runs(parse_mapping(options.runs, "runs"), "--runs")
    names = list(dict.fromkeys([*names, *(name for members in runs.values() for name in members)]))
    if clash := runs.keys() & {*names}:
        raise ValueError(f"--runs: {min(clash)} is the name of a policy too; give the row another name")
    if options.first_clip < 0:
        raise ValueError(f"first-clip must be at least 0, got {options.first_clip}")
    clip_ids = range(options.first_clip, options.first_clip + options.clips)
    memory = _token_memory(options)
    budgets = _budgets(options.budget, in_tokens=memory is not None)
    limited = [budget for budget in budgets if memory is not None or budget < UNLIMITED_FRAMES]
    seeds = [whole_number(text, "seeds") for text in split_list(options.seeds, "seeds", "noise seed")]
    noise_seeds = [seed for first in seeds for seed in trajectory_seeds(first, options.trajectories)]
    metrics = split_list(options.metrics, "metrics", "metric")
    interventions = [] if options.intervene == "none" else split_list(options.intervene, "intervene", "intervention")
    no_fvd = fvd_unavailable() if FVD in metrics else "not asked for"
    if no_fvd and metrics == [FVD]:
        raise MetricUnavailable(no_fvd)
    clip_metrics = [metric for metric in metrics if metric != FVD]
    check_policy_seconds(options.policy_seconds)
    if memory is None:
        policies, optional = _load_policies(names, budgets, options.policy_seconds)
    else:
        policies, optional = _load_token_policies(names)
    if options.json not in (None, "-"):
        make_run_dir(Path(options.json).parent)
    keys = ("data_dir", "protocol", "num_context", "num_predict")
    clip_options = check_clip_options(parse_mapping(options.clip_options, "clip-options"))
    clip_options |= {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    precision = session_precision(options.out, options.precision)
    actors = _actors(options, metrics)
    common = {
        "host": options.host,
        "device": options.device if actors is None else "cpu",
        "precision": precision,
        "feedback": options.feedback,
        **clip_options,
    }
    workloads = [make_workload(name, **common) for name in split_list(options.workload, "workload", "workload")]
    features = None
    if no_fvd is None:
        extract = VideoFeatures(workloads[0].host.device)
        features = FeatureStore(extract, extract.source, None if options.out is None else Path(options.out))
    start = time.perf_counter()
    with keeping_episodes(options.out):
        results = evaluate_grid(
            workloads,
            limited,
            policies,
            clip_ids,
            seeds=noise_seeds,
            split=options.split,
            metrics=clip_metrics,
            interventions=interventions,
            batch_size=options.batch_size,
            optional=set(policies),
            out=None if options.out is None else Path(options.out),
            show_clips=options.show_clips,
            policy_facts={name: (policy_facts if memory is None else token_policy_facts)(name) for name in policies},
            features=features,
            player=None if actors is None else actors(common, options.policy_seconds),
            memory=memory,
        )
    seconds = time.perf_counter() - start
    cells = [(workload.name, budget) for workload in workloads for budget in limited or budgets]
    failed = {
        (name, cell(*where)): results.settings.failed[name][cell(*where)]
        for name, where in itertools.product(policies, cells)
        if cell(*where) in results.settings.failed.get(name, {})
    }
    played = [where for where in cells if any((name, cell(*where)) not in failed for name in policies)]
    if not played:
        raise PolicyError(next(iter(failed.values())))
    selection = {"clip_ids": clip_ids, "seeds": seeds, "trajectories": options.trajectories}
    selection["seconds"] = seconds if len(cells) == 1 else None
    tables = [tabulate(results, name, budget, **selection) for name, budget in played]
    if FVD in metrics:
        tables = [with_fvd(table, features, no_fvd, seeds, budget) for table, (_, budget) in zip(tables, played, strict=True)]
    tables = [with_runs(table, runs) for table in tables]
    if options.json is None:
        print(_text(tables, options.robust))
        if options.out is not None:
            print(f"\n{len(results.records)} records in {options.out}")
    elif options.json == "-":
        print(_json(tables))
    else:
        write_text(Path(options.json), _json(tables) + "\n")
    if results.unreadable:
        names = ", ".join(f"{workload} {clip}" for workload, clip in results.unreadable)
        resume = "" if options.out is None else "; restore the files and run the same command to add the missing episodes"
        remark(f"left out, because their files are damaged: {names}{resume}")
    for name in policies:
        reasons = {where: reason for (policy, where), reason in failed.items() if policy == name and name not in optional}
        if reasons:
            where, reason = ", ".join(reasons), next(iter(reasons.values()))
            print(f"far-env: error: no row {name} for {where}: {reason}", file=sys.stderr)
    return 2 if any(name not in optional for name, _ in failed) else int(bool(results.unreadable))


def _token_memory(options: EvaluateOptions) -> TokenMemory | None:
    """The memory of --memory tokens; None for frames. Raises ValueError on an unknown memory or a wrong gap."""
    from far_env.evaluation.batches import TokenMemory
    from far_env.evaluation.records import MEMORIES, TOKENS

    if options.memory not in MEMORIES:
        raise ValueError(unknown_name("memory", options.memory, MEMORIES))
    if options.max_gap < 0 or (options.max_gap != 1 and options.memory != TOKENS):
        raise ValueError(f"--max-gap is a whole number from 0 on for --memory tokens, got {options.max_gap}")
    return TokenMemory(options.max_gap or None) if options.memory == TOKENS else None


def _budgets(text: str, in_tokens: bool) -> list[int]:
    """The budgets of the option, ascending."""
    from far_env.workloads import resolve_budget

    names = split_list(text, "budget", "budget")
    if in_tokens:
        return sorted({whole_number(name, "budget") for name in names})
    return sorted({min(resolve_budget(name), UNLIMITED_FRAMES) for name in names})


def _actors(options: EvaluateOptions, metrics: Sequence[str]) -> Callable[..., ActorPlayer] | None:
    """What makes the player of --ray; None without it. Raises ValueError on options that do not go together."""
    if not options.ray:
        for name in ("address", "actors", "gpus_per_actor", "cpus_per_actor"):
            if getattr(options, name) != getattr(EvaluateOptions, name):
                raise ValueError(f"--{name.replace('_', '-')} is used with --ray, which is missing")
        return None
    from far_env.distributed.cluster import ActorSettings
    from far_env.distributed.evaluation import ActorPlayer
    from far_env.evaluation.fvd import FVD
    from far_env.evaluation.records import FRAMES

    if options.actors < 1:
        raise ValueError(f"--actors must be at least 1, got {options.actors}")
    if options.device != "auto":
        raise ValueError("with --ray the actors' devices are assigned; use --gpus-per-actor in place of --device")
    if options.memory != FRAMES:
        raise ValueError(f"--memory {options.memory} is played in one process; evaluate it without --ray")
    if FVD in metrics:
        raise ValueError("fvd compares all videos in one process; evaluate it without --ray")
    if options.precision == "auto" and options.gpus_per_actor:
        raise ValueError("with --gpus-per-actor the precision is not measured here; use --precision float32 or bfloat16")
    settings = ActorSettings(options.actors, options.address, options.gpus_per_actor, options.cpus_per_actor)
    return partial(ActorPlayer, settings)


class _NotLoaded:
    """A policy file that cannot be loaded: it fails where it is first used, as one does that cannot be played."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def signals(self) -> tuple[str, ...]:
        """Read before the first frame is generated."""
        raise PolicyError(self._reason)

    def build_temporal_cache_plan(self, *_: object) -> NoReturn:
        raise PolicyError(self._reason)


def _load_policies(
    names: Sequence[str], budgets: Sequence[int], policy_seconds: float
) -> tuple[dict[str, RetentionPolicy | None], set[str]]:
    """Policies by name in the order given, and the names that only "all" includes, which may fail."""
    wanted, optional = _wanted(names, policy_names("baselines") if ALL in names else [])
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
            policies[name] = load_policy(name, policy_seconds)
        except ValueError as error:
            if is_policy_file(name):
                policies[name] = _NotLoaded(str(error))
            elif name in optional:
                remark(f"left out {name}: {error}")
            else:
                raise
    return policies, optional


def _load_token_policies(names: Sequence[str]) -> tuple[dict[str, TokenPolicy | None], set[str]]:
    """Policies over tokens by name in the order given, and the names that only "all" includes, which may fail."""
    wanted, optional = _wanted(names, token_policy_names() if ALL in names else [])
    return {name: load_token_policy(name) for name in wanted}, optional


def _wanted(names: Sequence[str], every: Sequence[str]) -> tuple[dict[str, None], set[str]]:
    """Names in order, each once, ``every`` in place of "all"; and those that only "all" includes."""
    wanted = dict.fromkeys(single for name in names for single in (every if name == ALL else [name]))
    return wanted, set(every) - set(names)


def _text(tables: Sequence[Evaluation], robust: bool) -> str:
    from far_env.evaluation.table import pooled_table, results_table

    parts = [results_table(table, robust=robust) for table in tables]
    if len(tables) > 1 and (pooled := pooled_table(tables, robust=robust)):
        parts.append(pooled)
    return "\n\n".join(parts)


def _json(tables: Sequence[Evaluation]) -> str:
    """The object of one table, or one with all tables and the pooled numbers."""
    from far_env.evaluation.comparison import pooled_summary

    if len(tables) == 1:
        return json.dumps(tables[0].summary(), indent=2)
    pooled = {name: {key: asdict(value) for key, value in row.items()} for name, row in pooled_summary(tables).items()}
    return json.dumps({"tables": [table.summary() for table in tables], "pooled": pooled}, indent=2)
