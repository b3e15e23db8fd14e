"""A folder of videos as a clip source, by the benchmark's protocol or by FAR's."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from far_env.clips.arrays import read_actions
from far_env.clips.benchmark_files import benchmark_recordings, excluded_files, listed_recordings
from far_env.clips.clip import SPLITS, Clip, check_clip_id
from far_env.clips.data_folders import find_data
from far_env.clips.index import Index, RecordingInfo
from far_env.clips.latents import LatentHost, decode_latents, read_latents
from far_env.clips.recordings import Recording, find_lists, find_recordings, read_list
from far_env.clips.video import crop_centre, frame_blocks, read_frames, to_pixels
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
    interval: int = 1


class VideoFolder:
    """Clips of ``num_frames`` frames from videos on disk.

    Protocols:
        benchmark: the sorted file list shuffled by ``random.Random(42)``, a random start per clip, frames squeezed to a square.
            Lists are ignored. Of the data sets that the benchmark has (``benchmark_clips``), the clips that it plays are the
            test split: those of the first files that are long enough and can be read, with starts that the same generator
            draws one after the other. Of the other files in this order the first tenth is validation, the rest train. Of other
            data sets the first fifth is test, the next tenth validation.
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
        file_order: for the protocol benchmark, a list of the files before they are shuffled (see `listed_recordings`), to
            repeat a run of the benchmark, which takes them as the file system lists them. Other files are not used.
        interval: for the protocol far, a clip is every ``interval``-th frame, or successive ones where a video is too short.
        class_list: name of a list in the folder, for the protocol far, whose videos are the test split and have labels; clips
            0, 1, 2, … are of one class after the other, so that any number of them has every class about equally often.
        exclude: a list of clips that ``far-env benchmark --list-clips`` wrote; their files are in no train or validation split.

    Raises:
        ValueError: on an unknown protocol, a missing folder, an unfinished download, a damaged list, a file order where there
            is none, or a folder without a usable video.

    Attributes:
        test_stride: distance between entries of the test list that are used, 1 for all.
        preferred_lists: names of FAR's lists, used if a folder has several lists.
        num_actions: size of the action space, 0 for data whose actions are not read, None if it is unknown.
        remedy: what to do if there is no data.
        benchmark_clips: how many clips the benchmark plays at most, None if it does not have this data set.
        benchmark_suffixes: of the files that it reads.
        found_by_benchmark: whether it would find files here; otherwise it has all that are there.
    """

    name = "videos"
    variable = "VIDEOS_DATA_DIR"
    default_size = 64
    test_stride = 1
    preferred_lists: tuple[str, ...] = ()
    num_actions: int | None = 0
    remedy = "far-env data download fetches the data sets of FAR"
    benchmark_clips: int | None = None
    benchmark_suffixes: tuple[str, ...] = ()
    benchmark_subfolder: str | None = None

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        protocol: str = "benchmark",
        *,
        num_frames: int,
        size: int | None = None,
        train_list: str | None = None,
        file_order: str | os.PathLike | None = None,
        interval: int = 1,
        class_list: str | None = None,
        exclude: str | os.PathLike | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(unknown_name(f"{self.name} protocol", protocol, PROTOCOLS))
        path = data_dir or os.environ.get(self.variable) or find_data(self.name)
        if not path:
            raise ValueError(f"{self.name} needs a folder of videos: give data_dir, or set {self.variable}; {self.remedy}")
        self.folder, self.protocol, self.num_frames = Path(path), protocol, num_frames
        self.size = self.default_size if size is None else size
        self._train_list, self._class_list, self._interval = train_list, class_list, interval
        self.host: LatentHost | None = None
        self.skipped: dict[Path, str] = {}
        self.found_by_benchmark = True
        self._file_order = None if file_order is None else Path(file_order)
        if (interval != 1 or class_list is not None) and (protocol != "far" or self.num_actions != 0 or interval < 1):
            raise ValueError(
                f"interval (from 1 on) and class_list are for the protocol far, for data without actions ({self.name})"
            )
        plays_benchmark = protocol == "benchmark" and self.benchmark_clips is not None
        if self._file_order is not None and not plays_benchmark:
            raise ValueError("a file order is for the benchmark's data sets, ucf101 and dmlab, with the protocol benchmark")
        excluded = set() if exclude is None else excluded_files(Path(exclude), self.folder)
        splits = self._benchmark_order() if plays_benchmark else self._splits_of_files()
        for split in ("train", "validation") if excluded else ():
            splits[split] = [recording for recording in splits[split] if recording.path.resolve() not in excluded]
        everything = [recording for split in SPLITS for recording in splits[split]]
        index = Index(self.folder)
        info = dict(zip(everything, index.info(everything), strict=True))
        if plays_benchmark:
            self._splits = self._benchmark_splits(splits["train"], info, index)
        else:
            self._splits = {
                split: [entry for item in splits[split] if (entry := self._entry(item, info[item])) is not None]
                for split in SPLITS
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
            count = (self.num_frames - 1) * entry.interval + 1
            frames = self.read(path, entry.start, count, entry.interval)
        return Clip(clip_id, frames, actions, latents, entry.recording.label)

    def read(self, path: Path, start: int, count: int, interval: int = 1) -> np.ndarray:
        """Frames start … start+count-1 of a video or episode, or every ``interval``-th of them, as squares of the protocol.

        Returns:
            float32 (T, 3, size, size) in [0, 1].
        """
        return self._fit(read_frames(path, start, count, self._side)[::interval])

    def read_blocks(self, path: Path, count: int, size: int) -> Iterator[np.ndarray]:
        """The first ``count`` frames as `read` gives them, up to ``size`` at a time."""
        return map(self._fit, frame_blocks(path, count, size, self._side))

    @property
    def _side(self) -> int | None:
        """To what frames are squeezed while they are decoded, which is the benchmark's way."""
        return self.size if self.protocol == "benchmark" else None

    def _fit(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return to_pixels(frames) if self.protocol == "benchmark" else crop_centre(frames, self.size)

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
        return self.place(split, clip_id)[0]

    def place(self, split: str, clip_id: int) -> tuple[Path, int]:
        """The file a clip comes from, and the number of its first frame there."""
        check_clip_id(self, split, clip_id)
        entry = self._splits[split][clip_id]
        return entry.recording.path, entry.start

    def _benchmark_order(self) -> dict[str, list[Recording]]:
        """All files of the benchmark in its order, as train."""
        if self._file_order is not None:
            recordings = listed_recordings(self.folder, self._file_order)
        else:
            subfolder = self.folder / (self.benchmark_subfolder or "")
            folder = subfolder if subfolder.is_dir() else self.folder
            recordings, self.found_by_benchmark = benchmark_recordings(folder, self.benchmark_suffixes)
        return {"train": [self.as_read(recording) for recording in recordings], "validation": [], "test": []}

    def _benchmark_splits(
        self, recordings: list[Recording], info: dict[Recording, RecordingInfo], index: Index
    ) -> dict[str, list[_Entry]]:
        """The splits of the benchmark's files, given in the order before it shuffles them."""
        # One generator shuffles and then draws starts, only for files that can be opened and are long enough; a file that
        # turns out to be damaged has had its draw.
        rng = random.Random(_SEED)
        rng.shuffle(recordings)
        following = iter(recordings)
        test: list[_Entry] = []
        while drawn := self._draw(following, info, rng, self.benchmark_clips - len(test)):
            decoded = index.info([entry.recording for entry in drawn], whole=True)
            for entry, entry_info in zip(drawn, decoded, strict=True):
                if entry_info.damage and (reason := self._damage(entry)) is not None:
                    self._skip(entry.recording, reason)
                else:
                    test.append(entry)
        rest = list(following)
        num_validation = math.ceil(0.1 * len(rest))
        validation, train = (
            [entry for item in part if (entry := self._entry(item, info[item])) is not None]
            for part in (rest[:num_validation], rest[num_validation:])
        )
        return {"train": train, "validation": validation, "test": test}

    def _draw(
        self, recordings: Iterator[Recording], info: dict[Recording, RecordingInfo], rng: random.Random, count: int
    ) -> list[_Entry]:
        """Clips of the next ``count`` recordings that can be used, or of as many as there are."""
        drawn: list[_Entry] = []
        while len(drawn) < count and (recording := next(recordings, None)) is not None:
            # The benchmark does not know of actions, and takes a video without them from its whole length.
            known = info[recording]
            length = known.length if recording.actions == recording.path else known.frames
            if self._unusable(recording, known, length):
                continue
            start = rng.randint(0, length - self.num_frames)
            has_actions = known.actions is not None and known.actions >= start + self.num_frames
            drawn.append(_Entry(recording, start, has_actions, length))
        return drawn

    def _damage(self, entry: _Entry) -> str | None:
        """Why the frames of a clip cannot be read, in a file that is damaged somewhere; None if they can."""
        try:
            read_frames(entry.recording.path, entry.start, self.num_frames)
        except VideoError as error:
            return str(error)
        return None

    def _splits_of_files(self) -> dict[str, list[Recording]]:
        """The recordings of each split, usable or not."""
        if self._class_list is not None:
            labelled = _one_class_after_the_other(read_list(self.folder / self._class_list), self.folder / self._class_list)
            return {"train": [], "validation": [], "test": [self.as_read(recording) for recording in labelled]}
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
            splits = _shuffled_splits(recordings) if self.protocol == "benchmark" else _far_splits(recordings)
        return {split: [self.as_read(recording) for recording in recordings] for split, recordings in splits.items()}

    def _entry(self, recording: Recording, info: RecordingInfo) -> _Entry | None:
        if self._unusable(recording, info, info.length):
            return None
        start = 0
        if self.protocol == "benchmark":
            # Seeded by the file's name, so that a start does not depend on the other files.
            # Names that are not UTF-8 hold surrogates, which a seed of type str cannot.
            seed = f"{_SEED} {recording.path.relative_to(self.folder).as_posix()}"
            rng = random.Random(seed.encode("utf-8", "surrogateescape"))
            start = rng.randint(0, info.length - self.num_frames)
        long_enough = info.length >= (self.num_frames - 1) * self._interval + 1
        return _Entry(recording, start, info.actions is not None, info.length, self._interval if long_enough else 1)

    def _unusable(self, recording: Recording, info: RecordingInfo, length: int) -> bool:
        """Whether a recording cannot be opened or has fewer frames than a clip, which is noted."""
        if info.error is None and length >= self.num_frames:
            return False
        self._skip(recording, info.error or f"{recording.path} has {length} frames, clips need {self.num_frames}")
        return True

    def _skip(self, recording: Recording, reason: str) -> None:
        self.skipped[recording.path] = reason
        _logger.warning("skipping: %s", reason)

    def _decode(self, path: Path, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and scaled latents of a recording of latents."""
        if self.host is None:
            raise ValueError(f"{path} holds latents, which only a host can decode; build the workload with make_workload")
        latents = read_latents(path, start, self.num_frames)
        if latents.shape[1:] != self.host.latent_shape:
            shape, latent_shape = tuple(latents.shape[1:]), self.host.latent_shape
            raise VideoError(f"{path} holds latents {shape}, the host {self.host.name} has {latent_shape}")
        return decode_latents(latents, self.host)


def _one_class_after_the_other(recordings: list[Recording], path: Path) -> list[Recording]:
    """The first of each class in the order of their labels, then the second of each, …; within a class they are shuffled.

    Raises:
        ValueError: if one of them has no label, or is one of latents.
    """
    classes: dict[int, list[Recording]] = {}
    for number, recording in enumerate(recordings):
        if recording.label is None or recording.latent:
            raise ValueError(f"the list {path}, entry {number}: needs a video with a label, as a list of classes")
        classes.setdefault(recording.label, []).append(recording)
    rng = random.Random(_SEED)
    shuffled = [rng.sample(classes[label], len(classes[label])) for label in sorted(classes)]
    return [recording for place in itertools.zip_longest(*shuffled) for recording in place if recording is not None]


def _shuffled_splits(shuffled: list[Recording]) -> dict[str, list[Recording]]:
    num_test, num_validation = math.ceil(0.2 * len(shuffled)), math.ceil(0.1 * len(shuffled))
    test, validation = shuffled[:num_test], shuffled[num_test : num_test + num_validation]
    return {"train": shuffled[num_test + num_validation :], "validation": validation, "test": test}


def _far_splits(recordings: list[Recording]) -> dict[str, list[Recording]]:
    train = [recording for number, recording in enumerate(recordings) if number % 10 > 1]
    return {"train": train, "validation": recordings[1::10], "test": recordings[0::10]}
