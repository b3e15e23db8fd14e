"""The next frame: solve the flow-matching ODE from noise, given clean context frames encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from far_env.host.blocks import AttentionCallback
from far_env.host.far import FAR, Modulations, NextFrame


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


class FrameProbe(Protocol):
    """Records how one frame per row is generated, without changing it. With guidance, rows of the null class come first."""

    def attention(self, query: Tensor, key: Tensor, table: Tensor, mask: Tensor | None) -> None:
        """Called by every block in order at every ODE step, see `far_env.host.blocks.AttentionCallback`."""

    def velocity(self, step: int, latent: Tensor, velocity: Tensor) -> None:
        """Called at ODE step 0, 1, …, with the noisy latent (B, 1, C, h, w) and its velocity, before the latent is changed."""


class FrameSampler:
    """Solves the ODE of one new frame per row; one sampler serves many frames of the same model and steps.

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
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        scheduler = make_scheduler(num_steps)
        self.times: list[float] = scheduler.timesteps.tolist()
        self.sigma_changes = scheduler.sigmas.diff().tolist()
        self._shared: dict[float, Modulations] = {}

    @torch.no_grad()
    def __call__(
        self,
        memory: Tensor,
        noise: Tensor,
        lengths: Sequence[int],
        *,
        label: Tensor | None = None,
        action: Tensor | None = None,
        probe: FrameProbe | None = None,
    ) -> Tensor:
        """Generate the frame that follows clean ones.

        Args:
            memory: see `FAR.next_frame`; with guidance 2B rows, those of the null class first.
            noise: initial noise (B, 1, C, h, w).
            lengths: numbers of clean frames (B,).
            label: (B,), action: (B, 1) of the new frame; None for the null class, if the model takes them.
            probe: called at every step.

        Returns:
            The clean latent (B, 1, C, h, w).
        """
        lengths = [*lengths, *lengths] if self.guided else lengths
        return self.solve(self.model.next_frame(memory, noise, lengths), noise, label=label, action=action, probe=probe)

    @torch.no_grad()
    def after(
        self,
        context: Tensor,
        noise: Tensor,
        positions: Tensor,
        *,
        label: Tensor | None = None,
        action: Tensor | None = None,
    ) -> Tensor:
        """Encode clean frames and generate the one that follows them; every row has as many.

        Only work of the device: nothing is read back from it, and nothing is uploaded to it.

        Args:
            context: clean latents (B, K, C, h, w).
            noise: initial noise (B, 1, C, h, w).
            positions: ascending time positions (K+1,).
            label: (B,), action: (B, K+1), the last one of the new frame; None for the null class, if the model takes them.

        Returns:
            The clean latent (B, 1, C, h, w).
        """
        model, num_clean = self.model, context.shape[1]
        num_tokens = sum(model.token_counts(num_clean, noise))
        memory = model.new_memory(len(noise) * (1 + self.guided), num_tokens + model.tokens_per_frame(noise), noise)
        if num_clean:
            of_context: dict[str, Any] = {"shared": self.shared_modulations}
            if label is not None or action is not None:
                classes = (label, None if action is None else action[:, :-1])
                of_context = dict(zip(("label", "action"), map(self._both_branches, classes), strict=True))
            clean = torch.cat([context, context]) if self.guided else context
            memory[:, :, :, :num_tokens] = model.encode_context(clean, positions=positions[:-1], **of_context)
        new_action = None if action is None else action[:, -1:]
        return self.solve(model.frame_after(memory, noise, positions), noise, label=label, action=new_action)

    @torch.no_grad()
    def solve(
        self,
        frame: NextFrame,
        noise: Tensor,
        *,
        label: Tensor | None = None,
        action: Tensor | None = None,
        probe: FrameProbe | None = None,
    ) -> Tensor:
        """The same as `__call__` for a frame that is prepared; with guidance for 2B rows, those of the null class first."""
        label, action = self._both_branches(label), self._both_branches(action)
        latent = noise
        on_attention = None if probe is None else probe.attention
        steps = zip(self._modulations(frame.memory.shape[2], label, action), self.sigma_changes, strict=True)
        for step, (modulations, change) in enumerate(steps):
            velocity = self._velocity(latent, modulations, frame, on_attention)
            if probe is not None:
                probe.velocity(step, latent, velocity)
            # Euler as diffusers' scheduler does it: the product in the model's dtype, the sum in float32.
            latent = (latent.float() + change * velocity).to(noise.dtype)
        return latent

    @torch.no_grad()
    def shared_modulations(self, time: float) -> Modulations:
        """Modulations for all frames at this time, of the null class if the model has classes; computed once per time."""
        if time not in self._shared:
            times = torch.full((1, 1), time, device=self._device)
            null = self.model.null_conditions(1, 1, self._device)
            self._shared[time] = self.model.modulate(times, **null, dtype=self._dtype)
        return self._shared[time]

    @torch.no_grad()
    def velocity(
        self, memory: Tensor, noisy: Tensor, lengths: Sequence[int], step: int, *, action: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, 1, C, h, w) at one ODE step for latents with that step's noise (B, 1, C, h, w); see `__call__`."""
        if self.guided:
            action, lengths = with_null_class(self.model, action), [*lengths, *lengths]
        modulations = list(self._modulations(memory.shape[2], None, action))[step]
        return self._velocity(noisy, modulations, self.model.next_frame(memory, noisy, lengths))

    def _both_branches(self, classes: Tensor | None) -> Tensor | None:
        """With guidance, rows of the null class and then the given ones."""
        return with_null_class(self.model, classes) if self.guided else classes

    def _velocity(
        self, latent: Tensor, modulations: Modulations, frame: NextFrame, on_attention: AttentionCallback | None = None
    ) -> Tensor:
        velocity = self.model.denoise(torch.cat([latent, latent]) if self.guided else latent, modulations, frame, on_attention)
        if not self.guided:
            return velocity
        null, conditional = velocity.chunk(2)
        return null + self.guidance_scale * (conditional - null)

    def _modulations(self, batch: int, label: Tensor | None, action: Tensor | None) -> Iterable[Modulations]:
        """One per step."""
        if label is None and action is None:
            return map(self.shared_modulations, self.times)
        times = (torch.full((batch, 1), time, device=self._device) for time in self.times)
        return (self.model.modulate(time, label=label, action=action, dtype=self._dtype) for time in times)


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
) -> Tensor:
    """Generate the frame that follows the context.

    Args:
        model: a FAR transformer.
        context: clean latents (B, K, C, h, w), or None for no context.
        noise: initial noise (B, 1, C, h, w).
        num_steps: Euler steps.
        guidance_scale: above 1, classifier-free guidance null + scale · (conditional − null), the null class on all frames.
        label: (B,) class indices, if the model takes them.
        action: (B, K+1) action indices, the last one belongs to the new frame, if the model takes them.

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
    # Checked here, because the sampler takes a missing class for the null class.
    for kind, condition in (("label", label), ("action", action)):
        if model.condition == kind and condition is None:
            raise ValueError(f"this model is conditioned on {kind}s: pass {kind}")
    if context is None:
        context = noise[:, :0]
    positions = torch.arange(num_context + 1, device=noise.device)
    return sampler.after(context, noise, positions, label=label, action=action)
