"""A folder of videos as a clip source, by the benchmark's protocol or FAR's own."""

from __future__ import annotations

import logging
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

from far_env.clips.clip import Clip, check_clip_id
from far_env.clips.video import VideoError, count_frames, crop_centre, find_videos, read_frames, squeeze
from far_env.contract import unknown_name

PROTOCOLS = ("benchmark", "far")
_SEED = 42
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    path: Path
    start: int


class VideoFolder:
    """Clips of ``num_frames`` frames from videos on disk.

    Protocols:
        benchmark: the sorted file list shuffled by ``random.Random(42)``, a random start per clip, frames squeezed to a square.
            Of this order the first fifth is the test split (the benchmark's clips come first), the next tenth validation,
            the rest train.
        far: every tenth file of the sorted list is test, the file after it validation, the others train (FAR takes every tenth
            of its own test list, which the videos do not come with); clips start at frame 0, the short side is resized and
            the centre cropped.

    Files that cannot be read or are too short are skipped with a logged warning; ``skipped`` maps them to the reason.

    Args:
        data_dir: folder of .mp4, .avi or .npz files at any depth; by default the one the class's environment variable names.
        protocol: one of `PROTOCOLS`.
        num_frames: frames per clip.
        size: side of the square frames; by default the data set's own.

    Raises:
        ValueError: on an unknown protocol, a missing folder, or a folder without a usable video.
    """

    name = "videos"
    variable = "FAR_ENV_DATA_DIR"
    default_size = 64

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        protocol: str = "benchmark",
        *,
        num_frames: int,
        size: int | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(unknown_name(f"{self.name} protocol", protocol, PROTOCOLS))
        folder = data_dir or os.environ.get(self.variable)
        if not folder:
            raise ValueError(f"{self.name} needs a folder of videos: give data_dir, or set {self.variable}")
        self.protocol, self.num_frames = protocol, num_frames
        self.size = self.default_size if size is None else size
        self.skipped: dict[Path, str] = {}
        videos = find_videos(Path(folder))
        if protocol == "benchmark":
            random.Random(_SEED).shuffle(videos)
        splits = _benchmark_splits(videos) if protocol == "benchmark" else _far_splits(videos)
        self._splits = {
            split: [entry for path in paths if (entry := self._entry(path, Path(folder))) is not None]
            for split, paths in splits.items()
        }
        if self.skipped:
            _logger.warning("%s: skipped %d of %d videos", folder, len(self.skipped), len(videos))
        if not any(self._splits.values()):
            raise ValueError(f"no usable video in {folder}: all {len(videos)} are damaged or shorter than {num_frames} frames")

    def num_clips(self, split: str) -> int:
        """Clips in a split."""
        return len(self._splits[split])

    def clip(self, split: str, clip_id: int) -> Clip:
        """Decode one clip. Raises VideoError if the file turns out to be damaged."""
        check_clip_id(self, split, clip_id)
        entry = self._splits[split][clip_id]
        frames = read_frames(entry.path, entry.start, self.num_frames)
        fit = squeeze if self.protocol == "benchmark" else crop_centre
        return Clip(clip_id, fit(frames, self.size))

    def path(self, split: str, clip_id: int) -> Path:
        """The file a clip comes from."""
        check_clip_id(self, split, clip_id)
        return self._splits[split][clip_id].path

    def _entry(self, path: Path, folder: Path) -> _Entry | None:
        try:
            length = count_frames(path)
            if length < self.num_frames:
                raise VideoError(f"{path} has {length} frames, clips need {self.num_frames}")
        except VideoError as error:
            self.skipped[path] = str(error)
            _logger.warning("skipping: %s", error)
            return None
        if self.protocol == "far":
            return _Entry(path, 0)
        # Seeded by the file, so that a start does not depend on which other files are there.
        rng = random.Random(f"{_SEED} {path.relative_to(folder).as_posix()}")
        return _Entry(path, rng.randint(0, length - self.num_frames))


def _benchmark_splits(videos: list[Path]) -> dict[str, list[Path]]:
    num_test, num_validation = math.ceil(0.2 * len(videos)), math.ceil(0.1 * len(videos))
    test, validation = videos[:num_test], videos[num_test : num_test + num_validation]
    return {"train": videos[num_test + num_validation :], "validation": validation, "test": test}


def _far_splits(videos: list[Path]) -> dict[str, list[Path]]:
    train = [path for index, path in enumerate(videos) if index % 10 > 1]
    return {"train": train, "validation": videos[1::10], "test": videos[0::10]}
