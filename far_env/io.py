"""Files and folders that commands write: text whole or not at all, run folders, the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "FAR_ENV_CACHE"


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) under a temporary name, then rename it. Raises ValueError if that cannot be done."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # one per process, because several may write at once
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a value as indented JSON, as `write_text` does. Raises ValueError on NaN and infinity unless ``allow_nan``."""
    write_text(path, json.dumps(value, indent=2, allow_nan=allow_nan) + "\n")


def cache_dir() -> Path:
    """The folder for downloads and indexes, which can always be made again: $FAR_ENV_CACHE, by default ~/.cache/far_env.

    Raises:
        ValueError: if the variable is not set and there is no home folder.
    """
    configured = os.environ.get(CACHE_VARIABLE)
    try:
        return Path(configured).expanduser() if configured else Path.home() / ".cache" / "far_env"
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
