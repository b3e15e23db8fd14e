"""What a data folder is good for: files, lengths, actions, clips per protocol and split, and what is wrong with which file."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from far_env.clips import video_folder
from far_env.clips.clip import SPLITS
from far_env.clips.datasets import CLIP_FRAMES, DATASETS, UCF101, DMLab, Minecraft
from far_env.clips.index import Facts, Index
from far_env.clips.recordings import Recording, find_lists, find_recordings, read_list
from far_env.clips.video_folder import PROTOCOLS, VideoFolder
from far_env.errors import unknown_name


@dataclass(frozen=True)
class DataReport:
    """What `check_data` found.

    Attributes:
        dataset: its name, and whether it was ``guessed``.
        num_frames: frames a clip needs.
        lists: FAR's lists, by split.
        facts: about every recording that was found or is listed.
        clips: protocol → split → usable clips, those of damaged files left out; only of protocols that can be used.
        refused: protocol → why it cannot be used.
    """

    folder: Path
    dataset: str
    guessed: bool
    num_frames: int
    lists: dict[str, Path]
    facts: dict[Recording, Facts]
    clips: dict[str, dict[str, int]]
    refused: dict[str, str]

    @property
    def usable(self) -> bool:
        """Whether there is any clip."""
        return any(count for own in self.clips.values() for count in own.values())

    @property
    def damaged(self) -> list[str]:
        """What is wrong with each file that cannot be read, or not to its end."""
        return [facts.error or facts.damage for facts in self.facts.values() if facts.error or facts.damage]

    @property
    def problem(self) -> str | None:
        """Why the folder is not sound, in one sentence: nothing can be used, or files are damaged; else None."""
        if not self.usable:
            return f"nothing in {self.folder} can be used for clips of {self.num_frames} frames"
        if self.damaged:
            return f"{len(self.damaged)} of {len(self.facts)} files are damaged; the report names them"
        return None

    def text(self) -> str:
        """All of it in lines."""
        guess = " (a guess: --dataset says otherwise)" if self.guessed else ""
        lines = [f"{self.folder}: {len(self.facts)} files, taken for {self.dataset}{guess}, clips of {self.num_frames} frames"]
        lines += [f"list for {split}: {path.name}" for split, path in self.lists.items()]
        lengths = [facts.length for facts in self.facts.values() if not facts.error]
        if lengths:
            short = sum(length < self.num_frames for length in lengths)
            lines.append(
                f"lengths: {min(lengths)} to {max(lengths)} frames, median {statistics.median(lengths):g}; {short} too short"
            )
        if DATASETS[self.dataset].num_actions:
            lines.append(f"actions: with {sum(facts.actions is not None for facts in self.facts.values())} files")
        else:
            lines.append(f"actions: not read, no host of {self.dataset} takes any")
        for protocol, own in self.clips.items():
            lines.append(f"protocol {protocol}: " + ", ".join(f"{own[split]} {split}" for split in SPLITS) + " clips")
        lines += [f"protocol {protocol}: {reason}" for protocol, reason in self.refused.items()]
        unread = sum(facts.damage is None and not facts.error for facts in self.facts.values())
        others = f"{unread} others were not read to their end" if unread else "all others were read to their end"
        lines.append(f"damaged: {len(self.damaged)} files; {others}")
        return "\n".join(lines + [f"  {reason}" for reason in self.damaged])


def check_data(folder: Path, dataset: str | None = None, num_frames: int | None = None, *, whole: bool = True) -> DataReport:
    """Examine a data folder.

    Args:
        dataset: one of `DATASETS`; by default what its lists and files look like.
        num_frames: frames of a clip; by default `CLIP_FRAMES`.
        whole: read every file to its end (once: the index remembers), not only its header.

    Raises:
        ValueError: on an unknown data set, a folder that is none, one without any video, or a damaged list.
    """
    if dataset is not None and dataset not in DATASETS:
        raise ValueError(unknown_name("data set", dataset, list(DATASETS)))
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"clips need at least 1 frame, got {num_frames}")
    kind = DATASETS[dataset] if dataset else _guess(folder)
    num_frames = num_frames or CLIP_FRAMES[kind.name]
    lists = find_lists(folder, kind.preferred_lists)
    listed = [recording for path in lists.values() for recording in read_list(path)]
    try:
        found = find_recordings(folder)
    except ValueError:
        if not listed:
            raise
        found = []
    # What a list says of a file's actions counts, not what lies beside it.
    named = {recording.path for recording in listed} | {recording.actions for recording in listed}
    recordings = [*dict.fromkeys(listed), *(recording for recording in found if recording.path not in named)]
    recordings = [kind.as_read(recording) for recording in recordings]
    facts = dict(zip(recordings, Index(folder).facts(recordings, whole=whole), strict=True))
    damaged = {recording.path for recording, own in facts.items() if own.error or own.damage}
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
    return DataReport(folder, kind.name, dataset is None, num_frames, lists, facts, clips, refused)


def _guess(folder: Path) -> type[VideoFolder]:
    """By the names of lists, else by what the files are."""
    names = {path.name for path in folder.glob("*.json")}
    for kind in DATASETS.values():
        if names & set(kind.preferred_lists):
            return kind
    try:
        recordings = find_recordings(folder)
    except ValueError as error:
        hint = "; say with --dataset what its lists are of" if names else ""
        raise ValueError(f"{error}{hint}") from error
    if any(recording.actions == recording.path for recording in recordings):
        return DMLab
    return Minecraft if any(recording.actions is not None for recording in recordings) else UCF101


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about single files, which the report tells."""
    logger = logging.getLogger(video_folder.__name__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
