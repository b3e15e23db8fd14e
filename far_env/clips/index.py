"""What is known of the files of a data folder, kept in a cache file: headers are read once, not at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from far_env.clips.arrays import holds_actions, num_actions, read_actions
from far_env.clips.latents import check_latents, count_latents
from far_env.clips.recordings import Recording
from far_env.clips.video import check_frames, count_frames
from far_env.errors import VideoError
from far_env.io import cache_dir, write_text

READER_VERSION = 2
"""Raised when files are read differently, so that what an earlier version found in them is not used."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What is known of a recording.

    Attributes:
        frames: how many its header tells; 0 if it cannot be used.
        actions: how many actions come with it, or None.
        error: why it cannot be used, by its header; else None.
        damage: why it cannot be read as a whole, or "" if it can; None if that was not tried.
    """

    frames: int = 0
    actions: int | None = None
    error: str | None = None
    damage: str | None = None

    @property
    def length(self) -> int:
        """Frames that can be used: all, or those that have an action."""
        return self.frames if self.actions is None else min(self.frames, self.actions)


def examine(recording: Recording) -> Facts:
    """What the headers of a recording's files tell."""
    path, actions = recording.path, recording.actions
    try:
        frames = count_latents(path) if recording.latent else count_frames(path)
        has_actions = actions is not None and (actions != path or holds_actions(path))
        return Facts(frames, num_actions(actions) if has_actions else None)
    except VideoError as error:
        return Facts(error=str(error))


def read_through(recording: Recording, facts: Facts) -> str:
    """Read all of a recording that can be used by its header. Returns what is wrong with it, or ""."""
    try:
        (check_latents if recording.latent else check_frames)(recording.path)
        if facts.actions is not None:
            read_actions(recording.actions, recording.num_actions)
    except VideoError as error:
        return str(error)
    return ""


class Index:
    """Facts about the recordings of one folder. A file is read again when its size or its time of change is another.

    They are kept in a file in `far_env.config.cache_dir`; where that cannot be read or written, headers are read every time.
    """

    def __init__(self, folder: Path) -> None:
        self._name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] + ".json"
        self._known = self._load()

    def facts(self, recordings: Sequence[Recording], *, whole: bool = False) -> list[Facts]:
        """Facts about each recording; a progress bar appears when it takes a while. Ctrl-C loses none that are known by then.

        Args:
            whole: also read every file to its end, once, so that ``damage`` is known.
        """
        found, before = [], dict(self._known)
        try:
            what = "read files" if whole else "read headers"
            for recording in tqdm(recordings, desc=what, unit="file", delay=1, leave=False, dynamic_ncols=True):
                found.append(self._facts(recording, whole))
        finally:
            if self._known != before:
                self._save()
        return found

    def _facts(self, recording: Recording, whole: bool) -> Facts:
        key, stamp = os.path.abspath(recording.path), _stamp(recording)
        known_stamp, facts = self._known.get(key, (None, Facts()))
        if stamp != known_stamp:
            facts = examine(recording)
        if whole and facts.error is None and facts.damage is None:
            facts = replace(facts, damage=read_through(recording, facts))
        self._known[key] = (stamp, facts)
        return facts

    def _load(self) -> dict[str, tuple[list, Facts]]:
        try:
            stored = json.loads((cache_dir() / "index" / self._name).read_text(encoding="utf-8"))
            return {path: (stamp, Facts(**facts)) for path, (stamp, facts) in stored.items()}
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
            return {}  # there is none, or it is of another version: it is made anew

    def _save(self) -> None:
        stored = {path: (stamp, asdict(facts)) for path, (stamp, facts) in self._known.items()}
        try:
            folder = cache_dir() / "index"
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / self._name, json.dumps(stored))
        except (OSError, RuntimeError, ValueError) as error:
            _logger.info("the index is not kept: %s", error)


def _stamp(recording: Recording) -> list:
    """What is read as what, and sizes and times of change of these files."""
    stamp: list = [READER_VERSION, recording.latent, recording.num_actions]
    for path in (recording.path, recording.actions):
        try:
            status = None if path is None else path.stat()
        except OSError:
            status = None
        stamp.append(None if path is None else [str(path), status and status.st_size, status and status.st_mtime_ns])
    return stamp
