"""``far-env generate``: videos of a workload under policies and budgets, or from nothing, as mp4 and gif files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from far_env.cli.console import keeping_episodes
from far_env.cli.options import ALL, split_list, whole_number
from far_env.config import parse, parse_mapping, require_positive
from far_env.contract import UNLIMITED_FRAMES
from far_env.errors import unknown_name
from far_env.io import locked, make_run_dir
from far_env.policies import FULL_HISTORY, load_policy, policy_facts

if TYPE_CHECKING:
    from far_env.evaluation.generation import VideoJob
    from far_env.workload import Workload

FROM_NOTHING = "generation"
"""The name of what is generated without a workload."""
ODE_STEPS, NUM_PREDICT, GUIDANCE = 50, 16, 2.0
"""Those of FAR's generation of UCF-101; the guidance is for labels."""


@dataclass(frozen=True)
class GenerateOptions:
    """Write videos of any workload, policy and budget, or generate them from nothing.

    Without a workload, a host generates from 0 given frames: far-env generate --host far_l_ucf101_256_label --labels 0,7
    --out videos. A clip whose file is damaged is left out, and the exit status is 1.
    """

    out: str
    """Folder for the videos; the same command makes those that are missing or not whole, and more can be added."""
    workload: str | None = None
    """A registered workload. Without one, videos are generated from nothing by the host."""
    policies: str = FULL_HISTORY
    """Comma-separated, as in far-env evaluate."""
    budget: str = "4"
    """Frames that may be kept, or one of the benchmark's names; one or more."""
    seeds: str = "42"
    """Noise seeds; clip i is played with each of them plus i."""
    trajectories: int = 1
    """Continuations of every clip for each noise seed."""
    split: str = "test"
    """train, validation or test; mazes also have test_unseen_style."""
    clips: int = 4
    """Number of clips, from the first of the split on; from nothing, of videos for each noise seed and trajectory."""
    labels: str = ""
    """Classes of the videos that are generated from nothing, in turn, such as 0,7, or all."""
    guidance: float | None = None
    """Above 1 for classifier-free guidance; by default that of the workload; from nothing 2 with labels, else 1."""
    ode_steps: int | None = None
    """ODE steps of a frame; by default those of the workload; from nothing 50."""
    truth: bool = False
    """The true frames on the left, beside those of the rollout."""
    formats: str = "mp4"
    """Comma-separated: mp4, gif."""
    fps: int = 8
    """Frames a second."""
    scale: int = 1
    """Side in pixels of every pixel."""
    host: str | None = None
    """A shipped host, a released transformer, a plugin's host or a host folder; by default that of the workload."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "float32"
    """float32, bfloat16 (as the released models were evaluated) or auto."""
    batch_size: int = 16
    """Rollouts that are generated together."""
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""
    protocol: str | None = None
    """Protocol by which those videos become clips: benchmark or far."""
    clip_options: str = ""
    """Options of the clips in YAML, such as those of a world."""
    feedback: str | None = None
    """generated, or true: the true frame enters the history in place of each generated one."""
    num_context: int | None = None
    """Frames that are given, for workloads of recorded clips."""
    num_predict: int | None = None
    """Frames that are predicted, for workloads of recorded clips, and from nothing, there 16 by default."""
    policy_seconds: float = 10.0
    """How long one call of a policy file may take; such files run in separate processes."""


def generate(args: Sequence[str]) -> int:
    """Write videos of rollouts, or generate videos from nothing."""
    options = parse(GenerateOptions, args, "far-env generate", GenerateOptions.__doc__ or "")
    from far_env.clips.video_writing import MAX_FPS, WRITERS
    from far_env.evaluation.generation import VideoForm, check_settings, generate_videos, generation_facts
    from far_env.provenance import run_facts, save_facts, session_precision
    from far_env.rollout.noise import seeds_text, trajectory_seeds

    require_positive(options, "clips", "batch_size", "scale", "policy_seconds")
    if not 1 <= options.fps <= MAX_FPS:
        raise ValueError(f"--fps takes 1 to {MAX_FPS} frames a second, got {options.fps}")
    formats = tuple(split_list(options.formats, "formats", "format"))
    for name in formats:
        if name not in WRITERS:
            raise ValueError(unknown_name("format", name, list(WRITERS)))
    first_seeds = [whole_number(text, "seeds") for text in split_list(options.seeds, "seeds", "noise seed")]
    seeds = [seed for first in first_seeds for seed in trajectory_seeds(first, options.trajectories)]
    jobs = _jobs(options)
    options = replace(options, precision=session_precision(Path(options.out), options.precision))
    workload = _from_nothing(options) if options.workload is None else _workload(options)
    form = VideoForm(formats, options.truth, options.fps, options.scale)
    folder = make_run_dir(options.out)
    facts = {job.name: policy_facts(job.name) for job in jobs}
    with locked(folder), keeping_episodes(folder, "videos"):
        check_settings(folder, workload, options.split, form, facts, options.data_dir)
        save_facts(folder, run_facts(workload.host.device, workload.host.dtype))
        written = generate_videos(
            workload, jobs, range(options.clips), seeds, folder, form, split=options.split, batch_size=options.batch_size
        )
    line = "host {host} ({weights}), {ode_steps} ODE steps, guidance {guidance}, {dtype} on {device}, commit {commit}"
    print(
        f"{written.new + written.kept} rollouts in {folder} ({written.new} new): {workload.name}, {workload.num_context} + "
        f"{workload.num_predict} frames, {options.clips} clips, noise seed {seeds_text(seeds)} + clip id; "
        + line.format(**generation_facts(workload))
    )
    return int(bool(written.unreadable))


def _jobs(options: GenerateOptions) -> list[VideoJob]:
    """Every policy under every budget, and full history once."""
    from far_env.evaluation.generation import VideoJob
    from far_env.workloads import resolve_budget

    budgets = sorted({min(resolve_budget(name), UNLIMITED_FRAMES) for name in split_list(options.budget, "budget", "budget")})
    limited = [budget for budget in budgets if budget < UNLIMITED_FRAMES]
    policies = {name: load_policy(name, options.policy_seconds) for name in split_list(options.policies, "policies", "policy")}
    asked = [name for name, policy in policies.items() if policy is not None]
    if asked and not limited:
        raise ValueError(f"with full history no policy is asked; give a budget for {', '.join(asked)}")
    jobs = [VideoJob(name, policies[name], budget) for budget in limited for name in asked]
    if len(asked) < len(policies) or len(limited) < len(budgets):
        jobs.insert(0, VideoJob(FULL_HISTORY, None, UNLIMITED_FRAMES))
    return jobs


def _workload(options: GenerateOptions) -> Workload:
    """The registered workload with these options."""
    from far_env.clips.clip import check_clip_options
    from far_env.workloads import make_workload

    if options.labels:
        raise ValueError("--labels are for videos that are generated from nothing; the clips of a workload have their own")
    keys = ("data_dir", "protocol", "num_context", "num_predict")
    clip_options = check_clip_options(parse_mapping(options.clip_options, "clip-options"))
    clip_options |= {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    place = {"host": options.host, "device": options.device, "precision": options.precision, "feedback": options.feedback}
    workload = make_workload(options.workload, **place, **clip_options)
    changes = {"guidance": options.guidance, "num_steps": options.ode_steps}
    return replace(workload, **{name: value for name, value in changes.items() if value is not None})


def _from_nothing(options: GenerateOptions) -> Workload:
    """A workload of no given frames.

    Raises:
        ValueError: without a host, on options that need clips, or if the labels are not those that the host takes.
    """
    from far_env.clips.blank import Blank
    from far_env.device import resolve_device
    from far_env.host.precision import resolve_precision
    from far_env.host.weights import load_host
    from far_env.workload import Workload

    if options.host is None:
        raise ValueError("give a workload (--workload), or a host (--host) that generates videos from nothing")
    for name in ("data_dir", "protocol", "clip_options", "feedback", "num_context", "truth"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} needs clips, which a workload has (--workload)")
    device = resolve_device(options.device)
    host = load_host(options.host, str(device), resolve_precision(options.precision, device))
    takes_labels = host.condition == "label"
    labels = range(host.num_classes) if takes_labels and options.labels == ALL else ()
    if options.labels and not labels:
        labels = [whole_number(text, "labels") for text in split_list(options.labels, "labels", "label")]
    if takes_labels and (not labels or max(labels) >= host.num_classes):
        raise ValueError(f"the host {host.name} takes labels: give --labels from 0 to {host.num_classes - 1}, or all")
    if labels and not takes_labels:
        raise ValueError(f"the host {host.name} takes no labels; leave --labels out")
    guidance = options.guidance if options.guidance is not None else GUIDANCE if labels else 1.0
    return Workload(
        FROM_NOTHING,
        Blank(host.frame_size, labels),
        host,
        0,
        NUM_PREDICT if options.num_predict is None else options.num_predict,
        ODE_STEPS if options.ode_steps is None else options.ode_steps,
        guidance,
        clip_options={"labels": list(labels)} if labels else {},
        labels=bool(labels),
    )
