"""The files of a data folder: videos, episodes or encoded latents, each with its actions, and FAR's lists of them.

Hidden files and sidecars, which Macs and network drives add to folders, are ignored throughout.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from far_env.clips.video import EPISODE_SUFFIX, VIDEO_SUFFIXES
from far_env.errors import short
from far_env.io import read_utf8

SIDECAR_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
_LIST_NAME = re.compile(r"(?:.*_)?(train|test|val)\d*")


@dataclass(frozen=True)
class Recording:
    """A file of frames, and the file with its actions.

    Attributes:
        path: a video, an .npz episode, or a tensor of latents.
        actions: an .npz file with ``actions``, or the episode itself, which may have some; None without actions.
        latent: whether ``path`` holds latents.
        num_actions: size of the action space, or None if it is unknown.
        label: class of the whole recording, where a list gives one.
    """

    path: Path
    actions: Path | None = None
    latent: bool = False
    num_actions: int | None = None
    label: int | None = None


def is_hidden(path: PurePath) -> bool:
    """Return whether a relative path is, or is inside, a hidden file or folder (.name, ._name) or a folder of sidecars."""
    return any(part in SIDECAR_FOLDERS or (part.startswith(".") and part != "..") for part in path.parts)


def find_recordings(folder: Path) -> list[Recording]:
    """All videos and episodes below ``folder``, sorted by path. An .npz file with the name of a video contains its actions.

    Raises:
        ValueError: if there is no such folder or no video in it.
    """
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist; point data_dir at a folder with .mp4, .avi or .npz files")
    videos_and_episodes = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    paths = sorted(path for path in videos_and_episodes if not is_hidden(path.relative_to(folder)) and not path.is_dir())
    if not paths:
        raise ValueError(f"the data folder {folder} holds no .mp4, .avi or .npz file")
    archives = {path.with_suffix(""): path for path in paths if path.suffix.lower() == EPISODE_SUFFIX}
    videos = {path.with_suffix("") for path in paths if path.suffix.lower() != EPISODE_SUFFIX}
    return [
        Recording(path, archives.get(path.with_suffix("")))
        for path in paths
        if path.suffix.lower() != EPISODE_SUFFIX or path.with_suffix("") not in videos
    ]


def find_lists(folder: Path, preferred: tuple[str, ...]) -> dict[str, Path]:
    """FAR's lists at the top of ``folder``, under "train" and "test": files like train03.json, bair_train.json, dmlab_val.json.

    Args:
        preferred: names to choose from if a split has several lists.

    Raises:
        ValueError: if there are several of a split and none is preferred.
    """
    lists_by_split: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if not is_hidden(PurePath(path.name)) and (match := _LIST_NAME.fullmatch(path.stem)):
            lists_by_split.setdefault("train" if match[1] == "train" else "test", []).append(path)
    lists = {}
    for split, paths in lists_by_split.items():
        chosen = [path for path in paths if path.name in preferred] if len(paths) > 1 else paths
        if len(chosen) != 1:
            names = ", ".join(path.name for path in paths)
            raise ValueError(f"{folder} holds several lists for {split} ({names}); leave one of them there")
        lists[split] = chosen[0]
    return lists


def read_list(path: Path) -> list[Recording]:
    """The recordings that a list names, in its order, those of files that do not exist included, hidden files excluded.

    An entry has ``video_path`` or ``latent_path``, and may have ``action_path`` and ``label``. FAR writes paths from the root
    of its repository (datasets/ucf101/…), so leading folders that do not exist here are removed.

    Raises:
        ValueError: if the file is no JSON list of such entries.
    """
    try:
        entries = json.loads(read_utf8(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the list {path} cannot be read as JSON: {error}; restore it") from error
    if not isinstance(entries, list):
        raise ValueError(f"the list {path} must hold a JSON list of entries, got {type(entries).__name__}")
    recordings = []
    for number, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        written = {key: entry[key] for key in ("video_path", "latent_path", "action_path") if entry.get(key)}
        if not (written.keys() - {"action_path"}) or not all(_is_file_name(value) for value in written.values()):
            raise ValueError(f"the list {path}, entry {number}: needs the name of a file as video_path or latent_path")
        latent = "video_path" not in written
        name = written["latent_path" if latent else "video_path"]
        if is_hidden(PurePath(name)):
            continue
        frames = locate(name, path.parent)
        if "action_path" in written:
            actions = locate(written["action_path"], path.parent)
        else:
            actions = frames if frames.suffix.lower() == EPISODE_SUFFIX else None
        label = entry.get("label")
        if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
            raise ValueError(f"the list {path}, entry {number}: label must be a whole number from 0 on, got {short(label)}")
        recordings.append(Recording(frames, actions, latent, label=label))
    return recordings


def _is_file_name(value: object) -> bool:
    """Return whether a value of a list can be the name of a file on this system."""
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def locate(written: str, folder: Path) -> Path:
    """The first of a/b/c, b/c and c that is a file in ``folder``, or folder/a/b/c."""
    parts = Path(written).parts
    for start in range(len(parts)):
        candidate = folder.joinpath(*parts[start:])
        if os.path.isfile(candidate):  # false, not an error, for names that are too long
            return candidate
    return folder / written
