"""A rollout's noise: a function of its seed and the step alone, not of the other rollouts in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from far_env.device import torch_defaults, upload
from far_env.host.protocol import Unit, split_units
from far_env.workload import HARNESS, Workload

BENCHMARK_SEED = 42
"""The benchmark seeds clip number i with 42 + i."""
TRAJECTORY_STRIDE = 1_000_000
"""Between the noise seeds of a clip's trajectories; clips and seeds count less, so that no two trajectories share noise."""


def trajectory_seeds(seed: int, count: int) -> list[int]:
    """Noise seeds of ``count`` continuations of every clip; clip i is played with each of them plus i. The first is ``seed``.

    Raises:
        ValueError: if there is none, or if the seed is so large that it could be that of another trajectory.
    """
    if count < 1:
        raise ValueError(f"the number of trajectories must be at least 1, got {count}")
    if count > 1 and seed >= TRAJECTORY_STRIDE:
        raise ValueError(f"with several trajectories, noise seeds must be below {TRAJECTORY_STRIDE:,}, got {seed}")
    return [seed + number * TRAJECTORY_STRIDE for number in range(count)]


def trajectory(noise_seed: int) -> int:
    """The number of the trajectory that has this noise seed, from 0 on."""
    return noise_seed // TRAJECTORY_STRIDE


def seeds_text(seeds: Sequence[int]) -> str:
    """Noise seeds as text; those of trajectories as the seed that they belong to, and how many there are."""
    first = sorted({seed % TRAJECTORY_STRIDE for seed in seeds})
    count = len(seeds) // len(first) if first else 0
    if count < 2 or sorted(seeds) != sorted(seed for base in first for seed in trajectory_seeds(base, count)):
        return ", ".join(map(str, seeds))
    return f"{', '.join(map(str, first))} ({count} trajectories{' each' if len(first) > 1 else ''})"


@torch_defaults()
def rollout_noise(noise_seed: int, num_steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
    """Initial noise of every step (num_steps, C, h, w), float32 on the CPU.

    Drawn one step at a time from one generator, in the benchmark's order, so that step i does not depend on ``num_steps``.
    """
    generator = torch.Generator().manual_seed(noise_seed)
    return torch.stack([torch.randn((1, 1, *latent_shape), generator=generator)[0, 0] for _ in range(num_steps)])


@torch_defaults()
def harness_noise(
    noise_seed: int, num_steps: int, latent_shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The same as the benchmark's program draws it: on the device and in the dtype of the host, (num_steps, C, h, w).

    Other numbers than `rollout_noise` on a GPU, where they come from CUDA's generator. In float32 on a CPU they are the same.
    """
    generator = torch.Generator(device).manual_seed(noise_seed)
    draws = [torch.randn((1, 1, *latent_shape), generator=generator, device=device, dtype=dtype) for _ in range(num_steps)]
    return torch.cat(draws)[:, 0]


def workload_noise(workload: Workload, noise_seed: int, units: Sequence[Unit] | None = None) -> list[Tensor]:
    """Initial noise of generated units, (C, h, w) or (n, C, h, w) each, as the workload draws it: latent after latent.

    It is on the host's device and in its dtype.

    Args:
        units: their sizes; None for those of the workload.
    """
    host = workload.host
    units = workload.units[workload.context_units :] if units is None else units
    num_latents = sum(unit.latents for unit in units)
    if workload.noise == HARNESS:
        noise = harness_noise(noise_seed, num_latents, host.latent_shape, host.device, host.dtype)
    else:
        noise = upload(rollout_noise(noise_seed, num_latents, host.latent_shape), host.device, host.dtype)
    return split_units(host, noise, units)
