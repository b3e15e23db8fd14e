"""Files and folders that commands write: text whole or not at all, run folders, the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from far_env.errors import first_line

CACHE_VARIABLE = "FAR_ENV_CACHE"


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) under a temporary name, then rename it. Raises ValueError if that cannot be done."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # of its own, should several processes write at once
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file (UTF-8, with or without a byte order mark).

    Raises:
        ValueError: one sentence that names the file, the reason and the remedy, if it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); {remedy}") from error


def cache_dir() -> Path:
    """The folder for downloads and indexes, which can always be made again: $FAR_ENV_CACHE, by default ~/.cache/far_env.

    Raises:
        ValueError: if the variable is not set and there is no home folder.
    """
    given = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "far_env"
    except RuntimeError as error:
        raise ValueError(f"there is no home folder for the cache; set {CACHE_VARIABLE} to a writable folder") from error


def make_run_dir(path: str | os.PathLike) -> Path:
    """Create a folder for results. Raises ValueError if it cannot be created or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"the run folder {folder} cannot be written: {error.strerror}; choose another one") from error
    return folder
