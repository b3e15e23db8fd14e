"""Labels of future utility: how well the host denoises the true next frames when it sees one frame of the history.

After Future-Aware Recall (Kim, Lai et al. 2026), whose retriever learns softmax(utility): there the loss of the realised future
per candidate memory, averaged over times, is the utility's negative. Here a candidate is one kept frame, seen beside the true
frame just before the one denoised, which every rollout has. Train clips only, never a policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from far_env.host.sampler import FrameSampler

HORIZON = 4
"""True frames that are denoised."""
_BATCH = 256


@torch.no_grad()
def denoising_losses(sampler: FrameSampler, sources: Tensor, newest: Tensor, future: Tensor, noise_key: str) -> Tensor:
    """Mean squared error of the velocity, over the next frames and two ODE steps, with each source in view.

    Args:
        sampler: of an unconditional host, without guidance.
        sources: kept latents (n, C, h, w).
        newest: the true latent (C, h, w) of the frame generated last.
        future: true latents (m, C, h, w) of the frames still to come, of which the first `HORIZON` count.
        noise_key: what the noise follows from (`far_env.rollout.memo.content_key`); it is the same for all sources.

    Returns:
        (n,), float32 on the CPU.
    """
    targets = future[:HORIZON]
    before = torch.cat([newest[None], targets[:-1]])
    generator = torch.Generator().manual_seed(int(noise_key[:12], 16))
    noise = torch.randn(targets.shape, generator=generator).to(targets)
    count, steps = len(targets), (len(sampler.times) // 4, len(sampler.times) // 2)
    pairs = [(source, index) for source in range(len(sources)) for index in range(count)]
    losses = torch.zeros(len(sources), count)
    for first in range(0, len(pairs), _BATCH):
        chosen = pairs[first : first + _BATCH]
        own, index = (list(part) for part in zip(*chosen, strict=True))
        contexts = torch.stack([sources[own], before[index]], dim=1)
        target, drawn = targets[index][:, None], noise[index][:, None]
        model = sampler.model
        room = sum(model.token_counts(2, target))
        memory = model.new_memory(len(chosen), room + model.tokens_per_frame(target), target)
        memory[:, :, :, :room] = model.encode_context(contexts, shared=sampler.shared_modulations)
        for step in steps:
            sigma = sampler.times[step] / 1000
            noisy = ((1 - sigma) * target.float() + sigma * drawn.float()).to(target)
            velocity = sampler.velocity(memory, noisy, [2] * len(chosen), step)
            error = velocity.float() - (drawn.float() - target.float())
            losses[own, index] += error.square().flatten(1).mean(dim=1).cpu() / len(steps)
    return losses.mean(dim=1)
