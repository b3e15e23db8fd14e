"""The unit of data: one clip of ground-truth frames, which clip sources provide and rollouts continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from far_env.errors import ClipIdError, short, unknown_name

SPLITS = ("train", "validation", "test")
NOT_OF_CLIPS = ("name", "host", "device", "precision", "feedback")
"""Arguments of `far_env.workloads.make_workload` that are no options of a clip source."""


@dataclass(frozen=True)
class Clip:
    """Ground-truth frames with an identity.

    Attributes:
        clip_id: index within the source's split.
        frames: float32 (T, 3, H, W) in [0, 1].
        actions: int64 (T,) where the data has actions (``actions[i]`` leads to frame i), else None.
        latents: float32 (T, C, h, w), scaled as the host's, if the data is pre-encoded: a rollout's context is then taken from
            here, and ``frames`` are decoded from them by the host's autoencoder. Else None.
        label: class of the whole clip, where the data has classes.
        prompt: text that describes the whole clip, where the data has texts.
    """

    clip_id: int
    frames: np.ndarray
    actions: np.ndarray | None = None
    latents: np.ndarray | None = None
    label: int | None = None
    prompt: str | None = None

    def context(self, num_context: int) -> np.ndarray:
        """The first ``num_context`` frames: latents (n, C, h, w) if the clip has latents, else pixels (n, 3, H, W)."""
        return np.ascontiguousarray((self.frames if self.latents is None else self.latents)[:num_context])


class ClipSource(Protocol):
    """A named, indexed collection of clips, the same on every machine and in every order of access.

    A source may also know what its frames show: by a method ``scenes(clip)``, a number per frame that is the same for frames of
    the same scene, or by an attribute ``view_rows``, the number of rows of pixels from the top that show it. See
    `far_env.clips.copying.evidence_gaps`.
    """

    name: str
    size: int
    """Side of its square frames in pixels."""

    def num_clips(self, split: str) -> int:
        """Number of clips that ``split`` holds; their ids are 0 … n-1."""

    def clip(self, split: str, clip_id: int) -> Clip:
        """One clip. Raises ValueError on an unknown split and ClipIdError on an id out of range."""


def check_split(source: ClipSource, split: str) -> None:
    """Raise ValueError unless ``source`` has this split: one of `SPLITS`, or of its attribute ``splits``."""
    splits = getattr(source, "splits", SPLITS)
    if split not in splits:
        raise ValueError(unknown_name("split", split, splits))


def check_clip_id(source: ClipSource, split: str, clip_id: int) -> None:
    """Raise one clear error unless ``clip_id`` is a clip of ``source``'s ``split``."""
    check_split(source, split)
    size = source.num_clips(split)
    if not 0 <= clip_id < size:
        raise ClipIdError(f"clip id {clip_id} is out of range: {source.name}/{split} has clips 0 to {size - 1}")


def check_clip_options(options: Any) -> dict[str, Any]:
    """Options of a clip source as a new dict. Raises ValueError unless they are a mapping of names to values."""
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"clip_options must be a mapping of names to values, got {short(options)}")
    for name in options:
        if name in NOT_OF_CLIPS:
            raise ValueError(f"clip_options has {name!r}, which is no option of a clip source; give it beside them")
    return dict(options)
