"""Registered workloads and the benchmark's budgets, by name.

A workload is registered as an entry point of ``far_env.workloads``: a `WorkloadSpec`, or a function without arguments that
returns one. Those of far-env are declared the same way and are defined in this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from far_env.clips.clip import ClipSource
from far_env.clips.datasets import BAIR, UCF101, DMLab, Doom, Minecraft, RecordedFolder
from far_env.clips.prompted import PromptedVideos, PromptFolder
from far_env.clips.video_folder import VideoFolder
from far_env.clips.worlds import WORLDS
from far_env.contract import GENERATED, UNLIMITED_FRAMES
from far_env.device import resolve_device
from far_env.errors import first_line, unknown_name
from far_env.host.far_host import FARHost
from far_env.host.precision import resolve_precision
from far_env.host.weights import load_host
from far_env.plugins import WORKLOADS as GROUP
from far_env.plugins import distribution_name, entry_points, load
from far_env.workload import NULL_CLASS, UNITS, Workload

BUDGETS = {
    "full_history_budget": UNLIMITED_FRAMES,
    "medium_history_budget": 8,
    "tight_history_budget": 4,
}


@dataclass(frozen=True)
class WorkloadSpec:
    """The parts from which a registered workload is built.

    Attributes:
        clips: makes the clip source.
        num_context, num_predict: as in `Workload`.
        host: what predicts unless another host is given; None if one must be given.
        num_steps: ODE steps; None leaves them to the host.
        guidance, feedback: as in `Workload`.
        actions: as in `Workload`; None if the host decides: one that takes actions gets them.
        labels: a host that takes labels gets those of the clips, and the guidance; another one gets no guidance.
        prompts: a host that takes prompts gets those of the clips.
        budget_counts: as in `Workload`.
        free_lengths: other lengths may be asked for; the clip source then takes ``num_frames``.
    """

    clips: Callable[..., ClipSource]
    num_context: int
    num_predict: int
    host: str | None = "embedded"
    num_steps: int | None = None
    guidance: float = 1.0
    actions: bool | None = False
    feedback: str = GENERATED
    free_lengths: bool = False
    labels: bool = False
    prompts: bool = False
    budget_counts: str = UNITS


def _world(name: str) -> Callable[..., ClipSource]:
    """Makes a world with options of its own; without any it is the one in `WORLDS`."""
    return lambda **options: replace(WORLDS[name], **options) if options else WORLDS[name]


def _published(
    source: Callable[..., ClipSource],
    host: str,
    num_context: int,
    num_predict: int,
    guidance: float = 1.0,
    actions: bool = False,
) -> WorkloadSpec:
    """One of FAR's evaluations: its protocol for clips, 50 ODE steps."""
    clips = partial(source, protocol="far", num_frames=num_context + num_predict)
    return WorkloadSpec(clips, num_context, num_predict, host, 50, guidance, actions)


def _generation(size: int, host: str) -> WorkloadSpec:
    """FAR's generation of UCF-101 from nothing; the clips of all classes in turn are what the videos are compared with."""
    clips = partial(UCF101, protocol="far", num_frames=16, size=size, interval=3, class_list="trainval.json")
    return WorkloadSpec(clips, 0, 16, host, 50, 2.0, labels=True)


PAN = WorkloadSpec(_world("pan"), 5, 11)
CUTS = WorkloadSpec(_world("cuts"), 5, 11)
ORBIT = WorkloadSpec(_world("orbit"), 36, 36, "embedded_long")
MAZE = WorkloadSpec(_world("maze"), 36, 36, "embedded_maze", actions=True)
MAZE_LONG = WorkloadSpec(_world("maze_long"), 144, 156, "embedded_maze", actions=True)
MAZE_RETRIEVAL = WorkloadSpec(_world("maze_retrieval"), 16, 16, "embedded_maze", actions=True)
MAZE_RETRIEVAL_C36P36 = WorkloadSpec(_world("maze_retrieval_c36p36"), 36, 36, "embedded_maze", actions=True)
PAN_WIDE = WorkloadSpec(_world("pan_wide"), 5, 11)
CUTS_WIDE = WorkloadSpec(_world("cuts_wide"), 5, 11)
ORBIT_WIDE = WorkloadSpec(_world("orbit_wide"), 36, 36, "embedded_long")

# Clips that far-env record wrote. There is no host for all of them.
RECORDED = WorkloadSpec(RecordedFolder, 16, 16, host=None, actions=None, free_lengths=True)
DOOM = WorkloadSpec(Doom, 20, 20, host=None, actions=None, free_lengths=True)

# Prompts, and videos with prompts, for text-to-video models: one chunk, then chunks of twelve frames; 81 are what AnyFlow-FAR
# was trained on.
PROMPTED = WorkloadSpec(PromptFolder, 0, 81, "any_flow_far", prompts=True, free_lengths=True)
PROMPTED_VIDEO = WorkloadSpec(PromptedVideos, 13, 68, "any_flow_far", prompts=True, free_lengths=True)

# `far_env.workload.BENCHMARK_WORKLOADS`.
UCF101_SHORT_PREDICTION = WorkloadSpec(partial(UCF101, num_frames=16), 5, 11, "far_b_ucf101", 20)
DMLAB_LONG_PREDICTION = WorkloadSpec(partial(DMLab, num_frames=72), 36, 36, "far_b_long_dmlab", 20, NULL_CLASS)

# FAR's evaluations (arXiv 2503.19325), named by data, context frames (c) and predicted frames (p).
UCF101_C4P12 = _published(UCF101, "far_b_ucf101", 4, 12)
BAIR_C2P14 = _published(BAIR, "far_b_bair", 2, 14)
BAIR_C2P28 = _published(BAIR, "far_b_bair", 2, 28)
DMLAB_C144P156 = _published(DMLab, "far_b_long_dmlab", 144, 156, 1.5, actions=True)
DMLAB_C36P264 = _published(DMLab, "far_b_long_dmlab", 36, 264, NULL_CLASS)
MINECRAFT_C144P156 = _published(Minecraft, "far_m_long_minecraft", 144, 156, 1.5, actions=True)
MINECRAFT_C36P264 = _published(Minecraft, "far_m_long_minecraft", 36, 264, 1.5, actions=True)
UCF101_C0P16_128 = _generation(128, "far_l_ucf101_128_label")
UCF101_C0P16_256 = _generation(256, "far_l_ucf101_256_label")


class _Registry(Mapping[str, WorkloadSpec]):
    """Registered workloads by name.

    A plugin is imported when its workload is looked up, which raises ValueError if that fails.
    """

    def __getitem__(self, name: str) -> WorkloadSpec:
        entry = entry_points(GROUP)[name]
        spec = load(entry)
        if not isinstance(spec, WorkloadSpec):
            try:
                spec = spec()
            except Exception as error:
                raise ValueError(
                    f"the workload {name} of the distribution {distribution_name(entry)} cannot be made: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        if not isinstance(spec, WorkloadSpec):
            raise ValueError(
                f"the workload {name} of the distribution {distribution_name(entry)} must be a WorkloadSpec or a function that "
                f"returns one, got {type(spec).__name__}"
            )
        return spec

    def __contains__(self, name: object) -> bool:
        return name in entry_points(GROUP)

    def __iter__(self) -> Iterator[str]:
        return iter(entry_points(GROUP))

    def __len__(self) -> int:
        return len(entry_points(GROUP))


WORKLOADS = _Registry()


def make_workload(
    name: str,
    *,
    host: str | os.PathLike | None = None,
    device: str = "auto",
    precision: str = "float32",
    feedback: str | bool | None = None,
    num_context: int | None = None,
    num_predict: int | None = None,
    **clip_options: object,
) -> Workload:
    """Build a registered workload.

    Args:
        name: one of `WORKLOADS`.
        host: a shipped host ("embedded", "embedded_long", "embedded_maze"), a released transformer, a plugin's host, a host
            folder, or None for the host of the workload.
        device: "auto", "cpu", "cuda", ….
        precision: "float32", "bfloat16" (as the released models were trained and the benchmark runs them), or "auto".
        feedback: "generated" or "true", see `Workload`; None for that of the workload.
        num_context, num_predict: other lengths than those of the workload, where it allows that.
        clip_options: passed to the clip source (for example a data folder).

    Raises:
        ValueError: on an unknown name (the nearest one is suggested), options the source does not take, a host for frames of
            another size, feedback that the workload does not take, no host where the workload has none, or lengths where the
            workload fixes them.
    """
    if name not in WORKLOADS:
        raise ValueError(unknown_name("workload", name, list(WORKLOADS)))
    spec = WORKLOADS[name]
    host = spec.host if host is None else host
    if host is None:
        raise ValueError(f"the workload {name} has no host: give one (--host), such as a folder that far-env train-host wrote")
    given = {"num_context": num_context, "num_predict": num_predict}
    made_with = {**clip_options, **{key: value for key, value in given.items() if value is not None}}
    lengths = _lengths(name, spec, num_context, num_predict)
    frames = {"num_frames": sum(lengths)} if spec.free_lengths else {}
    try:
        clips = spec.clips(**clip_options, **frames)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        which = f"the clip option {unknown[1]}" if unknown else f"these clip options: {error}"
        raise ValueError(f"workload {name} does not take {which}") from error
    torch_device = resolve_device(device)
    loaded = load_host(host, str(torch_device), resolve_precision(precision, torch_device))
    if loaded.frame_size != clips.size and hasattr(loaded, "with_frame_size"):
        loaded = loaded.with_frame_size(clips.size)
    if loaded.frame_size != clips.size:
        raise ValueError(f"host {loaded.name} works on frames of {loaded.frame_size}², the clips of {name} have {clips.size}²")
    if isinstance(clips, VideoFolder) and isinstance(loaded, FARHost):
        clips.host = loaded
    num_steps = loaded.num_steps if spec.num_steps is None else spec.num_steps
    actions = loaded.condition == "action" if spec.actions is None else spec.actions
    labels = spec.labels and loaded.condition == "label"
    prompts = spec.prompts and loaded.condition == "prompt"
    guidance = 1.0 if spec.labels and not labels else spec.guidance
    feedback = spec.feedback if feedback is None else feedback
    conditions = {"labels": labels, "prompts": prompts, "budget_counts": spec.budget_counts}
    return Workload(name, clips, loaded, *lengths, num_steps, guidance, actions, feedback, made_with, **conditions)


def _lengths(name: str, spec: WorkloadSpec, num_context: int | None, num_predict: int | None) -> tuple[int, int]:
    """Frames that are given and predicted. Raises ValueError on lengths below 1, or where the workload fixes them."""
    if not spec.free_lengths and (num_context is not None or num_predict is not None):
        fixed = f"{spec.num_context} + {spec.num_predict} frames"
        raise ValueError(f"the workload {name} always has {fixed}; num_context and num_predict are for recorded clips")
    lengths = (
        spec.num_context if num_context is None else num_context,
        spec.num_predict if num_predict is None else num_predict,
    )
    if spec.free_lengths and not spec.num_context and lengths[0]:
        raise ValueError(f"the workload {name} gives no frames: num_context must be 0, got {lengths[0]}")
    if spec.free_lengths and (lengths[0] < min(1, spec.num_context) or lengths[1] < 1):
        raise ValueError(f"num_context and num_predict must be at least 1, got {lengths[0]} and {lengths[1]}")
    return lengths


def resolve_budget(budget: int | str) -> int:
    """Frames that may be kept: a whole number, or one of the benchmark's budget names.

    Raises:
        ValueError: below 1, if unknown, or if neither a name nor a whole number.
    """
    if isinstance(budget, str) and not budget.lstrip("-").isdigit():
        if budget not in BUDGETS:
            raise ValueError(unknown_name("budget", budget, list(BUDGETS)) + "; a whole number of frames works too")
        return BUDGETS[budget]
    if isinstance(budget, bool | float):
        raise ValueError(f"the budget must be a whole number of frames, got {budget}")
    max_frames = int(budget)
    if max_frames < 1:
        raise ValueError(f"the budget must be at least 1 frame, got {max_frames}")
    return max_frames


def resolve_budgets(budget: int | str | Sequence[int | str]) -> tuple[int, ...]:
    """One budget or several (a list, or names and numbers separated by commas), ascending, each once.

    Raises:
        ValueError: as `resolve_budget`, or if there is none.
    """
    several = budget.split(",") if isinstance(budget, str) else budget if isinstance(budget, Sequence) else [budget]
    if not several:
        raise ValueError("a budget is needed: a number of frames or one of the benchmark's names")
    return tuple(sorted({resolve_budget(item.strip() if isinstance(item, str) else item) for item in several}))
