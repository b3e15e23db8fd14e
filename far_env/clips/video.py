"""Video files to square frames: decoding with PyAV (.npz files with NumPy), then squeezing or cropping to the host's size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path

import av
import numpy as np
import torch
from torch.nn import functional as F

from far_env.clips.arrays import episode_length, read_episode
from far_env.errors import VideoError

EPISODE_SUFFIX = ".npz"
VIDEO_SUFFIXES = (".mp4", ".avi", EPISODE_SUFFIX)
# Before version 19, PyAV raised UnicodeDecodeError on metadata that are not UTF-8, unless asked to ignore that.
_OPEN_OPTIONS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


def count_frames(path: Path) -> int:
    """Number of frames that a player displays: from the file's header, or by decoding where the header has no count.

    Raises:
        VideoError: if the file is missing, empty, not a video, or damaged.
    """
    if path.suffix.lower() == EPISODE_SUFFIX:
        return episode_length(path)
    with _opened(path) as container:
        stored, displayed = _header_frames(container)
    if stored > 0 and abs(stored - displayed) < 0.5:
        return stored
    return sum(1 for _ in _decoded(path))


def check_frames(path: Path) -> None:
    """Decode a whole file. Raises VideoError if any of it is damaged, or if it holds fewer frames than its header declares."""
    if path.suffix.lower() == EPISODE_SUFFIX:
        read_episode(path)
        return
    with _opened(path) as container:
        stored, displayed = _header_frames(container)
    # An edit may begin and end within a frame.
    promised = stored if displayed > stored - 0.5 else int(displayed) - 1
    decoded = sum(1 for _ in _decoded(path))
    if decoded < promised:
        raise VideoError(f"{path} ends early: its header declares {promised} frames, {decoded} can be decoded")


def read_frames(path: Path, start: int, count: int, side: int | None = None) -> list[np.ndarray]:
    """Frames start … start+count-1, each uint8 (height, width, 3). Their sizes differ where the size changes in the file.

    Args:
        side: squeeze them to (side, side, 3), see `Squeezer`.

    Raises:
        VideoError: if the file is damaged before the last of them, or ends before it.
    """
    last = start + count - 1
    if path.suffix.lower() == EPISODE_SUFFIX:
        episode = read_episode(path)
        if last >= len(episode):
            raise VideoError(f"{path} ends early: frames {start} to {last} were requested, {len(episode)} are there")
        return list(_pictures(episode[start : start + count], side))
    decoded = 0

    def wanted() -> Iterator[av.VideoFrame]:
        nonlocal decoded
        for frame in _decoded(path):
            decoded += 1
            if decoded > start:
                yield frame

    frames = list(_pictures(islice(wanted(), count), side))
    if len(frames) < count:
        raise VideoError(f"{path} ends early: frames {start} to {last} were requested, {decoded} could be decoded")
    return frames


def frame_blocks(path: Path, count: int, size: int, side: int | None = None) -> Iterator[list[np.ndarray]]:
    """The first ``count`` frames of a file, in lists of up to ``size``, so that a long video needs little memory.

    Args:
        side: as in `read_frames`.

    Raises:
        VideoError: if the file is damaged.
    """
    source = read_episode(path) if path.suffix.lower() == EPISODE_SUFFIX else _decoded(path)
    selected = _pictures(islice(iter(source), count), side)
    while block := list(islice(selected, size)):
        yield block


class Squeezer:
    """Decoded frames to square ones of ``side`` pixels without keeping the aspect, as the benchmark's reader (decord) does it.

    FFmpeg's bilinear scaler takes a frame from its own pixel format to RGB in one pass. Resizing pixels that are RGB already
    gives other values, by up to 7 of 255 in the mean of a sharp video.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._kind: tuple[int, int, str] | None = None
        self._graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """One frame as uint8 (side, side, 3)."""
        kind = (frame.width, frame.height, frame.format.name)
        if kind != self._kind:
            self._kind, self._graph = kind, self._new_graph(frame)
        self._graph.push(frame)
        return self._graph.pull().to_ndarray()

    def _new_graph(self, frame: av.VideoFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
        scale = graph.add("scale", f"{self._side}:{self._side}:flags=bilinear")
        rgb, sink = graph.add("format", "rgb24"), graph.add("buffersink")
        for node, following in ((source, scale), (scale, rgb), (rgb, sink)):
            node.link_to(following)
        graph.configure()
        return graph


def to_pixels(frames: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 frames (H, W, 3) of one size to float32 (T, 3, H, W) in [0, 1]."""
    return np.stack(frames).transpose(0, 3, 1, 2).astype(np.float32) / 255


def crop_centre(frames: Sequence[np.ndarray], size: int) -> np.ndarray:
    """uint8 frames (H, W, 3) to float32 (T, 3, size, size) in [0, 1]: short side to ``size``, then the centre (FAR's way)."""

    def crop(batch: np.ndarray) -> np.ndarray:
        height, width = batch.shape[1:3]
        scale = size / min(height, width)
        resized = _resize(batch, max(size, round(height * scale)), max(size, round(width * scale)))
        top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
        return resized[..., top : top + size, left : left + size]

    return _by_size(frames, crop)


def _by_size(frames: Sequence[np.ndarray], fit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply ``fit`` to runs (t, H, W, 3) of frames that have one size, and join the results."""
    return np.concatenate([fit(np.stack(list(run))) for _, run in groupby(frames, key=np.shape)])


def _resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1).numpy()


def _header_frames(container: av.container.InputContainer) -> tuple[int, float]:
    """Frames that an opened video stores (0 if unknown), and how many it shows, both from its header.

    They differ where an edit list of the mp4 and mov formats selects a part of what is stored, as lossless cutting does.
    """
    stream = container.streams.video[0]
    stored = stream.frames
    has_edit_lists = "mov" in container.format.name.split(",")
    if not (has_edit_lists and stream.duration and stream.time_base and stream.average_rate):
        return stored, stored
    return stored, float(stream.duration * stream.time_base * stream.average_rate)


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The file as a container with a video stream."""
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"{path} is empty")
        container = av.open(str(path), **_OPEN_OPTIONS)
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path} cannot be opened as a video: {reason}") from error
    with container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream")
        if container.streams.video[0].codec_context is None:  # decoding would end the process before PyAV 18.1
            raise VideoError(f"{path} cannot be decoded: its codec is unknown")
        yield container


def _pictures(frames: Iterable[av.VideoFrame | np.ndarray], side: int | None) -> Iterator[np.ndarray]:
    """Frames of a video or an episode as uint8 (H, W, 3), squeezed if there is a side."""
    squeezed = None if side is None else Squeezer(side)
    for frame in frames:
        if squeezed is not None:
            yield squeezed(av.VideoFrame.from_ndarray(frame, format="rgb24") if isinstance(frame, np.ndarray) else frame)
        else:
            yield frame if isinstance(frame, np.ndarray) else frame.to_ndarray(format="rgb24")


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    """The frames of a video in order; a frame that the decoder reconstructed despite errors is an error."""
    with _opened(path) as container:
        try:
            for number, frame in enumerate(container.decode(video=0)):
                if frame.is_corrupt:
                    raise VideoError(f"{path} is damaged: frame {number} cannot be decoded without errors")
                yield frame
        except av.FFmpegError as error:
            raise VideoError(f"{path} is damaged: {getattr(error, 'strerror', None) or error}") from error
