"""Workloads and budgets: which clips, which host, how many frames are given, predicted and may be kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from far_env.clips.clip import ClipSource
from far_env.clips.dmlab import DMLab
from far_env.clips.ucf101 import UCF101
from far_env.clips.worlds import WORLDS
from far_env.config import require_positive
from far_env.contract import UNLIMITED_FRAMES, unknown_name
from far_env.device import resolve_device, resolve_precision
from far_env.frame_meta import frame_size_mb
from far_env.host.weights import Host, load_host

BUDGETS = {
    "full_history_budget": UNLIMITED_FRAMES,
    "medium_history_budget": 8,
    "tight_history_budget": 4,
}


@dataclass(frozen=True)
class Workload:
    """Everything a rollout needs but the clip's number, the seed and the policy.

    Attributes:
        name: as registered.
        clips: where clips come from.
        host: the frozen video model.
        num_context: true frames given at the start.
        num_predict: frames generated after them.
        num_steps: ODE steps per generated frame.

    Raises:
        ValueError: if a length or the number of steps is below 1.
    """

    name: str
    clips: ClipSource
    host: Host
    num_context: int
    num_predict: int
    num_steps: int

    def __post_init__(self) -> None:
        require_positive(self, "num_context", "num_predict", "num_steps")

    @property
    def num_frames(self) -> int:
        """Context and predicted frames together."""
        return self.num_context + self.num_predict

    def capacity_mb(self, max_frames: int) -> float:
        """MiB of float32 latents that a history of ``max_frames`` takes."""
        return max_frames * frame_size_mb(self.host.latent_shape)


@dataclass(frozen=True)
class WorkloadSpec:
    """How a registered workload is built.

    Attributes:
        clips: makes the clip source.
        num_context, num_predict: as in `Workload`.
        host: what predicts unless another host is given.
        num_steps: ODE steps; None leaves them to the host.
    """

    clips: Callable[..., ClipSource]
    num_context: int
    num_predict: int
    host: str = "embedded"
    num_steps: int | None = None


def _world(name: str) -> Callable[[], ClipSource]:
    return lambda: WORLDS[name]


WORKLOADS: dict[str, WorkloadSpec] = {
    "pan": WorkloadSpec(_world("pan"), 5, 11),
    "cuts": WorkloadSpec(_world("cuts"), 5, 11),
    "orbit": WorkloadSpec(_world("orbit"), 36, 36, "embedded_long"),
    "ucf101_short_prediction": WorkloadSpec(partial(UCF101, num_frames=16), 5, 11, "far_b_ucf101", 20),
    "dmlab_long_prediction": WorkloadSpec(partial(DMLab, num_frames=72), 36, 36, "far_b_long_dmlab", 20),
}
"""The embedded worlds, and the benchmark's two workloads (without guidance; DMLab's host gets the null action)."""


def make_workload(
    name: str,
    *,
    host: str | os.PathLike | None = None,
    device: str = "auto",
    precision: str = "float32",
    **clip_options: object,
) -> Workload:
    """Build a registered workload.

    Args:
        name: one of `WORKLOADS`.
        host: "embedded", a released transformer, a host folder, or None for the workload's own.
        device: "auto", "cpu", "cuda", ….
        precision: "float32", "bfloat16" (as the released models were trained and the benchmark runs them), or "auto".
        clip_options: passed to the clip source (a data folder, say).

    Raises:
        ValueError: on an unknown name (the nearest one is suggested), options the source does not take, or a host for frames
            of another size.
    """
    if name not in WORKLOADS:
        raise ValueError(unknown_name("workload", name, list(WORKLOADS)))
    spec = WORKLOADS[name]
    try:
        clips = spec.clips(**clip_options)
    except TypeError as error:
        raise ValueError(f"workload {name} does not take these clip options: {error}") from error
    place = resolve_device(device)
    loaded = load_host(spec.host if host is None else host, str(place), resolve_precision(precision, place))
    if loaded.frame_size != clips.size:
        raise ValueError(f"host {loaded.name} works on frames of {loaded.frame_size}², the clips of {name} have {clips.size}²")
    num_steps = loaded.num_steps if spec.num_steps is None else spec.num_steps
    return Workload(name, clips, loaded, spec.num_context, spec.num_predict, num_steps)


def resolve_budget(budget: int | str) -> int:
    """Frames that may be kept: a whole number, or one of the benchmark's budget names.

    Raises:
        ValueError: below 1, if unknown, or if neither a name nor a whole number.
    """
    if isinstance(budget, str) and not budget.lstrip("-").isdigit():
        if budget not in BUDGETS:
            raise ValueError(unknown_name("budget", budget, list(BUDGETS)) + " A number of frames works too")
        return BUDGETS[budget]
    if isinstance(budget, bool | float):
        raise ValueError(f"the budget must be a whole number of frames, got {budget}")
    max_frames = int(budget)
    if max_frames < 1:
        raise ValueError(f"the budget must be at least 1 frame, got {max_frames}")
    return max_frames


def check_decides(workload: Workload, max_frames: int) -> None:
    """Raise ValueError if no decision under this budget can influence a frame of the workload."""
    if max_frames > workload.num_frames - 2:
        raise ValueError(
            f"a budget of {max_frames} leaves nothing to decide in {workload.name}, whose clips have {workload.num_frames} "
            f"frames; use at most {workload.num_frames - 2}"
        )
