"""The next frame: solve the flow-matching ODE from noise, given clean context frames encoded once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from far_env.host.far import FAR, Modulations


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


class FrameSampler:
    """Solves the ODE of one new frame per row, again and again with the same model and steps.

    Args:
        model: a frozen FAR transformer.
        num_steps: Euler steps.
        guidance_scale: above 1, classifier-free guidance null + scale · (conditional − null), the null class on all frames.

    Raises:
        ValueError: on guidance for an unconditional model, or num_steps below 1.
    """

    def __init__(self, model: FAR, num_steps: int, guidance_scale: float = 1.0) -> None:
        self.model = model
        self.guidance_scale = guidance_scale
        self.guided = guidance_scale > 1
        if self.guided and model.null_class is None:
            raise ValueError(f"guidance_scale {guidance_scale} needs a model with labels or actions; this one is unconditional")
        self._device = next(model.parameters()).device
        scheduler = make_scheduler(num_steps)
        self.times = scheduler.timesteps.tolist()
        self.sigma_changes = scheduler.sigmas.diff().tolist()
        self._shared: dict[tuple[float, torch.dtype], Modulations] = {}

    @torch.no_grad()
    def __call__(
        self,
        memory: Tensor,
        noise: Tensor,
        *,
        lengths: Tensor | None = None,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """Generate the frame that follows K clean ones.

        Args:
            memory: see `FAR.next_frame`; with guidance 2B rows, those of the null class first.
            noise: initial noise (B, 1, C, h, w).
            lengths: (B,) real clean frames per row, or None where all K are.
            label: (B,), action: (B, 1) of the new frame, where the model takes them.

        Returns:
            The clean latent (B, 1, C, h, w).
        """
        if self.guided:
            label, action = (with_null_class(self.model, given) for given in (label, action))
            lengths = None if lengths is None else torch.cat([lengths, lengths])
        frame = self.model.next_frame(memory, noise, lengths)
        latent = noise
        steps = zip(self._modulations(memory.shape[2], noise.dtype, label, action), self.sigma_changes, strict=True)
        for modulations, change in steps:
            velocity = self.model.denoise(torch.cat([latent, latent]) if self.guided else latent, modulations, frame)
            if self.guided:
                null, conditional = velocity.chunk(2)
                velocity = null + self.guidance_scale * (conditional - null)
            # Euler in float32, as diffusers' scheduler does it.
            latent = (latent.float() + change * velocity.float()).to(noise.dtype)
        return latent

    def _modulations(
        self, batch: int, dtype: torch.dtype, label: Tensor | None, action: Tensor | None
    ) -> Iterable[Modulations]:
        """One per step."""
        if self.model.condition is not None:
            times = (torch.full((batch, 1), time, device=self._device) for time in self.times)
            return (self.model.modulate(time, label=label, action=action, dtype=dtype) for time in times)
        return (self.shared_modulations(time, dtype) for time in self.times)

    @torch.no_grad()
    def shared_modulations(self, time: float, dtype: torch.dtype) -> Modulations:
        """Of all frames at this time, for a model that nothing else conditions; computed once."""
        key = time, dtype
        if key not in self._shared:
            self._shared[key] = self.model.modulate(torch.full((1, 1), time, device=self._device), dtype=dtype)
        return self._shared[key]


def with_null_class(model: FAR, classes: Tensor | None) -> Tensor | None:
    """Rows of the null class, then the given ones, as one batch."""
    return None if classes is None else torch.cat([torch.full_like(classes, model.null_class), classes])


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
    sampler = FrameSampler(model, num_steps, guidance_scale)
    if sampler.guided:
        context = None if context is None else torch.cat([context, context])
    memory = model.new_memory(len(noise) * (1 + sampler.guided), num_context + 1, noise)
    if num_context:
        context_label, context_action = label, None if action is None else action[:, :-1]
        if sampler.guided:
            context_label, context_action = (with_null_class(model, given) for given in (context_label, context_action))
        known = model.encode_context(context, label=context_label, action=context_action)
        memory[:, :, :, : known.shape[3]] = known
    return sampler(memory, noise, lengths=lengths, label=label, action=None if action is None else action[:, -1:])
