"""Workloads and budgets: which clips, which host, how many frames are given, predicted and may be kept.

A workload is registered as an entry point of ``far_env.workloads``: a `WorkloadSpec`, or a function without arguments that
returns one. Those of far-env are declared the same way and are defined in this module.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from far_env.clips.clip import Clip, ClipSource
from far_env.clips.datasets import BAIR, UCF101, DMLab, Doom, Minecraft, RecordedFolder
from far_env.clips.prompted import PromptedVideos, PromptFolder
from far_env.clips.video_folder import VideoFolder
from far_env.clips.worlds import WORLDS
from far_env.config import require_positive
from far_env.contract import GENERATED, TRUE, UNLIMITED_FRAMES, resolve_feedback
from far_env.device import resolve_device
from far_env.errors import first_line, unknown_name
from far_env.frame_meta import frame_size_mb
from far_env.host.far_host import FARHost
from far_env.host.precision import resolve_precision
from far_env.host.protocol import Conditions, Host, Unit
from far_env.host.weights import load_host
from far_env.plugins import WORKLOADS as GROUP
from far_env.plugins import distribution_name, entry_points, load

BUDGETS = {
    "full_history_budget": UNLIMITED_FRAMES,
    "medium_history_budget": 8,
    "tight_history_budget": 4,
}
NULL_CLASS = -1.0
"""The value of the guidance that means the null class on all frames."""
PORTABLE, HARNESS = "portable", "harness"
NOISES = (PORTABLE, HARNESS)
"""Where noise is drawn: on the CPU in float32, the same for every device, or as the benchmark's program draws it."""
UNITS, FRAMES = BUDGET_UNITS = ("units", "frames")
"""What a budget counts where a host generates chunks of several frames: chunks, or the frames that they show."""
BENCHMARK_WORKLOADS = ("ucf101_short_prediction", "dmlab_long_prediction")
"""Those of the benchmark ar-video-kv-temporal-policy."""


@dataclass(frozen=True)
class Workload:
    """Everything a rollout needs but the clip's number, the seed and the policy.

    Lengths are in frames. A host may generate chunks of several frames: then a history, a plan and its numbers, steps and
    decisions count chunks, which are the *units* of the workload. With FAR a unit is a frame.

    Attributes:
        name: as registered.
        clips: where clips come from.
        host: the frozen video model.
        num_context: true frames given at the start; with 0 videos are generated from nothing, and have no true continuation.
        num_predict: frames generated after them.
        num_steps: ODE steps per generated frame.
        guidance: 1 for none; above 1 classifier-free guidance (arXiv 2207.12598), null + guidance · (conditional − null), with
            the null class on all frames; −1, as the benchmark writes it, for the null class on all frames and no guidance.
        actions: every frame conditions the host by its action, ``clip.actions[i]`` being that of frame i. Without, a host
            that takes classes gets the null class on all frames.
        labels: the host is conditioned on the class of every clip, ``clip.label``; classes are given as with actions.
        prompts: the host is conditioned on the text of every clip, ``clip.prompt``.
        budget_counts: one of `BUDGET_UNITS`. A budget in frames allows as many units as fit if each is of the largest size.
        feedback: "generated", or "true": after each generated frame the clip's true frame, encoded, enters the history in its
            place, so that errors do not accumulate. The metrics are still those of the generated frames. True and False, as
            YAML reads them, are accepted and stand for "true" and "generated".
        clip_options: those that it was made with, and the lengths if they were given, for the record.
        noise: one of `NOISES`. "harness" draws it on the host's device in its dtype, so that numbers depend on these.

    Raises:
        ValueError: if a length or the number of steps is below 1 (0 frames may be given), if the guidance is another number or
            needs classes that are not used, if the host does not take actions, labels or prompts, or needs prompts that are
            not used, on another feedback or noise, on true frames in a workload of the benchmark, or if the given or all frames
            are not whole units of the host.
    """

    name: str
    clips: ClipSource
    host: Host
    num_context: int
    num_predict: int
    num_steps: int
    guidance: float = 1.0
    actions: bool = False
    feedback: str = GENERATED
    clip_options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    noise: str = PORTABLE
    labels: bool = False
    prompts: bool = False
    budget_counts: str = UNITS

    def __post_init__(self) -> None:
        if self.budget_counts not in BUDGET_UNITS:
            raise ValueError(unknown_name("budget_counts", self.budget_counts, BUDGET_UNITS))
        if self.noise not in NOISES:
            raise ValueError(unknown_name("noise", self.noise, NOISES))
        object.__setattr__(self, "feedback", resolve_feedback(self.feedback))
        if self.feedback == TRUE and self.name in BENCHMARK_WORKLOADS:
            raise ValueError(
                f"{self.name} is a workload of the benchmark, which feeds back generated frames; use another workload for "
                "feedback of true frames"
            )
        require_positive(self, "num_predict", "num_steps")
        if self.num_context < 0 or (self.true_feedback and self.num_context == 0):
            raise ValueError(f"num_context of {self.name} must be at least {int(self.true_feedback)}, got {self.num_context}")
        if self.guidance != NULL_CLASS and not 1 <= self.guidance < math.inf:
            raise ValueError(f"the guidance of {self.name} must be 1, above 1, or −1 for the null class, got {self.guidance}")
        conditioned = bool(self.classes or self.prompts)
        if (self.guidance > 1 and not conditioned) or (self.guidance == NULL_CLASS and conditioned):
            use = "with" if conditioned else "without"
            raise ValueError(
                f"{self.name} has guidance {self.guidance} {use} actions, labels or prompts; above 1 needs them, "
                "−1 excludes them"
            )
        for condition, used in (("label", self.labels), ("action", self.actions), ("prompt", self.prompts)):
            if used and self.host.condition != condition:
                raise ValueError(
                    f"{self.name} conditions its host on {condition}s, which host {self.host.name} does not take; use a "
                    "workload without"
                )
        if self.host.condition == "prompt" and not self.prompts:
            raise ValueError(f"the host {self.host.name} needs a prompt for every clip, which {self.name} has not; use prompts")
        if self.actions and self.host.chunked:
            raise ValueError(f"{self.name} has an action for every frame, and host {self.host.name} generates chunks of frames")
        if self.num_context and self.num_context not in self._ends:
            ends = ", ".join(map(str, self._ends[:-1])) or "none"
            raise ValueError(
                f"the {self.num_context} given frames of {self.name} end within a chunk of host {self.host.name}, whose chunks "
                f"end at frame {ends}; give as many frames as whole chunks have"
            )

    @property
    def num_frames(self) -> int:
        """Context and predicted frames together."""
        return self.num_context + self.num_predict

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The sizes of all units of a clip, those that are given first."""
        return self.host.units(self.num_frames)

    @cached_property
    def _ends(self) -> list[int]:
        """Frames up to the end of each unit."""
        return list(itertools.accumulate(unit.frames for unit in self.units))

    @property
    def num_units(self) -> int:
        """Units of a clip, given and predicted."""
        return len(self.units)

    @property
    def context_units(self) -> int:
        """Units that are given."""
        return self._ends.index(self.num_context) + 1 if self.num_context else 0

    @property
    def predict_units(self) -> int:
        """Units that are generated."""
        return self.num_units - self.context_units

    def predicted_frames(self, num_steps: int) -> int:
        """Frames that the first ``num_steps`` generated units show."""
        done = self.context_units + num_steps
        return (self._ends[done - 1] if done else 0) - self.num_context

    @property
    def most_latents(self) -> int:
        """Latents of the largest unit."""
        return max(unit.latents for unit in self.units)

    @property
    def unit_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one unit in a history; a chunk is `far_env.host.protocol.as_wide_latent`."""
        channels, height, width = self.host.latent_shape
        return channels, height, width * self.most_latents

    def unit_sizes_mb(self, numbers: Sequence[int]) -> list[float]:
        """MiB of float32 latents of units of these numbers."""
        return [self.units[number].latents * frame_size_mb(self.host.latent_shape) for number in numbers]

    def max_units(self, budget: int) -> int:
        """Units that a history may hold under a budget. Raises ValueError if it does not hold the largest one."""
        if self.budget_counts == UNITS or budget >= UNLIMITED_FRAMES:
            return budget
        largest = max(unit.frames for unit in self.units)
        if budget < largest:
            raise ValueError(f"a budget of {budget} frames does not hold a chunk of {self.name}, which has {largest} frames")
        return budget // largest

    def conditions(self, actions: Sequence[int] = (), label: int | None = None, prompt: str | None = None) -> Conditions:
        """What a unit is generated with; actions are those of the kept frames and the new one."""
        return Conditions(self.num_steps, self.guidance, tuple(actions), label, prompt)

    @property
    def has_truth(self) -> bool:
        """Whether its clips have true frames; prompts alone have none."""
        return not getattr(self.clips, "without_frames", False)

    @property
    def classes(self) -> bool:
        """Whether the host is conditioned on the clips' actions or labels."""
        return self.actions or self.labels

    @property
    def true_feedback(self) -> bool:
        """Whether the history holds true frames in place of generated ones."""
        return self.feedback == TRUE

    def actions_of(self, clip: Clip, num_frames: int) -> tuple[int, ...]:
        """Actions of the clip's first ``num_frames`` frames; empty if the workload does without.

        Raises:
            ValueError: if the workload needs actions and the clip has none, too few, or some that the host does not accept.
        """
        if not self.actions:
            return ()
        who = f"{self.name} gives the actions of every frame to its host, and clip {clip.clip_id}"
        if clip.actions is None:
            raise ValueError(f"{who} has none; use data that comes with actions, or a workload without")
        actions = np.asarray(clip.actions)[:num_frames]
        num_classes = self.host.num_classes
        if actions.shape != (num_frames,):
            raise ValueError(f"{who} has them in the shape {np.shape(clip.actions)}; its {num_frames} frames need one each")
        if not np.issubdtype(actions.dtype, np.integer) or actions.min() < 0 or actions.max() >= num_classes:
            raise ValueError(
                f"{who} has {actions.dtype} actions from {actions.min()} to {actions.max()}; the host accepts "
                f"the whole numbers 0 to {num_classes - 1}"
            )
        return tuple(actions.tolist())

    def label_of(self, clip: Clip) -> int | None:
        """The clip's class; None if the workload does without. Raises ValueError if it has none that the host accepts."""
        if not self.labels:
            return None
        num_classes = self.host.num_classes
        if clip.label is None or not 0 <= clip.label < num_classes:
            raise ValueError(
                f"{self.name} gives the label of clip {clip.clip_id} to its host, which accepts 0 to {num_classes - 1}; the "
                f"clip has {'none' if clip.label is None else clip.label}"
            )
        return int(clip.label)

    def prompt_of(self, clip: Clip) -> str | None:
        """The clip's prompt; None if the workload does without. Raises ValueError if the clip has none."""
        if not self.prompts:
            return None
        if not clip.prompt or not clip.prompt.strip():
            raise ValueError(f"{self.name} gives the prompt of clip {clip.clip_id} to its host, and the clip has none")
        return clip.prompt

    def capacity_mb(self, max_units: int) -> float:
        """MiB of float32 latents that a history of ``max_units`` takes."""
        return max_units * frame_size_mb(self.unit_shape)


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

# `BENCHMARK_WORKLOADS`.
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
        raise ValueError(f"workload {name} does not take these clip options: {error}") from error
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
            raise ValueError(unknown_name("budget", budget, list(BUDGETS)) + "; a number of frames works too")
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


def check_decides(workload: Workload, max_frames: int) -> None:
    """Raise ValueError if no decision under this budget can influence a frame of the workload, or none can be rewarded."""
    if workload.num_context == 0:
        raise ValueError(f"{workload.name} generates videos from nothing: no true continuation tells which frames to keep")
    if workload.max_units(max_frames) > workload.num_units - 2:
        units = "chunks" if workload.host.chunked else "frames"
        raise ValueError(
            f"a budget of {max_frames} leaves nothing to decide in {workload.name}, whose clips have {workload.num_units} "
            f"{units}; use at most {workload.num_units - 2}"
        )


def deciding_budgets(workload: Workload, budgets: Sequence[int]) -> list[int]:
    """The budgets under which a decision can influence a frame of the workload. Raises ValueError if there is none."""
    deciding = [budget for budget in budgets if workload.max_units(budget) <= workload.num_units - 2]
    if not deciding:
        check_decides(workload, min(budgets))
    return deciding
