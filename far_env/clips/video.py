"""Video files to square frames: decoding with PyAV (or NumPy, for .npz), then squeezing or cropping to the host's size."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F

VIDEO_SUFFIXES = (".mp4", ".avi", ".npz")
NPZ_ARRAY = "video"


class VideoError(ValueError):
    """A video cannot be read or is too short; the message names the file and the reason."""


def find_videos(folder: Path) -> list[Path]:
    """All video files below ``folder``, sorted by path. Raises ValueError if there is no such folder or no video in it."""
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist; point data_dir at a folder with .mp4, .avi or .npz files")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise ValueError(f"the data folder {folder} holds no .mp4, .avi or .npz file")
    return videos


def count_frames(path: Path) -> int:
    """Number of frames: what the container says, else by decoding.

    Raises:
        VideoError: if the file is empty, not a video, or damaged.
    """
    if path.suffix.lower() == ".npz":
        return len(_npz_frames(path))
    with _opened(path) as container:
        stream = container.streams.video[0]
        if stream.frames > 0:
            return stream.frames
        try:
            return sum(1 for _ in container.decode(stream))
        except av.FFmpegError as error:
            raise _damaged(path, error) from error


def read_frames(path: Path, start: int, count: int) -> np.ndarray:
    """Frames start … start+count-1, uint8 (count, height, width, 3).

    Raises:
        VideoError: if the file cannot be decoded or ends before the last of them.
    """
    if path.suffix.lower() == ".npz":
        episode = _npz_frames(path)
        if start + count > len(episode):
            last = start + count - 1
            raise VideoError(f"{path} ends early: frames {start} to {last} were asked for, {len(episode)} are there")
        return episode[start : start + count]
    frames: list[np.ndarray] = []
    with _opened(path) as container:
        try:
            for index, frame in enumerate(container.decode(video=0)):
                if index >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == count:
                    return np.stack(frames)
        except av.FFmpegError as error:
            raise _damaged(path, error) from error
    decoded = start + len(frames) if frames else "fewer"
    raise VideoError(f"{path} ends early: frames {start} to {start + count - 1} were asked for, {decoded} could be decoded")


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


def _npz_frames(path: Path) -> np.ndarray:
    """The frames of an .npz episode, uint8 (T, H, W, 3); nothing in the file is executed."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            frames = arrays[NPZ_ARRAY]
    except KeyError as error:
        raise VideoError(f"{path} holds no array {NPZ_ARRAY!r}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise VideoError(f"{path} cannot be read as an .npz file: {error}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise VideoError(f"{path}: {NPZ_ARRAY!r} must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    return frames


def _opened(path: Path) -> av.container.InputContainer:
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty")
        container = av.open(str(path), metadata_errors="ignore")
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path} cannot be opened as a video: {reason}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path} has no video stream")
    return container


def _damaged(path: Path, error: Exception) -> VideoError:
    return VideoError(f"{path} is damaged: {getattr(error, 'strerror', None) or error}")
