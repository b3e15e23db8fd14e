"""The arguments that the single and the vector environment share: checked here, and turned into an `EpisodeBatch`."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from far_env.clips.clip import check_clip_id, check_clip_options, check_split
from far_env.contract import check_signals, resolve_feedback
from far_env.device import PRECISIONS
from far_env.envs.episodes import EpisodeBatch, Reward
from far_env.errors import unknown_name
from far_env.metrics import require_metrics
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workload import Workload
from far_env.workloads import make_workload, resolve_budgets

RESET_OPTIONS = ("clip_id", "noise_seed", "budget")


@dataclass(frozen=True)
class EpisodeConfig:
    """The episodes that an environment plays and their scores.

    Attributes:
        workload: a registered name ("pan", "cuts", …) or a `far_env.workload.Workload`.
        budget: frames that may be kept, or one of the benchmark's budget names; of several, each episode draws one.
        reward: "psnr", "ssim", "lpips" (negated), or a dict of weights such as {"psnr": 0.1, "lpips": -1}.
        telescoping: pay the change of the running clip score at every decision; the sum is the same.
        metrics: further metrics for ``info`` at the end.
        split: which clips reset draws from: "train", "validation", "test", or another split of the clip source.
        num_clips: reset draws from the first so many clips of the split; None for all.
        host: "embedded", a released transformer or a host folder; None for the workload's default.
        device: "auto" uses a GPU where there is one; "cpu", "cuda", "cuda:N".
        precision: "float32", "bfloat16" or "auto". Neither a surrounding ``torch.autocast`` nor torch's default dtype or
            device changes it.
        memo_bytes: memory for frames that are generated again, 0 for none. Drawing the same few clips often becomes cheaper;
            results then depend in their last bits on what was computed before.
        signals: what the agent observes beyond the benchmark's features, names of `far_env.contract.SIGNALS`: of the
            latents ("lat_cos", "column_gap", …) or of the host's attention ("attn_mass", …). Such an agent cannot be exported.
        clip_options: arguments of the clip source, such as a data folder or the options of a world.
        feedback: "generated", or "true": the true frame enters the history in place of each generated one, see
            `far_env.workload.Workload`. None for the workload's, which is "generated" unless it says otherwise.

    Raises:
        ValueError: on a value that a field does not take; the message names the field and the value.
        MetricUnavailable: if a metric cannot be computed on this machine.
    """

    workload: str | Workload = "pan"
    budget: int | str | Sequence[int | str] = 4
    reward: str | Mapping[str, float] = "psnr"
    telescoping: bool = False
    metrics: Sequence[str] = ()
    split: str = "train"
    num_clips: int | None = None
    host: str | None = None
    device: str = "auto"
    precision: str = "float32"
    memo_bytes: int = 0
    signals: Sequence[str] = ()
    clip_options: Mapping[str, Any] = field(default_factory=dict)
    feedback: str | bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.workload, str | Workload):
            raise ValueError(f"workload must be a registered name or a Workload, got {self.workload!r}")
        _ = self.budgets, self.scoring  # which check budget, reward and telescoping
        require_metrics(self._names("metrics"))
        if self.num_clips is not None and not _is_whole(self.num_clips):
            raise ValueError(f"num_clips must be a whole number or None, got {self.num_clips!r}")
        if self.precision not in ("auto", *PRECISIONS):
            raise ValueError(f"unknown precision {self.precision!r}; use auto, {' or '.join(PRECISIONS)}")
        if not _is_whole(self.memo_bytes) or self.memo_bytes < 0:
            raise ValueError(f"memo_bytes must be a whole number of at least 0, got {self.memo_bytes!r}")
        check_signals(self._names("signals"))
        check_clip_options(self.clip_options)
        if self.feedback is not None:
            resolve_feedback(self.feedback)

    @staticmethod
    def from_arguments(arguments: Mapping[str, Any]) -> EpisodeConfig:
        """From an environment's keyword arguments; ``clip_options`` None means none.

        Raises:
            TypeError: on an argument that is not a field; the nearest name is suggested.
        """
        field_names = [field.name for field in fields(EpisodeConfig)]
        for name in arguments:
            if name not in field_names:
                raise TypeError(unknown_name("argument", name, field_names))
        if arguments.get("clip_options", {}) is None:
            arguments = {**arguments, "clip_options": {}}
        return EpisodeConfig(**arguments)

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of frames that an episode may be allowed to keep, ascending."""
        try:
            return resolve_budgets(self.budget)
        except TypeError:
            raise ValueError(
                f"budget must be a number of frames, a budget name or a list of these, got {self.budget!r}"
            ) from None

    @cached_property
    def scoring(self) -> Reward:
        """The scoring of an episode."""
        if not isinstance(self.telescoping, bool | np.bool_):
            raise ValueError(f"telescoping must be true or false, got {self.telescoping!r}")
        if not isinstance(self.reward, str | Mapping):
            raise ValueError(f"reward must be a metric's name or a dict of weights, got {self.reward!r}")
        for name, weight in {} if isinstance(self.reward, str) else self.reward.items():
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"reward: the weight of {name} must be a finite number, got {weight!r}")
        return Reward.make(self.reward, bool(self.telescoping))

    def make_episodes(self, num_rows: int, episode_class: type[EpisodeBatch] = EpisodeBatch) -> EpisodeBatch:
        """Load the workload and return ``num_rows`` episodes of it, not yet begun.

        Raises:
            ValueError: if the workload cannot be made, has too few clips, or leaves nothing to decide under a budget.
        """
        workload = self.make_workload()
        return episode_class(workload, self.budgets, num_rows, self.scoring, self.metrics, self.memo_bytes, tuple(self.signals))

    def make_workload(self) -> Workload:
        """Load the workload. Raises ValueError if it cannot be made or has too few clips."""
        workload = self.workload
        if isinstance(workload, str):
            placement = {"host": self.host, "device": self.device, "precision": self.precision}
            workload = make_workload(workload, **placement, feedback=self.feedback, **self.clip_options)
        elif self.feedback is not None:
            workload = replace(workload, feedback=self.feedback)
        check_split(workload.clips, self.split)
        available = workload.clips.num_clips(self.split)
        if available == 0:
            raise ValueError(f"{workload.name}/{self.split} has no clips; use another split or more data")
        if self.num_clips is not None and not 1 <= self.num_clips <= available:
            raise ValueError(
                f"num_clips must be in 1 to {available}, the clips of {workload.name}/{self.split}; got {self.num_clips}"
            )
        return workload

    def draw(
        self,
        rng: np.random.Generator,
        workload: Workload,
        clip_id: int | None = None,
        noise_seed: int | None = None,
        budget: int | None = None,
    ) -> tuple[int, int, int]:
        """A clip id, a noise seed and a budget: those given, else a random clip, its benchmark seed and a random budget.

        Raises:
            ClipIdError: on a clip id out of range.
            ValueError: on a budget that is not one of `budgets`.
        """
        if clip_id is None:
            clip_id = int(rng.integers(self.num_clips or workload.clips.num_clips(self.split)))
        clip_id = operator.index(clip_id)
        check_clip_id(workload.clips, self.split, clip_id)
        if budget is None:
            # A single budget draws no random number, so that clips are the same whatever the budget is.
            budget = self.budgets[0] if len(self.budgets) == 1 else int(rng.choice(self.budgets))
        elif budget not in self.budgets:
            allowed = ", ".join(map(str, self.budgets))
            raise ValueError(f"budget {budget} is none of those that the environment was made with: {allowed}")
        return clip_id, BENCHMARK_SEED + clip_id if noise_seed is None else operator.index(noise_seed), operator.index(budget)

    def _names(self, name: str) -> Sequence[str]:
        """A field that must be a sequence of strings."""
        value = getattr(self, name)
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} must be a list of names, got {value!r}")
        return value


def check_reset_options(options: dict[str, Any] | None, known: Sequence[str] = RESET_OPTIONS) -> dict[str, Any]:
    """The options as a new dict. Raises ValueError on a key that reset does not take."""
    options = dict(options or {})
    for key in options:
        if key not in known:
            raise ValueError(unknown_name("reset option", key, known))
    return options


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
