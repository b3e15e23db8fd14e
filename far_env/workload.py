"""One workload: which clips, which host, how many frames are given and predicted, and what a budget allows.

`far_env.workloads` has the registered ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from far_env.clips.clip import Clip, ClipSource
from far_env.config import require_positive
from far_env.contract import GENERATED, TRUE, UNLIMITED_FRAMES, resolve_feedback
from far_env.errors import unknown_name
from far_env.frame_meta import frame_size_mb
from far_env.host.protocol import Conditions, Host, Unit

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
