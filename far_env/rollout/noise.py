"""A rollout's noise: a function of its seed and the step alone, not of the other rollouts in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from far_env.device import torch_defaults

BENCHMARK_SEED = 42
"""The benchmark seeds clip number i with 42 + i."""


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
