"""Video files to square frames: decoding with PyAV (or NumPy, for .npz), then squeezing or cropping to the host's size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F

from far_env.clips.arrays import episode_length, read_episode
from far_env.errors import VideoError

EPISODE_SUFFIX = ".npz"
VIDEO_SUFFIXES = (".mp4", ".avi", EPISODE_SUFFIX)


def count_frames(path: Path) -> int:
    """Number of frames: what the file's header says, else by decoding.

    Raises:
        VideoError: if the file is missing, empty, not a video, or damaged.
    """
    if path.suffix.lower() == EPISODE_SUFFIX:
        return episode_length(path)
    with _opened(path) as container:
        promised = container.streams.video[0].frames
    return promised if promised > 0 else sum(1 for _ in _decoded(path))


def check_frames(path: Path) -> None:
    """Decode a whole file. Raises VideoError if any of it is damaged, or if it holds fewer frames than its header says."""
    promised = count_frames(path)
    if path.suffix.lower() == EPISODE_SUFFIX:
        read_episode(path)
        return
    decoded = sum(1 for _ in _decoded(path))
    if decoded < promised:
        raise VideoError(f"{path} ends early: its header says {promised} frames, {decoded} can be decoded")


def read_frames(path: Path, start: int, count: int) -> np.ndarray:
    """Frames start … start+count-1, uint8 (count, height, width, 3).

    Raises:
        VideoError: if the file is damaged before the last of them, or ends before it.
    """
    if path.suffix.lower() == EPISODE_SUFFIX:
        episode = read_episode(path)
        if start + count > len(episode):
            last = start + count - 1
            raise VideoError(f"{path} ends early: frames {start} to {last} were asked for, {len(episode)} are there")
        return episode[start : start + count]
    frames: list[np.ndarray] = []
    decoded = 0
    for frame in _decoded(path):
        if decoded >= start:
            frames.append(frame.to_ndarray(format="rgb24"))
        decoded += 1
        if len(frames) == count:
            return np.stack(frames)
    last = start + count - 1
    raise VideoError(f"{path} ends early: frames {start} to {last} were asked for, {decoded} could be decoded")


def squeeze(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 (T, H, W, 3) to float32 (T, 3, size, size) in [0, 1], without keeping the aspect (the benchmark's way)."""
    return _resize(frames, size, size)


def crop_centre(frames: np.ndarray, size: int) -> np.ndarray:
    """uint8 (T, H, W, 3) to float32 (T, 3, size, size) in [0, 1]: short side to ``size``, then the centre (FAR's way)."""
    height, width = frames.shape[1:3]
    scale = size / min(height, width)
    resized = _resize(frames, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    return resized[..., top : top + size, left : left + size]


def _resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1).numpy()


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The file as a container with a video stream."""
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty")
        container = av.open(str(path), metadata_errors="ignore")
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path} cannot be opened as a video: {reason}") from error
    with container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        yield container


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a video in order; one that the decoder had to patch up is an error."""
    with _opened(path) as container:
        try:
            for number, frame in enumerate(container.decode(video=0)):
                if frame.is_corrupt:
                    raise VideoError(f"{path} is damaged: frame {number} cannot be decoded without errors")
                yield frame
        except av.FFmpegError as error:
            raise VideoError(f"{path} is damaged: {getattr(error, 'strerror', None) or error}") from error
