"""A folder of videos as a clip source, by the benchmark's protocol or by FAR's."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from far_env.clips.arrays import read_actions
from far_env.clips.clip import SPLITS, Clip, check_clip_id
from far_env.clips.data_folders import find_data
from far_env.clips.index import Index, RecordingInfo
from far_env.clips.latents import LatentHost, decode_latents, read_latents
from far_env.clips.recordings import Recording, find_lists, find_recordings, read_list
from far_env.clips.video import crop_centre, read_frames, squeeze
from far_env.errors import VideoError, unknown_name

PROTOCOLS = ("benchmark", "far")
_SEED = 42
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    recording: Recording
    start: int
    has_actions: bool
    length: int


class VideoFolder:
    """Clips of ``num_frames`` frames from videos on disk.

    Protocols:
        benchmark: the sorted file list shuffled by ``random.Random(42)``, a random start per clip, frames squeezed to a square.
            Of this order the first fifth is the test split (the benchmark's clips come first), the next tenth validation,
            the rest train. Lists are ignored.
        far: clips start at frame 0, the short side is resized and the centre cropped. FAR's JSON lists in the folder (see
            `find_lists`) define the splits: every entry of the test list, or every tenth where FAR does so, is test;
            of the training list every tenth entry, from the second, is validation, the others train. Without lists every
            tenth file of the sorted list is test, the file after it validation, the others train.

    Files that cannot be read or are too short are skipped with a logged warning; ``skipped`` maps them to the reason. The
    content of headers is cached, see `far_env.clips.index`.

    A training list may name latents instead of videos. Their clips are decoded by ``host``, which `make_workload` sets, so
    scores on them exclude the autoencoder's loss; therefore latents have no test split.

    Args:
        data_dir: folder of .mp4, .avi or .npz files at any depth; by default the value of the class's environment variable,
            else the folder that far-env data download filled.
        protocol: one of `PROTOCOLS`.
        num_frames: frames per clip.
        size: side of the square frames in pixels; by default that of the data set.
        train_list: name of the list in the folder that takes the place of FAR's training list, for the protocol far.

    Raises:
        ValueError: on an unknown protocol, a missing folder, an unfinished download, a damaged list, or a folder without a
            usable video.

    Attributes:
        test_stride: distance between entries of the test list that are used, 1 for all.
        preferred_lists: names of FAR's lists, used if a folder has several lists.
        num_actions: size of the action space, 0 for data whose actions are not read, None if it is unknown.
        remedy: what to do if there is no data.
    """

    name = "videos"
    variable = "VIDEOS_DATA_DIR"
    default_size = 64
    test_stride = 1
    preferred_lists: tuple[str, ...] = ()
    num_actions: int | None = 0
    remedy = "far-env data download fetches the data sets of FAR"

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        protocol: str = "benchmark",
        *,
        num_frames: int,
        size: int | None = None,
        train_list: str | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(unknown_name(f"{self.name} protocol", protocol, PROTOCOLS))
        path = data_dir or os.environ.get(self.variable) or find_data(self.name)
        if not path:
            raise ValueError(f"{self.name} needs a folder of videos: give data_dir, or set {self.variable}; {self.remedy}")
        self.folder, self.protocol, self.num_frames = Path(path), protocol, num_frames
        self.size = self.default_size if size is None else size
        self._train_list = train_list
        self.host: LatentHost | None = None
        self.skipped: dict[Path, str] = {}
        splits = self._splits_of_files()
        everything = [recording for split in SPLITS for recording in splits[split]]
        info = dict(zip(everything, Index(self.folder).info(everything), strict=True))
        self._splits = {
            split: [entry for item in splits[split] if (entry := self._entry(item, info[item])) is not None] for split in SPLITS
        }
        if self.skipped:
            _logger.warning("%s: skipped %d of %d videos", self.folder, len(self.skipped), len(info))
        if not any(self._splits.values()):
            reason = f"all {len(info)} are damaged or shorter than {num_frames} frames"
            if protocol == "benchmark" and find_lists(self.folder, self.preferred_lists):
                reason += "; protocol far uses its lists"
            raise ValueError(f"no usable video in {self.folder}: {reason}")

    def num_clips(self, split: str) -> int:
        """Clips in a split."""
        return len(self._splits[split])

    def clip(self, split: str, clip_id: int) -> Clip:
        """Decode one clip. Raises VideoError if the file turns out to be damaged."""
        check_clip_id(self, split, clip_id)
        entry = self._splits[split][clip_id]
        path, end = entry.recording.path, entry.start + self.num_frames
        actions = latents = None
        if entry.has_actions:
            actions = read_actions(entry.recording.actions, entry.recording.num_actions)[entry.start : end]
        if entry.recording.latent:
            frames, latents = self._decode(path, entry.start)
        else:
            frames = self.fit(read_frames(path, entry.start, self.num_frames))
        return Clip(clip_id, frames, actions, latents)

    def fit(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Decoded frames, uint8 (H, W, 3), as square ones of the protocol, float32 (T, 3, size, size) in [0, 1]."""
        return (squeeze if self.protocol == "benchmark" else crop_centre)(frames, self.size)

    def recording(self, split: str, clip_id: int) -> tuple[Recording, int]:
        """The recording that a clip is cut from, without ``actions`` if it has none, and the number of its frames."""
        check_clip_id(self, split, clip_id)
        entry = self._splits[split][clip_id]
        return entry.recording if entry.has_actions else replace(entry.recording, actions=None), entry.length

    @classmethod
    def as_read(cls, recording: Recording) -> Recording:
        """The recording as this data set reads it: with the size of its action space, or without actions."""
        if cls.num_actions is None:
            return recording
        if cls.num_actions:
            return replace(recording, num_actions=cls.num_actions)
        return replace(recording, actions=None)

    def path(self, split: str, clip_id: int) -> Path:
        """The file a clip comes from."""
        check_clip_id(self, split, clip_id)
        return self._splits[split][clip_id].recording.path

    def _splits_of_files(self) -> dict[str, list[Recording]]:
        """The recordings of each split, usable or not."""
        lists = find_lists(self.folder, self.preferred_lists) if self.protocol == "far" else {}
        if self._train_list is not None:
            lists["train"] = self.folder / self._train_list
        if lists:
            train, test = (read_list(lists[split]) if split in lists else [] for split in ("train", "test"))
            splits = {
                "train": [recording for number, recording in enumerate(train) if number % 10 != 1],
                "validation": train[1::10],
                "test": [recording for recording in test[:: self.test_stride] if not recording.latent],
            }
        else:
            recordings = find_recordings(self.folder)
            if self.protocol == "benchmark":
                random.Random(_SEED).shuffle(recordings)
            splits = _benchmark_splits(recordings) if self.protocol == "benchmark" else _far_splits(recordings)
        return {split: [self.as_read(recording) for recording in recordings] for split, recordings in splits.items()}

    def _entry(self, recording: Recording, info: RecordingInfo) -> _Entry | None:
        reason = info.error
        if reason is None and info.length < self.num_frames:
            reason = f"{recording.path} has {info.length} frames, clips need {self.num_frames}"
        if reason is not None:
            self.skipped[recording.path] = reason
            _logger.warning("skipping: %s", reason)
            return None
        start = 0
        if self.protocol == "benchmark":
            # Seeded by the file's name, so that a start does not depend on the other files.
            # Names that are not UTF-8 hold surrogates, which a seed of type str cannot.
            seed = f"{_SEED} {recording.path.relative_to(self.folder).as_posix()}"
            rng = random.Random(seed.encode("utf-8", "surrogateescape"))
            start = rng.randint(0, info.length - self.num_frames)
        return _Entry(recording, start, info.actions is not None, info.length)

    def _decode(self, path: Path, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and scaled latents of a recording of latents."""
        if self.host is None:
            raise ValueError(f"{path} holds latents, which only a host can decode; build the workload with make_workload")
        latents = read_latents(path, start, self.num_frames)
        if latents.shape[1:] != self.host.latent_shape:
            shape, latent_shape = tuple(latents.shape[1:]), self.host.latent_shape
            raise VideoError(f"{path} holds latents {shape}, the host {self.host.name} has {latent_shape}")
        return decode_latents(latents, self.host)


def _benchmark_splits(shuffled: list[Recording]) -> dict[str, list[Recording]]:
    num_test, num_validation = math.ceil(0.2 * len(shuffled)), math.ceil(0.1 * len(shuffled))
    test, validation = shuffled[:num_test], shuffled[num_test : num_test + num_validation]
    return {"train": shuffled[num_test + num_validation :], "validation": validation, "test": test}


def _far_splits(recordings: list[Recording]) -> dict[str, list[Recording]]:
    train = [recording for number, recording in enumerate(recordings) if number % 10 > 1]
    return {"train": train, "validation": recordings[1::10], "test": recordings[0::10]}
