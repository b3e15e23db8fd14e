"""Lengths and damage of the files of a data folder, in a cache file, so that headers are read once and not at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from far_env.clips.arrays import holds_actions, num_actions, read_actions
from far_env.clips.latents import check_latents, count_latents
from far_env.clips.recordings import Recording
from far_env.clips.video import check_frames, count_frames
from far_env.errors import VideoError
from far_env.io import cache_dir, write_text
from far_env.progress import show_progress

READER_VERSION = 2
"""Raised when files are read differently, so that what an earlier version found in them is not used."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordingInfo:
    """Length and state of a recording.

    Attributes:
        frames: number of frames according to its header; 0 if it cannot be used.
        actions: number of its actions, or None without actions.
        error: why its header cannot be used; else None.
        damage: why it cannot be decoded completely, or "" if it can; None if that was not tried.
    """

    frames: int = 0
    actions: int | None = None
    error: str | None = None
    damage: str | None = None

    @property
    def length(self) -> int:
        """Frames that can be used: all, or those with an action."""
        return self.frames if self.actions is None else min(self.frames, self.actions)


def examine(recording: Recording) -> RecordingInfo:
    """Read the headers of a recording's files."""
    path, actions = recording.path, recording.actions
    try:
        frames = count_latents(path) if recording.latent else count_frames(path)
        has_actions = actions is not None and (actions != path or holds_actions(path))
        return RecordingInfo(frames, num_actions(actions) if has_actions else None)
    except VideoError as error:
        return RecordingInfo(error=str(error))


def decode_completely(recording: Recording, info: RecordingInfo) -> str:
    """Decode all of a recording whose header can be used. Returns what is wrong with it, or ""."""
    try:
        (check_latents if recording.latent else check_frames)(recording.path)
        if info.actions is not None:
            read_actions(recording.actions, recording.num_actions)
    except VideoError as error:
        return str(error)
    return ""


class Index:
    """Information on the recordings of one folder. A file is read again when its size or its modification time has changed.

    It is stored in a file in `far_env.io.cache_dir`; if that cannot be read or written, headers are read every time.
    """

    def __init__(self, folder: Path) -> None:
        self._name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] + ".json"
        self._entries = self._load()

    def info(self, recordings: Sequence[Recording], *, whole: bool = False) -> list[RecordingInfo]:
        """Information on each recording, with a progress bar if it takes a while. After Ctrl-C, what was read is stored.

        Args:
            whole: also decode every file completely, once, to fill in ``damage``.
        """
        infos, before = [], dict(self._entries)
        try:
            task = "decode files" if whole else "read headers"
            for recording in show_progress(recordings, description=task, unit="files", delay=1):
                infos.append(self._info(recording, whole))
        finally:
            if self._entries != before:
                self._save()
        return infos

    def _info(self, recording: Recording, whole: bool) -> RecordingInfo:
        key, stamp = os.path.abspath(recording.path), _stamp(recording)
        saved_stamp, info = self._entries.get(key, (None, RecordingInfo()))
        if stamp != saved_stamp:
            info = examine(recording)
        if whole and info.error is None and info.damage is None:
            info = replace(info, damage=decode_completely(recording, info))
        self._entries[key] = (stamp, info)
        return info

    def _load(self) -> dict[str, tuple[list, RecordingInfo]]:
        try:
            stored = json.loads((cache_dir() / "index" / self._name).read_text(encoding="utf-8"))
            return {path: (stamp, RecordingInfo(**info)) for path, (stamp, info) in stored.items()}
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
            return {}  # it does not exist, or is of another version: it is written again

    def _save(self) -> None:
        stored = {path: (stamp, asdict(info)) for path, (stamp, info) in self._entries.items()}
        try:
            folder = cache_dir() / "index"
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / self._name, json.dumps(stored))
        except (OSError, RuntimeError, ValueError) as error:
            _logger.info("the index is not stored: %s", error)


def _stamp(recording: Recording) -> list:
    """The kind of a file, and paths, sizes and modification times of its files."""
    stamp: list = [READER_VERSION, recording.latent, recording.num_actions]
    for path in (recording.path, recording.actions):
        try:
            status = None if path is None else path.stat()
        except OSError:
            status = None
        stamp.append(None if path is None else [str(path), status and status.st_size, status and status.st_mtime_ns])
    return stamp
