"""Check that this machine runs a benchmark workload at full size: released architecture, random weights, a few frames.

Run as ``far-env selftest --workload dmlab_long_prediction``. No download; under two minutes on two free CPU cores.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import SPLITS, Clip
from far_env.clips.video_folder import VideoFolder
from far_env.clips.worlds import WORLDS
from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan
from far_env.device import peak_memory_mib, resolve_device, timed
from far_env.errors import unknown_name
from far_env.evaluation.facts import record_facts
from far_env.host.precision import resolve_precision
from far_env.host.random_host import random_host
from far_env.host.zoo import RELEASED
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.noise import BENCHMARK_SEED, rollout_noise
from far_env.rollout.play import play
from far_env.rollout.reference import Rollout, reference_rollout
from far_env.workload import Workload
from far_env.workloads import BUDGETS, WORKLOADS

WORLD = "orbit"
"""The world from which the clip is made if no data are given."""
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Norm of the difference between engine and reference over the norm of the latents."""
CPU_STEPS = 2
"""ODE steps on a CPU, where those of the workload take too long."""


class KeepEnds:
    """Keeps the oldest and the newest frames, half of the budget each, so that the history has both a prefix and a gap."""

    name = "keep_ends"

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the first half of the budget and fill it up with the newest."""
        num_frames, max_frames = len(chunk_meta_list), int(budget_state["max_frames"])
        num_oldest = max_frames // 2
        return make_plan([*range(num_oldest), *range(num_frames - (max_frames - num_oldest), num_frames)], num_frames)


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, and the values it compared."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test.

    Attributes:
        facts: workload, host, precision, machine and versions.
        checks: see `self_test`.
        seconds: ``context`` to encode the given frames, ``frame`` and ``reference_frame`` per generated frame by the engine and
            by the reference loop, ``decode`` to decode one.
        peak_memory_mib: of the process, or allocated on the GPU, until the engine was done.
    """

    facts: dict[str, object]
    checks: list[Check]
    seconds: dict[str, float]
    peak_memory_mib: float

    @property
    def failures(self) -> list[str]:
        """The checks that failed, each as one line."""
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]

    def summary(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": not self.failures}

    def text(self) -> str:
        """The result as lines of text."""
        lines = [f"  {'ok' if check.passed else 'FAILED':<8}{check.name:<12}{check.detail}" for check in self.checks]
        template = (
            "{workload}, {context} + {predict} frames, budget {budget}, {ode_steps} ODE steps; "
            "host {host}, {dtype} on {machine}\n"
            "{checks}\n"
            "  {frame_s:.3g} s per generated frame (reference loop {reference_frame_s:.3g} s), {context_s:.3g} s to encode the "
            "context, {decode_s:.3g} s to decode a frame\n"
            "  peak memory {peak:.0f} MiB"
        )
        seconds = {f"{name}_s": value for name, value in self.seconds.items()}
        return template.format(**self.facts, **seconds, checks="\n".join(lines), peak=self.peak_memory_mib)


def full_size_workload(
    name: str,
    *,
    device: str = "auto",
    precision: str | None = None,
    num_frames: int = 3,
    num_steps: int | None = None,
    data_dir: str | None = None,
) -> tuple[Workload, Clip]:
    """A registered workload on its released architecture with random weights, and a clip for it.

    Args:
        name: a workload whose host is a released one.
        precision: as in `make_workload`; by default bfloat16 on a GPU, float32 elsewhere.
        num_frames: frames to generate.
        num_steps: ODE steps; by default those of the workload on a GPU, `CPU_STEPS` elsewhere.
        data_dir: folder of videos for the clip; by default it is made from a procedural world.

    Raises:
        ValueError: on an unknown workload, one without a released host, a device that does not exist, or data without a clip.
    """
    if name not in WORKLOADS or WORKLOADS[name].host not in RELEASED or not WORKLOADS[name].num_context:
        raise ValueError(unknown_name("workload with a released host", name, _workloads_of_released_hosts()))
    spec, place = WORKLOADS[name], resolve_device(device)
    on_gpu = place.type == "cuda"
    if num_frames < 1 or (num_steps is not None and num_steps < 1):
        raise ValueError(f"a self-test needs at least 1 frame and 1 ODE step, got {num_frames} and {num_steps}")
    dtype = resolve_precision(precision or ("bfloat16" if on_gpu else "float32"), place)
    length, clips = spec.num_context + num_frames, WORLDS[WORLD]
    if data_dir is not None:
        clips = spec.clips(data_dir=data_dir, num_frames=length)
    host = random_host(spec.host, place, dtype)
    if num_steps is None:
        num_steps = (spec.num_steps or host.num_steps) if on_gpu else CPU_STEPS
    if isinstance(clips, VideoFolder):
        clips.host = host
        split = next(split for split in ("test", *SPLITS) if clips.num_clips(split))
        clip = clips.clip(split, 0)
    else:
        clip = made_clip(length, host.frame_size, host.num_classes or 1)
    lengths = (spec.num_context, num_frames, num_steps)
    return Workload(name, clips, host, *lengths, guidance=spec.guidance, actions=spec.actions), clip


def _workloads_of_released_hosts() -> list[str]:
    """Their names; workloads of plugins that cannot be imported are left out."""
    names = []
    for name in WORKLOADS:
        with contextlib.suppress(ValueError):
            if WORKLOADS[name].host in RELEASED and WORKLOADS[name].num_context:
                names.append(name)
    return names


def made_clip(num_frames: int, size: int, num_actions: int = 1) -> Clip:
    """A clip of a procedural world, played forwards and backwards, in a multiple of its size; the actions are cyclic."""
    clip = WORLDS[WORLD].clip("test", 0)
    there_and_back = np.concatenate([clip.frames, clip.frames[-2:0:-1]])
    frames = np.resize(there_and_back, (num_frames, *clip.frames.shape[1:]))
    factor = size // clip.frames.shape[-1]
    return Clip(0, frames.repeat(factor, axis=2).repeat(factor, axis=3), np.arange(num_frames) % num_actions)


def self_test(workload: Workload, clip: Clip, noise_seed: int = BENCHMARK_SEED) -> SelfTest:
    """Roll one clip out by the engine and by the reference loop, under a budget smaller than the context, and compare.

    The checks: latents and pixels have their shapes; all values are finite, pixels in [0, 1]; the frames differ from
    their noise; both keep the same frames; both generate the same latents, up to `TOLERANCES`.
    """
    host, policy = workload.host, KeepEnds()
    max_frames = min(BUDGETS["medium_history_budget"], max(1, workload.num_context - 1))
    if host.device.type == "cuda":
        for _ in range(2):  # the first use of a kernel is slower, and a CUDA graph is made at the second request
            play(workload, [clip], [noise_seed], policy, max_frames)
        torch.cuda.reset_peak_memory_stats(host.device)
    seconds: dict[str, float] = {}
    memo = FrameMemo(DEFAULT_BYTES)
    with timed(seconds, "context", host.device):
        RolloutBatch(workload, 1, memo).begin([0], [clip], [noise_seed])
    with timed(seconds, "frame", host.device):
        batch, (decisions,) = play(workload, [clip], [noise_seed], policy, max_frames, memo=memo)
    with timed(seconds, "decode", host.device):
        frames = batch.decode([0])[0]
    peak = peak_memory_mib(host.device)
    with timed(seconds, "reference_frame", host.device):
        reference = reference_rollout(workload, clip, policy, max_frames, noise_seed)
    for name in ("frame", "decode", "reference_frame"):
        seconds[name] /= workload.num_predict
    kept = [(decision.step, list(decision.kept)) for decision in decisions]
    latents = batch.generated([0])[0].float()
    checks = _checks(workload, noise_seed, latents, frames.float(), kept, reference)
    facts = {
        "workload": workload.name,
        "context": workload.num_context,
        "predict": workload.num_predict,
        "budget": max_frames,
        "noise_seed": noise_seed,
        **record_facts(workload),
    }
    return SelfTest(facts, checks, seconds, peak)


def _checks(
    workload: Workload, noise_seed: int, latents: Tensor, frames: Tensor, kept: list[tuple[int, list[int]]], reference: Rollout
) -> list[Check]:
    """See `self_test`."""
    host, num_frames = workload.host, workload.num_predict
    shapes = tuple(latents.shape), tuple(frames.shape)
    expected_shapes = (num_frames, *host.latent_shape), (num_frames, 3, host.frame_size, host.frame_size)
    finite = all(bool(values.isfinite().all()) for values in (latents, frames, reference.latents))
    low, high = float(frames.min()), float(frames.max())
    noise = rollout_noise(noise_seed, num_frames, host.latent_shape).to(latents)
    change = float((latents - noise).square().mean().sqrt())
    # Nothing depends on the plan after the last frame, which the engine does not request.
    expected = [(step, numbers) for step, numbers in reference.kept if step < num_frames - 1]
    exact = reference.latents.float()
    difference, tolerance = float((latents - exact).norm() / exact.norm()), TOLERANCES[host.dtype]
    decided = f"engine {_describe(kept)}, reference loop {_describe(expected)}"
    agreement = f"their latents differ by {difference:.1e} of the norm, {tolerance:.0e} is allowed"
    return [
        Check("shapes", shapes == expected_shapes, f"latents {shapes[0]}, frames {shapes[1]}"),
        Check("values", finite and 0 <= low <= high <= 1, f"{'' if finite else 'not '}finite, pixels {low:.3g} to {high:.3g}"),
        Check("movement", change > 0.1, f"latents are {change:.3g} away from their noise"),
        Check("decisions", kept == expected, decided),
        Check("agreement", difference <= tolerance, agreement),
    ]


def _describe(kept: list[tuple[int, list[int]]]) -> str:
    """Number of decisions and the last one, in words."""
    return f"made {len(kept)}" + (f", the last one kept {kept[-1][1]}" if kept else "")
