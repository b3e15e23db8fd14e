"""The files of a folder in the order in which the public benchmark takes its clips from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from far_env.clips.recordings import Recording, find_recordings, locate
from far_env.io import read_json, read_utf8, write_json

FILE_ORDER_REMEDY = "give a text file with the path of one video per line"
VIDEO_SUBFOLDER = "video"
"""Where the benchmark searches UCF-101 if the folder has this subfolder."""


def benchmark_recordings(folder: Path, suffixes: Sequence[str]) -> tuple[list[Recording], bool]:
    """The recordings that the benchmark finds in a folder, sorted, those of the first suffix first.

    Its own order is that of the file system. Hidden files are left out.

    Args:
        suffixes: of the files that it reads, compared as they are written.

    Returns:
        These and True; or, where the benchmark would find nothing, all recordings of the folder and False.

    Raises:
        ValueError: as `find_recordings`.
    """
    recordings = find_recordings(folder)
    found = [recording for suffix in suffixes for recording in recordings if recording.path.suffix == suffix]
    return (found, True) if found else (recordings, False)


def listed_recordings(folder: Path, order: Path) -> list[Recording]:
    """The recordings that a list names, in its order, those of files that do not exist included.

    Args:
        order: text with a path per line, relative to the folder or to its subfolder video; of other paths, such as those of
            another machine, leading folders that do not exist here are removed.

    Raises:
        ValueError: if the list cannot be read, names nothing, or names a file twice.
    """
    try:
        lines = [line.strip() for line in read_utf8(order).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"the list {order} cannot be read: {reason}; {FILE_ORDER_REMEDY}") from error
    if not lines or any("\0" in line for line in lines):
        raise ValueError(f"the list {order} names no file; {FILE_ORDER_REMEDY}")
    known = {recording.path: recording for recording in find_recordings(folder)}
    paths = []
    for line in lines:
        places = [locate(line, parent) for parent in (folder, folder / VIDEO_SUBFOLDER)]
        paths.append(next((path for path in places if path.is_file()), places[0]))
    if len(set(paths)) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise ValueError(f"the list {order} names {twice} twice; {FILE_ORDER_REMEDY}")
    return [known.get(path, Recording(path)) for path in paths]


def write_clip_list(path: Path, folder: Path, workload: str, num_frames: int, clips: Iterable[tuple[Path, int]]) -> None:
    """Write which files clips come from, and from which frame: what `excluded_files` reads. Raises ValueError if it fails."""
    entries = [{"path": _relative(file, folder), "start": start} for file, start in clips]
    write_json(path, {"workload": workload, "folder": str(folder.resolve()), "num_frames": num_frames, "clips": entries})


def excluded_files(path: Path, folder: Path) -> set[Path]:
    """The files, in ``folder``, of a list that `write_clip_list` wrote. Raises ValueError if it is none."""
    remedy = "give a file that far-env benchmark --list-clips wrote"
    content = read_json(path, remedy)
    clips = content.get("clips") if isinstance(content, dict) else None
    if not isinstance(clips, list) or not all(isinstance(clip, dict) and isinstance(clip.get("path"), str) for clip in clips):
        raise ValueError(f"{path} holds no list of clips; {remedy}")
    return {(folder / clip["path"]).resolve() for clip in clips}


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
