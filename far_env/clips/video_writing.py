"""Frames to mp4 and gif files, whole or not at all, and whether such a file is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from far_env.clips.video import check_frames, count_frames
from far_env.errors import VideoError
from far_env.io import replacing

MAX_FPS = 50
"""A gif shows a frame for hundredths of a second, and many programs show none for less than two."""
_QUALITY = {"crf": "12", "preset": "medium", "threads": "1"}
"""Of H.264: losses that cannot be seen, and the same file on every run."""


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 frames (T, H, W, 3) as H.264 in 4:2:0. Raises ValueError on odd sides, or if the file cannot be written."""
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"{path}: an mp4 needs even sides, got {width} × {height} pixels; use --scale 2")
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_QUALITY)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 frames (T, H, W, 3) as a gif that repeats, with 256 colours a frame. Raises ValueError as `write_mp4`."""
    first, *others = (Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE) for frame in frames)
    options = {"save_all": True, "append_images": others, "duration": _milliseconds(fps), "loop": 0}
    with replacing(path) as temporary:
        first.save(temporary, format="gif", **options)


def _mp4_is_whole(path: Path, num_frames: int, fps: int) -> bool:
    try:
        check_frames(path)
        return count_frames(path) == num_frames
    except VideoError:
        return False


def _gif_is_whole(path: Path, num_frames: int, fps: int) -> bool:
    # Equal frames in a row are stored as one that is shown for longer.
    try:
        with Image.open(path) as picture:
            shown = sum(frame.info["duration"] for frame in ImageSequence.Iterator(picture) if frame.convert("RGB"))
    except (OSError, KeyError, UnidentifiedImageError):
        return False
    return shown == num_frames * _milliseconds(fps)


def _milliseconds(fps: int) -> int:
    return 10 * round(100 / fps)


WRITERS: dict[str, Callable[[Path, np.ndarray, int], None]] = {"mp4": write_mp4, "gif": write_gif}
"""By a file's suffix."""
_CHECKS: dict[str, Callable[[Path, int, int], bool]] = {"mp4": _mp4_is_whole, "gif": _gif_is_whole}


def is_whole(path: Path, num_frames: int, fps: int) -> bool:
    """Whether the file exists, every frame can be decoded, and there are as many as there should be."""
    return path.exists() and _CHECKS[path.suffix[1:]](path, num_frames, fps)
