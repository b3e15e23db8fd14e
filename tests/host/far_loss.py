"""FAR's training loss, re-implemented to compare the gradients of the models with the published ones."""

from __future__ import annotations

from torch import Tensor

from far_env.host.far import CLEAN_TIME, FAR


def far_training_loss(
    model: FAR,
    latents: Tensor,
    noise: Tensor,
    times: Tensor,
    context_mask: Tensor,
    **conditions: Tensor,
) -> Tensor:
    """FAR's objective: each frame has its noise level and attends to the noisy frames before it (arXiv 2503.19325, §3).

    Args:
        model: in train mode.
        latents, noise: (B, F, C, h, w), latents scaled.
        times: (B, F) in 1 … 1000.
        context_mask: (B, F), 1 where a frame is clean, at time −1, and excluded from the loss.
        conditions: label (B,) or action (B, F), where the model takes them.

    Returns:
        Per clip the mean over unmasked frames among the last ``short_term_ctx_winsize``, then the mean over clips.
    """
    is_context = context_mask.bool()
    sigma = (times / 1000).masked_fill(is_context, 0.0)[..., None, None, None]
    noisy = sigma * noise + (1 - sigma) * latents
    velocity = model(noisy, times.masked_fill(is_context, CLEAN_TIME), **conditions)
    error = (velocity - (noise - latents)).square().mean(dim=(2, 3, 4))
    window = slice(-model.short_term_ctx_winsize, None)
    counted = (~is_context[:, window]).float()
    return ((error[:, window] * counted).sum(dim=1) / (counted.sum(dim=1) + 1e-9)).mean()
