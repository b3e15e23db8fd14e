"""A recorded folder: train/, validation/ and test/ with one .npz file per episode, and recording.json with the facts about it.

recording.json is written before the first episode, so that a recording that was interrupted can only be continued with the same
settings, and again at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from far_env.clips.arrays import ACTIONS, VIDEO, holds_actions, num_actions, read_number, video_shape
from far_env.clips.clip import SPLITS
from far_env.errors import VideoError, short
from far_env.io import read_json, replacing

FACTS_FILE = "recording.json"
PADDED = "padded"
_REMEDY = "choose another folder, or delete this one to record it again"


def read_facts(folder: Path) -> dict[str, Any] | None:
    """The facts of a recorded folder; None if it is none. Raises ValueError if the file is damaged."""
    path = folder / FACTS_FILE
    if not path.exists():
        return None
    facts = read_json(path, _REMEDY)
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), dict) for key in ("settings", "source")):
        raise ValueError(f"{path} is damaged (it lacks settings or source); {_REMEDY}")
    numbers = {"frames": facts["settings"].get("frames"), "size": facts["settings"].get("size")}
    if facts["source"].get("num_actions") is not None:
        numbers["num_actions"] = facts["source"]["num_actions"]
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f"{path} is damaged ({name} is {short(number)}); {_REMEDY}")
    return facts


class RecordedEpisodes:
    """The files of a recording.

    Args:
        folder: an existing folder.
        frames, size: of every episode.
        with_actions: whether episodes have actions.
    """

    def __init__(self, folder: Path, frames: int, size: int, with_actions: bool) -> None:
        self.folder, self.frames, self.size, self.with_actions = folder, frames, size, with_actions

    def path(self, split: str, number: int) -> Path:
        """The file of an episode."""
        return self.folder / split / f"{number:06}.npz"

    def finished(self, split: str, number: int) -> bool:
        """Whether an episode's file is there, and its headers are those of this recording."""
        path = self.path(split, number)
        try:
            if video_shape(path) != (self.frames, self.size, self.size, 3) or holds_actions(path) != self.with_actions:
                return False
            return not self.with_actions or num_actions(path) == self.frames
        except VideoError:
            return False

    def write(self, split: str, number: int, video: np.ndarray, actions: np.ndarray | None, padded: int) -> None:
        """Write an episode, whole or not at all. Raises ValueError if that cannot be done."""
        arrays = {VIDEO: video, PADDED: np.array(padded, dtype=np.int64)}
        if actions is not None:
            arrays[ACTIONS] = actions
        path = self.path(split, number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from error
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def counts(self, numbers: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Split → episodes, frames, padded episodes and frames, and bytes on the disk, of so many episodes each."""
        counts = {}
        for split in SPLITS:
            paths = [self.path(split, number) for number in range(numbers.get(split, 0))]
            padded = [read_number(path, PADDED) for path in paths]
            counts[split] = {
                "episodes": len(paths),
                "frames": len(paths) * self.frames,
                "padded_episodes": sum(number > 0 for number in padded),
                "padded_frames": sum(padded),
                "bytes": sum(path.stat().st_size for path in paths),
            }
        return counts


def begin(folder: Path, facts: dict[str, Any], episodes: Mapping[str, int]) -> dict[str, Any]:
    """The facts of a recording that begins, or is continued after comparing them with those in the folder.

    They are not written: a recording that turns out to be impossible must not stand in the way of another try.

    Args:
        facts: with "settings" and "source", which must not change.
        episodes: split → episodes that are wanted; a finished recording may grow.

    Returns:
        The facts, with what earlier sessions found.

    Raises:
        ValueError: if the folder holds another recording, more episodes, or other files; it names the first difference.
    """
    before = read_facts(folder)
    if before is None:
        if any((folder / split).exists() for split in SPLITS):
            raise ValueError(f"{folder} holds files, but no {FACTS_FILE}: it is not a recording; choose another folder")
        before = {}
    for part in ("settings", "source"):
        then, now = before.get(part, facts[part]), facts[part]
        for key in [*now, *(key for key in then if key not in now)]:
            if then.get(key) != now.get(key):
                raise ValueError(
                    f"{folder} holds a recording with another {key}: {short(then.get(key))} there, {short(now.get(key))} now; "
                    f"{_REMEDY}"
                )
    for split, count in (before.get("episodes") or {}).items():
        if count > episodes[split]:
            raise ValueError(
                f"{folder} holds a recording of {count} {split} episodes, {episodes[split]} are asked for; it can only grow; "
                f"{_REMEDY}"
            )
    if before.get("complete") and before["episodes"] == dict(episodes):
        return before
    return {**before, **facts, "episodes": dict(episodes), "complete": False}
