"""What a transformer learns in a step: the recipe of the embedded hosts, or FAR's own.

``teacher_forcing``, in one pass: the tokens are [clean frames | noisy frames] under a mask that lets every noisy frame attend
to the clean frames before it (time −1) and itself. Frame-drop augmentation makes each clean history a few random older frames
plus a contiguous tail, re-indexed as in a rollout; only tail frames are predicted, as only their true predecessor is there.

``far`` (arXiv 2503.19325, section 3): every frame of a window has its noise level and attends to the noisy frames before it; a
tenth of the frames is clean instead, at time −1, and does not count. With FAR-Long, all frames before the window of full
resolution are clean, and the number of frames is drawn for every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from far_env.host.far import CLEAN_TIME, FAR
from far_env.host.far_long import FARLong
from far_env.host.training.config import TransformerTraining
from far_env.host.training.histories import Batch, draw_histories, draw_windows, is_contiguous, read_batch
from far_env.host.training.latent_cache import EncodedEpisodes
from far_env.host.training.loop import step_generator

NUM_TIMES = 1000
"""Noise levels of FAR's objective."""


@dataclass(frozen=True)
class NoisyFrames:
    """What a transformer sees in a training step, and what it should answer.

    Attributes:
        latents: (B, F, C, h, w); the last P frames are to be predicted.
        times: (B, F).
        positions: (F,) time positions.
        visible: (F, F), True where a frame attends to another.
        num_coarse: oldest frames that FAR-Long sees coarsely.
        velocities: (B, P, C, h, w), noise − clean.
        classes: actions (B, F) or labels (B,), or None.
        counted: (B, P), 1 where a frame counts and 0 where it does not; None if all count.
    """

    latents: Tensor
    times: Tensor
    positions: Tensor
    visible: Tensor
    num_coarse: int
    velocities: Tensor
    classes: Tensor | None = None
    counted: Tensor | None = None


class Objective(Protocol):
    """Draws what is learned in a step, from the seed and the step alone."""

    def inputs(self, step: int, rows: slice) -> NoisyFrames:
        """The rows ``rows`` of the step's batch."""

    def loss_name(self, step: int) -> str:
        """Name of the step's loss in TensorBoard."""


def velocity_loss(model: FAR, batch: NoisyFrames) -> Tensor:
    """Mean squared error of the velocities of the frames to be predicted.

    Where only some count, it is the mean over those of a clip, then over clips; a clip in which none counts adds 0.
    """
    options: dict[str, Any] = {"num_coarse": batch.num_coarse} if batch.num_coarse else {}
    if batch.classes is not None:
        options[model.condition] = batch.classes
    velocity = model.velocity(batch.latents, batch.times, batch.positions, batch.visible, **options)
    error = (velocity[:, -batch.velocities.shape[1] :].float() - batch.velocities).square()
    if batch.counted is None:
        return error.mean()
    error = error.mean(dim=(2, 3, 4)) * batch.counted
    return (error.sum(dim=1) / (batch.counted.sum(dim=1) + 1e-9)).mean()


@dataclass(frozen=True)
class Drawing:
    """What both objectives draw from.

    Attributes:
        config: settings of the training.
        sources: encoded train episodes.
        shares: how often each source is drawn.
        model: the transformer; only its settings are used.
        seed: of all draws.
        device: of the results.
    """

    config: TransformerTraining
    sources: Sequence[EncodedEpisodes]
    shares: Sequence[float]
    model: FAR
    seed: int
    device: torch.device


class TeacherForcing:
    """The objective of the embedded hosts."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing

    def inputs(self, step: int, rows: slice) -> NoisyFrames:
        """The rows ``rows`` of the step's batch."""
        of = self._drawing
        histories, predicted = draw_histories(of.config, of.sources, of.shares, of.model, of.seed, step)
        batch = read_batch(histories[rows], predicted, of.model).to(of.device)
        return add_noise(of.model, batch, of.config, step_generator(of.seed, 3, step), rows)

    def loss_name(self, step: int) -> str:
        """Histories without dropped frames have another loss."""
        return "loss_contiguous" if is_contiguous(self._drawing.config, step) else "loss_dropped"


def add_noise(
    model: FAR, batch: Batch, config: TransformerTraining, generator: torch.Generator, rows: slice = slice(None)
) -> NoisyFrames:
    """The clean history of a batch, possibly a little noisy, and ``noisy_copies`` of each frame that is to be predicted.

    A share ``class_dropout`` of the actions, or labels, becomes the null class, clean and noisy frames separately, as in FAR's
    training. For FAR-Long, the frames are coarse that are coarse when the last frame is predicted.

    Args:
        rows: which rows of a whole batch of ``config.batch_size`` these are; all by default.
    """
    frames, predicted = batch.frames, batch.predicted.repeat(config.noisy_copies)
    device, num_rows = frames.device, len(frames)
    total = num_rows if rows == slice(None) else config.batch_size

    # Numbers are drawn for the whole batch, so that they do not depend on how it is divided.
    def normal(*shape: int) -> Tensor:
        return torch.randn((total, *shape), generator=generator)[rows].to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand((total, *shape), generator=generator)[rows].to(device)

    num_clean = frames.shape[1] - 1
    context_sigma = (uniform() < 0.5) * uniform() * config.context_noise
    clean = frames[:, :num_clean]
    clean = clean + context_sigma[:, None, None, None, None] * (normal(*clean.shape[1:]) - clean)

    sigma = torch.sigmoid(normal(len(predicted)) + config.noise_mean)
    sigma = sigma.masked_fill(uniform(len(predicted)) < config.pure_noise_share, 1.0)
    target = frames[:, predicted]
    noise = normal(*target.shape[1:])
    level = sigma[:, :, None, None, None]
    noisy = level * noise + (1 - level) * target

    clean_positions = torch.arange(num_clean, device=device)
    positions = torch.cat([clean_positions, predicted])
    visible = torch.zeros(len(positions), len(positions), dtype=torch.bool, device=device)
    visible[:, :num_clean] = clean_positions < positions[:, None]
    visible |= torch.eye(len(positions), dtype=torch.bool, device=device)
    times = torch.cat([torch.full((num_rows, num_clean), CLEAN_TIME, device=device), 1000 * sigma], dim=1)
    classes = batch.classes
    if classes is not None:
        classes = classes[:, positions] if model.condition == "action" else classes
        classes = classes.masked_fill(uniform(*classes.shape[1:]) < config.class_dropout, model.null_class)
    num_coarse = model.num_coarse(num_clean + 1)
    return NoisyFrames(torch.cat([clean, noisy], dim=1), times, positions, visible, num_coarse, noise - target, classes)


class FarObjective:
    """The objective by which FAR's models were trained."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing

    def inputs(self, step: int, rows: slice) -> NoisyFrames:
        """The rows ``rows`` of the step's batch."""
        of = self._drawing
        windows = draw_windows(of.config, of.sources, of.shares, of.model, of.seed, step)
        batch = read_batch(windows[rows], np.zeros(0, np.int64), of.model)
        num_frames = batch.frames.shape[1]
        num_clean = num_frames - of.model.short_term_ctx_winsize if isinstance(of.model, FARLong) else 0
        drawn = []
        for row in range(of.config.batch_size)[rows]:
            generator = step_generator(of.seed, 3, step, row)
            noise = torch.randn(batch.frames.shape[1:], generator=generator)
            u = torch.sigmoid(torch.randn(num_frames, generator=generator))
            clean = torch.rand(num_frames, generator=generator) < of.config.clean_context_ratio
            clean[: max(0, num_clean)] = True
            drawn.append((noise, u, clean, torch.rand(num_frames, generator=generator) < of.config.class_dropout))
        noise, u, clean, dropped = (torch.stack(part) for part in zip(*drawn, strict=True))
        classes = batch.classes
        if classes is not None:
            dropped = dropped if of.model.condition == "action" else dropped[:, 0]
            classes = classes.masked_fill(dropped, of.model.null_class).to(of.device)
        parts = (part.to(of.device) for part in (batch.frames, noise, u, clean))
        return far_noise(of.model, *parts, classes)

    def loss_name(self, step: int) -> str:
        """There is one kind of loss."""
        return "loss"


def far_noise(
    model: FAR, latents: Tensor, noise: Tensor, u: Tensor, clean: Tensor, classes: Tensor | None = None
) -> NoisyFrames:
    """FAR's training inputs.

    Args:
        model: its ``short_term_ctx_winsize`` newest frames count.
        latents, noise: (B, F, C, h, w).
        u: (B, F) in [0, 1); the noise level is the one at that quantile of the levels 1 … 0.001.
        clean: (B, F), True for frames that are given clean, at time −1, and do not count.
        classes: actions (B, F) or labels (B,).
    """
    times = NUM_TIMES - (NUM_TIMES * u).floor().clamp_max(NUM_TIMES - 1)
    sigma = (times / NUM_TIMES).masked_fill(clean, 0.0)[..., None, None, None]
    noisy = sigma * noise + (1 - sigma) * latents
    num_frames = latents.shape[1]
    positions = torch.arange(num_frames, device=latents.device)
    visible = torch.ones(num_frames, num_frames, dtype=torch.bool, device=latents.device).tril()
    window = slice(-model.short_term_ctx_winsize, None)
    return NoisyFrames(
        noisy,
        times.masked_fill(clean, CLEAN_TIME),
        positions,
        visible,
        model.num_coarse(num_frames),
        (noise - latents)[:, window],
        classes,
        (~clean[:, window]).float(),
    )


OBJECTIVES: dict[str, type[Objective]] = {"teacher_forcing": TeacherForcing, "far": FarObjective}
