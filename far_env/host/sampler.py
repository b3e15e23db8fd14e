"""The next frame: solve the flow-matching ODE from noise, given clean context frames encoded once."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from far_env.host.far import FAR


def make_scheduler(num_steps: int, device: torch.device | str = "cpu") -> FlowMatchEulerDiscreteScheduler:
    """The Euler scheduler with upstream's settings, set to ``num_steps`` steps from sigma 1 to 0.

    Raises:
        ValueError: if num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(num_steps, device=device)
    return scheduler


@torch.no_grad()
def sample_next_frame(
    model: FAR,
    context: Tensor | None,
    noise: Tensor,
    *,
    num_steps: int = 20,
    guidance_scale: float = 1.0,
    label: Tensor | None = None,
    action: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Generate the frame that follows the context.

    Args:
        model: a FAR transformer.
        context: clean latents (B, K, C, h, w), or None for no context.
        noise: initial noise (B, 1, C, h, w).
        num_steps: Euler steps.
        guidance_scale: above 1, classifier-free guidance null + scale · (conditional − null), the null class on all frames.
        label: (B,) class indices, where the model takes them.
        action: (B, K+1) action indices, the last one belongs to the new frame, where the model takes them.
        lengths: (B,) real context frames per row where rows differ; shorter rows are padded at the end. Not with actions.

    Returns:
        The clean latent (B, 1, C, h, w).

    Raises:
        ValueError: on guidance for an unconditional model, or an action of the wrong length.
    """
    num_context = 0 if context is None else context.shape[1]
    if action is not None and action.shape[1] != num_context + 1:
        raise ValueError(
            f"action has {action.shape[1]} entries; {num_context} context frames and the new one need {num_context + 1}"
        )
    guided = guidance_scale > 1
    if guided and model.null_class is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs a model with labels or actions; this one is unconditional")
    if guided:
        # Rows of the null condition first, then the given one, as one batch.
        context = None if context is None else torch.cat([context, context])
        label = None if label is None else torch.cat([torch.full_like(label, model.null_class), label])
        action = None if action is None else torch.cat([torch.full_like(action, model.null_class), action])
        lengths = None if lengths is None else torch.cat([lengths, lengths])

    context_action, frame_action = (None, None) if action is None else (action[:, :-1], action[:, -1:])
    cache = None
    if num_context:
        cache = model.encode_context(context, lengths=lengths, label=label, action=context_action)
    scheduler = make_scheduler(num_steps, noise.device)
    frame = noise
    for time in scheduler.timesteps:
        stacked = torch.cat([frame, frame]) if guided else frame
        times = time.expand(len(stacked), 1)
        velocity = model.denoise(stacked, times, cache, label=label, action=frame_action)
        if guided:
            null, conditional = velocity.chunk(2)
            velocity = null + guidance_scale * (conditional - null)
        frame = scheduler.step(velocity, time, frame).prev_sample
    return frame
