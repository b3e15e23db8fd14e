"""Files and folders that commands write: text whole or not at all, run folders, the cache."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "FAR_ENV_CACHE_DIR"


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) under a temporary name, then rename it. Raises ValueError if that cannot be done."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # of its own, should several processes write at once
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def cache_dir() -> Path:
    """Where files go that can be made or fetched again: the folder of FAR_ENV_CACHE_DIR, else ~/.cache/far_env."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "far_env"


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
