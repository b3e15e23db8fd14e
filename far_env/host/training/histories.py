"""Batches of histories for training a transformer: which source, which episode, which window, which of its frames.

Everything is drawn from (seed, step), for the whole batch, whatever part of it a process computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from far_env.host.far import FAR
from far_env.host.training.config import TransformerTraining
from far_env.host.training.latent_cache import NONE, EncodedEpisodes


@dataclass(frozen=True)
class TeacherForcingBatch:
    """Clean histories and which of their frames are predicted.

    Attributes:
        frames: clean latents (B, n, C, h, w), older frames first.
        predicted: int64 (P,), indices into the n frames whose predecessor is the true one.
        classes: int64, actions (B, n) or labels (B,), for a model that takes them; the null class where there are none.
    """

    frames: Tensor
    predicted: Tensor
    classes: Tensor | None = None

    def to(self, device: torch.device) -> TeacherForcingBatch:
        """The batch on a device."""
        classes = None if self.classes is None else self.classes.to(device)
        return TeacherForcingBatch(self.frames.to(device), self.predicted.to(device), classes)


def draw_frames(rng: np.random.Generator, clip_length: int, num_older: int, tail: int) -> np.ndarray:
    """Frame numbers (num_older + tail,) of one history: random older ones in order, then a contiguous tail."""
    end = int(rng.integers(num_older + tail, clip_length + 1))
    older = np.sort(rng.choice(end - tail, size=num_older, replace=False))
    return np.concatenate([older, np.arange(end - tail, end)])


def draw_sources(shares: Sequence[float], count: int, key: tuple[int, ...], first: int = 0) -> np.ndarray:
    """The sources (count,) of some clips: in turn, from the ``first``-th on, if the shares are equal, else drawn by them."""
    if len(set(shares)) == 1:
        return (first + np.arange(count)) % len(shares)
    return np.random.default_rng(key).choice(len(shares), count, p=np.divide(shares, sum(shares)))


def is_contiguous(config: TransformerTraining, step: int) -> bool:
    """Whether the histories of a step have no dropped frames."""
    return step % config.contiguous_every == config.contiguous_every - 1


def draw_batch(
    config: TransformerTraining,
    sources: Sequence[EncodedEpisodes],
    shares: Sequence[float],
    model: FAR,
    seed: int,
    step: int,
) -> TeacherForcingBatch:
    """A batch of histories of one shape.

    Sources whose windows have one length are mixed within a batch; which length a batch has is drawn by their shares.
    """
    window, members = _draw_length(sources, shares, seed, step)
    rng = np.random.default_rng((seed, 2, step))
    if is_contiguous(config, step):
        num_older, tail = 0, int(rng.integers(min(config.min_contiguous, window), window + 1))
        first = 1 + model.num_coarse(tail)
        predicted = first + np.sort(rng.choice(tail - first, min(config.contiguous_predicted, tail - first), replace=False))
    else:
        num_older, tail = int(rng.integers(config.max_older + 1)), int(rng.integers(2, config.max_tail + 1))
        tail = min(tail, window)
        num_older = min(num_older, window - tail)
        predicted = np.arange(num_older + 1, num_older + tail)
    chosen = draw_sources([shares[member] for member in members], config.batch_size, (seed, 4, step))
    drawn = []
    for member in chosen:
        source = sources[members[member]]
        episode = int(rng.integers(len(source)))
        spare = source.length(episode) - window
        start = int(rng.integers(spare + 1)) if spare else 0
        drawn.append((source, episode, start + draw_frames(rng, window, num_older, tail)))
    return _read(drawn, predicted, model)


def _draw_length(sources: Sequence[EncodedEpisodes], shares: Sequence[float], seed: int, step: int) -> tuple[int, list[int]]:
    """The length of a batch's windows, and the sources that have it."""
    windows = [source.window for source in sources]
    window = windows[0]
    if len(set(windows)) > 1:
        window = windows[np.random.default_rng((seed, 5, step)).choice(len(windows), p=np.divide(shares, sum(shares)))]
    return window, [number for number, other in enumerate(windows) if other == window]


def _read(drawn: Sequence[tuple[EncodedEpisodes, int, np.ndarray]], predicted: np.ndarray, model: FAR) -> TeacherForcingBatch:
    histories = [source.read(episode, frames) for source, episode, frames in drawn]
    classes = None
    if model.condition is not None:
        given = [history.actions if model.condition == "action" else history.label for history in histories]
        classes = torch.from_numpy(np.stack(given))
        classes = classes.masked_fill(classes == NONE, model.null_class)
    frames = torch.from_numpy(np.stack([history.latents for history in histories])).float()
    return TeacherForcingBatch(frames, torch.from_numpy(predicted), classes)
