"""Sources of training episodes: worlds, folders of videos or of recorded episodes, and lists of them or of latents.

An episode is a whole clip of a world, or a whole file; training draws windows from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from far_env.clips.arrays import read_actions
from far_env.clips.clip import SPLITS, Clip
from far_env.clips.datasets import DATASETS, Recordings
from far_env.clips.latents import read_latents
from far_env.clips.recordings import Recording
from far_env.clips.video_folder import PROTOCOLS, VideoFolder
from far_env.clips.worlds import WORLDS, World
from far_env.errors import unknown_name
from far_env.host.training.config import DEFAULT_FRAMES, Source

BLOCK_FRAMES = 256
"""Frames of an episode that are in memory at a time while it is encoded."""


@dataclass(frozen=True)
class Classes:
    """What an episode conditions a host on: ``actions`` int64 (T,) or None, and the ``label`` of the whole episode or None."""

    actions: np.ndarray | None = None
    label: int | None = None


@dataclass(frozen=True)
class Window:
    """A piece of a validation episode: ``frames`` (T, 3, H, W) in [0, 1], or unscaled ``latents`` (T, C, h, w), and classes."""

    frames: np.ndarray | None
    latents: np.ndarray | None
    classes: Classes


class Episodes(Protocol):
    """The train and validation episodes of one source.

    Attributes:
        name: for messages, logs and folders.
        frames: length of the windows that are drawn from them.
        interval: distance of successive frames of a window within the episode.
        facts: plain values that identify what the episodes hold, for the cache of encoded ones.
        holds_latents: whether they are latents already, which cannot be encoded with another autoencoder.
        classes_given: whether a host that takes actions or labels gets theirs, not the null class.
    """

    name: str
    frames: int
    interval: int
    facts: dict[str, Any]
    holds_latents: bool
    classes_given: bool

    def count(self) -> int:
        """Number of train episodes."""

    def length(self, index: int) -> int:
        """Frames of a train episode."""

    def blocks(self, index: int) -> Iterator[np.ndarray]:
        """A train episode in pieces: frames (t, 3, H, W) in [0, 1], or unscaled latents (t, C, h, w), float32.

        Raises VideoError if the file is damaged.
        """

    def classes(self, index: int) -> Classes:
        """What conditions a host during a train episode. Raises VideoError if the file is damaged."""

    def draw(self, number: int) -> np.ndarray:
        """Frames (T, 3, H, W) of the ``number``-th train window, the same at every call; for training an autoencoder."""

    def num_validation(self) -> int:
        """Number of validation windows."""

    def validation(self, index: int) -> Window:
        """A window of ``frames`` frames of a validation episode."""


class WorldEpisodes:
    """The clips of a procedural world.

    Args:
        count: train clips that are used for the transformer; the autoencoder sees others.
    """

    holds_latents = False
    interval = 1

    def __init__(self, world: World, count: int, frames: int | None, classes_given: bool = True) -> None:
        if (frames or 0) > world.num_frames:
            raise ValueError(f"the source {world.name} has clips of {world.num_frames} frames; its frames cannot be {frames}")
        self.classes_given = classes_given
        self._world, self._count = world, min(count, world.num_clips("train"))
        self.name, self.frames = world.name, frames or world.num_frames
        first = world.clip("train", 0)
        # A world that draws other clips in a later version must not find the latents of earlier ones.
        self.facts = {"world": world.name, "first_clip": hashlib.sha256(first.frames.tobytes()).hexdigest()[:16]}

    def count(self) -> int:
        """Number of train clips."""
        return self._count

    def length(self, index: int) -> int:
        """Frames of a clip."""
        return self._world.num_frames

    def blocks(self, index: int) -> Iterator[np.ndarray]:
        """The clip's frames."""
        yield _clip(self._world, "train", index).frames

    def classes(self, index: int) -> Classes:
        """The clip's actions."""
        return Classes(_clip(self._world, "train", index).actions)

    def draw(self, number: int) -> np.ndarray:
        """The frames of clip ``number``, from the beginning again after the last."""
        return self._world.clip("train", number % self._world.num_clips("train")).frames

    def num_validation(self) -> int:
        """Number of validation clips."""
        return self._world.num_clips("validation")

    def validation(self, index: int) -> Window:
        """The end of a validation clip."""
        clip = self._world.clip("validation", index)
        start = len(clip.frames) - self.frames
        return Window(clip.frames[start:], None, Classes(None if clip.actions is None else clip.actions[start:]))


class FolderEpisodes:
    """The files of a folder, or of the lists in it.

    Args:
        source: its settings.
        size: side of the square frames.
    """

    def __init__(self, source: Source, size: int) -> None:
        self._source, self.classes_given = source, source.classes
        self.frames, self.interval = source.frames or DEFAULT_FRAMES, source.interval
        self._span = (self.frames - 1) * self.interval + 1
        named = source.clips in DATASETS
        dataset = source.clips if named else source.dataset
        reader = _reader(Path(source.clips)) if dataset is None else DATASETS[dataset]
        options = {} if source.train_list is None else {"train_list": source.train_list}
        self._folder: VideoFolder = reader(
            None if named else source.clips, source.protocol, num_frames=self._span, size=size, **options
        )
        self.name = source.clips if named else self._folder.folder.resolve().name
        self._num_files = self._folder.num_clips("train")
        if not self._num_files:
            raise ValueError(f"the source {source.clips} has no video in its train split; it needs more videos")
        recordings = [self._folder.recording("train", index) for index in range(self._num_files)]
        self._lengths = [length for _, length in recordings]
        kinds = {recording.latent for recording, _ in recordings}
        if len(kinds) > 1:
            raise ValueError(f"the source {source.clips} lists both videos and latents; use two sources")
        (self.holds_latents,) = kinds
        if self.holds_latents and source.flip:
            raise ValueError(f"the source {source.clips} lists latents, which cannot be mirrored; leave flip out")
        folders = sorted({recording.path.parent.name for recording, _ in recordings})
        self._labels = {name: number for number, name in enumerate(folders)}
        files = hashlib.sha256()
        for recording, length in recordings:
            status = recording.path.stat()
            files.update(f"{recording} {length} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        self.facts = {
            "folder": str(self._folder.folder.resolve()),
            "dataset": self._folder.name,
            "protocol": source.protocol,
            "size": size,
            "flip": source.flip,
            "files": files.hexdigest()[:16],
        }

    def count(self) -> int:
        """Number of files, mirrored ones counted as others."""
        return self._num_files * (2 if self._source.flip else 1)

    def length(self, index: int) -> int:
        """Frames of a file, or those with an action."""
        return self._lengths[index % self._num_files]

    def blocks(self, index: int) -> Iterator[np.ndarray]:
        """The file's frames or latents."""
        recording, length = self._folder.recording("train", index % self._num_files)
        if recording.latent:
            yield read_latents(recording.path, 0, length).numpy()
            return
        for frames in self._folder.read_blocks(recording.path, length, BLOCK_FRAMES):
            yield frames[..., ::-1] if index >= self._num_files else frames

    def classes(self, index: int) -> Classes:
        """Actions of the file's frames, and its label: the list's, else the number of its folder among all."""
        recording, _ = self._folder.recording("train", index % self._num_files)
        return self._classes(recording)

    def draw(self, number: int) -> np.ndarray:
        """A window from the file that is next in an order which changes with every pass over all files."""
        turn, place = divmod(number, self._num_files)
        index = int(_order(self._num_files, turn)[place])
        recording, length = self._folder.recording("train", index)
        start = int(np.random.default_rng((3, number)).integers(length - self._span + 1))
        return self._folder.read(recording.path, start, self._span, self.interval)

    def num_validation(self) -> int:
        """Number of files in the validation split."""
        return self._folder.num_clips("validation")

    def validation(self, index: int) -> Window:
        """The first frames of a file."""
        recording, _ = self._folder.recording("validation", index)
        classes = self._classes(recording)
        if classes.actions is not None:
            classes = replace(classes, actions=classes.actions[: self._span : self.interval])
        if recording.latent:
            return Window(None, read_latents(recording.path, 0, self._span).numpy()[:: self.interval], classes)
        return Window(self._folder.read(recording.path, 0, self._span, self.interval), None, classes)

    def _classes(self, recording: Recording) -> Classes:
        actions = None
        if recording.actions is not None:
            actions = read_actions(recording.actions, recording.num_actions)
        label = recording.label
        # A folder that holds validation files alone has no number among those of the train split.
        return Classes(actions, self._labels.get(recording.path.parent.name) if label is None else label)


def _reader(folder: Path) -> type[VideoFolder]:
    """How a folder is read whose data set is not named: one with a subfolder for every split is a recorded one."""
    has_splits = all((folder / split).is_dir() for split in SPLITS)
    return DATASETS.get("recorded", Recordings) if has_splits else Recordings


@lru_cache(maxsize=8)
def _clip(world: World, split: str, index: int) -> Clip:
    """A clip of a world; its frames and its actions are asked for one after the other."""
    return world.clip(split, index)


@lru_cache(maxsize=8)
def _order(count: int, turn: int) -> np.ndarray:
    return np.random.default_rng((2, turn)).permutation(count)


def find_episodes(source: Source, frame_size: int, clips_per_world: int) -> Episodes:
    """The episodes that a source of a training configuration names.

    Args:
        frame_size: side of the host's frames.
        clips_per_world: train clips of a world.

    Raises:
        ValueError: if it is neither a world nor a folder of videos, or does not fit the host's frames.
    """
    if source.clips in WORLDS:
        world = WORLDS[source.clips]
        if world.size != frame_size:
            raise ValueError(f"the source {world.name} draws frames of {world.size}², the host works on {frame_size}²")
        if source.interval != 1 or source.flip or source.dataset is not None or source.train_list is not None:
            raise ValueError(f"the source {world.name} is a world, which takes no interval, flip, dataset or train_list")
        return WorldEpisodes(world, clips_per_world, source.frames, source.classes)
    if source.clips not in DATASETS and not Path(source.clips).is_dir():
        known = unknown_name("source", source.clips, [*WORLDS, *DATASETS])
        raise ValueError(f"{known}; there is no folder of that name either")
    if source.dataset is not None and source.dataset not in DATASETS:
        raise ValueError(unknown_name("data set", source.dataset, list(DATASETS)))
    if source.protocol not in PROTOCOLS:
        raise ValueError(unknown_name("protocol", source.protocol, PROTOCOLS))
    return FolderEpisodes(source, frame_size)
