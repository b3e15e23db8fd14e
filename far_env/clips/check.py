"""Contents of a data folder: files, lengths, actions, clips per protocol and split, and which files are damaged."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from far_env.clips import video_folder
from far_env.clips.clip import SPLITS
from far_env.clips.datasets import CLIP_FRAMES, DATASETS, UCF101, DMLab, Doom, Minecraft, RecordedFolder
from far_env.clips.index import Index, RecordingInfo
from far_env.clips.recorder.folder import read_facts
from far_env.clips.recordings import Recording, find_lists, find_recordings, read_list
from far_env.clips.video_folder import PROTOCOLS, VideoFolder
from far_env.errors import unknown_name


@dataclass(frozen=True)
class DataReport:
    """The result of `check_data`.

    Attributes:
        dataset: its name.
        guessed: whether it was guessed from the files.
        num_frames: frames per clip.
        lists: FAR's lists, by split.
        recordings: information on every recording in the folder or its lists.
        clips: protocol → split → number of clips from files that are not damaged, for the protocols that can be used.
        refused: protocol → why it cannot be used, for the others.
    """

    folder: Path
    dataset: str
    guessed: bool
    num_frames: int
    lists: dict[str, Path]
    recordings: dict[Recording, RecordingInfo]
    clips: dict[str, dict[str, int]]
    refused: dict[str, str]

    @property
    def usable(self) -> bool:
        """Return whether there is any clip."""
        return any(count for splits in self.clips.values() for count in splits.values())

    @property
    def damaged(self) -> list[str]:
        """Why each damaged file cannot be read completely."""
        return [info.error or info.damage for info in self.recordings.values() if info.error or info.damage]

    @property
    def problem(self) -> str | None:
        """Why the folder is not sound, in one sentence: nothing can be used, or files are damaged; else None."""
        if not self.usable:
            return f"nothing in {self.folder} can be used for clips of {self.num_frames} frames"
        if self.damaged:
            return f"{len(self.damaged)} of {len(self.recordings)} files are damaged; the report names them"
        return None

    def text(self) -> str:
        """The report as lines of text."""
        guess = " (guessed; --dataset overrides)" if self.guessed else ""
        lines = [
            f"{self.folder}: {len(self.recordings)} files, read as {self.dataset}{guess}, clips of {self.num_frames} frames"
        ]
        lines += [f"list for {split}: {path.name}" for split, path in self.lists.items()]
        lengths = [info.length for info in self.recordings.values() if not info.error]
        if lengths:
            short = sum(length < self.num_frames for length in lengths)
            lines.append(
                f"lengths: {min(lengths)} to {max(lengths)} frames, median {statistics.median(lengths):g}; {short} too short"
            )
        if DATASETS[self.dataset].num_actions != 0:
            lines.append(f"actions: with {sum(info.actions is not None for info in self.recordings.values())} files")
        else:
            lines.append(f"actions: not read, because no host for {self.dataset} takes actions")
        for protocol, counts in self.clips.items():
            lines.append(f"protocol {protocol}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS) + " clips")
        lines += [f"protocol {protocol}: {reason}" for protocol, reason in self.refused.items()]
        undecoded = sum(info.damage is None and not info.error for info in self.recordings.values())
        others = f"{undecoded} others were not decoded" if undecoded else "all others were decoded completely"
        lines.append(f"damaged: {len(self.damaged)} files; {others}")
        return "\n".join(lines + [f"  {reason}" for reason in self.damaged])


def check_data(folder: Path, dataset: str | None = None, num_frames: int | None = None, *, whole: bool = True) -> DataReport:
    """Examine a data folder.

    Args:
        dataset: one of `DATASETS`; by default it is guessed from the lists and files.
        num_frames: frames of a clip; by default `CLIP_FRAMES`.
        whole: decode every file completely (once, because the index stores the result), not only its header.

    Raises:
        ValueError: on an unknown data set, a path that is no folder, a folder without videos, or a damaged list.
    """
    if dataset is not None and dataset not in DATASETS:
        raise ValueError(unknown_name("data set", dataset, list(DATASETS)))
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"clips need at least 1 frame, got {num_frames}")
    kind = DATASETS[dataset] if dataset else _guess(folder)
    num_frames = num_frames or CLIP_FRAMES[kind.name]
    lists = find_lists(folder, kind.preferred_lists)
    in_lists = [recording for path in lists.values() for recording in read_list(path)]
    try:
        in_folder = find_recordings(folder)
    except ValueError:
        if not in_lists:
            raise
        in_folder = []
    # A list decides which actions belong to a file, not the names of other files.
    named = {recording.path for recording in in_lists} | {recording.actions for recording in in_lists}
    recordings = [*dict.fromkeys(in_lists), *(recording for recording in in_folder if recording.path not in named)]
    recordings = [kind.as_read(recording) for recording in recordings]
    found_info = dict(zip(recordings, Index(folder).info(recordings, whole=whole), strict=True))
    damaged = {recording.path for recording, info in found_info.items() if info.error or info.damage}
    clips, refused = {}, {}
    for protocol in PROTOCOLS:
        try:
            with _quiet():
                source = kind(folder, protocol, num_frames=num_frames)
        except ValueError as error:
            refused[protocol] = str(error)
            continue
        counts = {}
        for split in SPLITS:
            paths = [source.path(split, clip_id) for clip_id in range(source.num_clips(split))]
            counts[split] = sum(path not in damaged for path in paths)
        clips[protocol] = counts
    return DataReport(folder, kind.name, dataset is None, num_frames, lists, found_info, clips, refused)


def _guess(folder: Path) -> type[VideoFolder]:
    """The data set by the facts of a recording, by the names of lists, else by the kinds of files."""
    if (facts := read_facts(folder)) is not None:
        return Doom if facts["source"].get("name") == Doom.environment else RecordedFolder
    names = {path.name for path in folder.glob("*.json")}
    for kind in DATASETS.values():
        if names & set(kind.preferred_lists):
            return kind
    try:
        recordings = find_recordings(folder)
    except ValueError as error:
        hint = "; name the data set of its lists with --dataset" if names else ""
        raise ValueError(f"{error}{hint}") from error
    if any(recording.actions == recording.path for recording in recordings):
        return DMLab
    return Minecraft if any(recording.actions is not None for recording in recordings) else UCF101


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings about single files, which the report contains."""
    logger = logging.getLogger(video_folder.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
