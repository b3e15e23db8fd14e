"""Batches for training a transformer: which source, which episode, which window, which of its frames.

Everything is drawn from (seed, step), for the whole batch, whatever part of it a process reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from far_env.host.far import FAR
from far_env.host.far_long import FARLong
from far_env.host.training.config import TransformerTraining
from far_env.host.training.latent_cache import NONE, EncodedEpisodes

Frames = tuple[EncodedEpisodes, int, np.ndarray]
"""A source, an episode of it, and numbers of frames in the episode."""


@dataclass(frozen=True)
class Batch:
    """Clean frames, and which of them are predicted.

    Attributes:
        frames: clean latents (B, n, C, h, w), older frames first.
        predicted: int64 (P,), indices into the n frames whose predecessor is the true one.
        classes: int64, actions (B, n) or labels (B,), for a model that takes them; the null class where there are none.
    """

    frames: Tensor
    predicted: Tensor
    classes: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        classes = None if self.classes is None else self.classes.to(device)
        return Batch(self.frames.to(device), self.predicted.to(device), classes)


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


def draw_histories(
    config: TransformerTraining,
    sources: Sequence[EncodedEpisodes],
    shares: Sequence[float],
    model: FAR,
    seed: int,
    step: int,
) -> tuple[list[Frames], np.ndarray]:
    """The histories of a batch for teacher forcing, all of one shape, and the indices of the frames that are predicted.

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
    drawn = partial(draw_frames, rng, window, num_older, tail)
    return _draw_rows(config, members, shares, window, drawn, rng, (seed, 4, step)), predicted


def draw_windows(
    config: TransformerTraining,
    sources: Sequence[EncodedEpisodes],
    shares: Sequence[float],
    model: FAR,
    seed: int,
    step: int,
) -> list[Frames]:
    """The windows of a batch for FAR's objective: whole ones, or, for FAR-Long, pieces of one random length."""
    window, members = _draw_length(sources, shares, seed, step)
    rng = np.random.default_rng((seed, 2, step))
    length = window
    if isinstance(model, FARLong) and window > model.short_term_ctx_winsize:
        length = int(rng.integers(model.short_term_ctx_winsize, window))
    return _draw_rows(config, members, shares, length, partial(np.arange, length), rng, (seed, 4, step))


def _draw_rows(
    config: TransformerTraining,
    members: Mapping[int, EncodedEpisodes],
    shares: Sequence[float],
    window: int,
    draw: Callable[[], np.ndarray],
    rng: np.random.Generator,
    key: tuple[int, ...],
) -> list[Frames]:
    """For each row of a batch an episode, a window in it, and the frames that ``draw`` chooses within the window."""
    numbers = list(members)
    rows = []
    for choice in draw_sources([shares[number] for number in numbers], config.batch_size, key):
        source = members[numbers[choice]]
        episode = int(rng.integers(len(source)))
        spare = source.length(episode) - (window - 1) * source.interval - 1
        start = int(rng.integers(spare + 1)) if spare else 0
        rows.append((source, episode, start + source.interval * draw()))
    return rows


def _draw_length(
    sources: Sequence[EncodedEpisodes], shares: Sequence[float], seed: int, step: int
) -> tuple[int, dict[int, EncodedEpisodes]]:
    """The length of a batch's windows, and the sources that have it, by number."""
    windows = [source.window for source in sources]
    window = windows[0]
    if len(set(windows)) > 1:
        window = windows[np.random.default_rng((seed, 5, step)).choice(len(windows), p=np.divide(shares, sum(shares)))]
    return window, {number: source for number, source in enumerate(sources) if source.window == window}


def read_batch(rows: Sequence[Frames], predicted: np.ndarray, model: FAR) -> Batch:
    """Read the frames of some rows, with the classes that the model takes."""
    histories = [source.read(episode, frames) for source, episode, frames in rows]
    classes = None
    if model.condition is not None:
        given = [history.actions if model.condition == "action" else history.label for history in histories]
        classes = torch.from_numpy(np.stack(given))
        classes = classes.masked_fill(classes == NONE, model.null_class)
    frames = torch.from_numpy(np.stack([history.latents for history in histories])).float()
    return Batch(frames, torch.from_numpy(predicted), classes)
