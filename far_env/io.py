"""Files and folders that commands write: whole or not at all, and by one process at a time; run folders, the cache."""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from far_env.errors import first_line

CACHE_VARIABLE = "FAR_ENV_CACHE"
LOCK_FILE = ".lock"


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Error numbers of a full disk, of missing rights and of a broken disk."""


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all. Raises ValueError if that cannot be done."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` for the block to write to; at the end of the block that file replaces ``path``.

    It is removed after an error, and so are those that killed processes left behind while they wrote ``path``.

    Raises:
        ValueError: if the file cannot be written.
    """
    _remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # one per process, should several write at once
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or missing rights, met by what other libraries write into ``folder``, into a ValueError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise ValueError(disk_error(error, str(folder))) from error


def disk_error(error: OSError, written: str) -> str:
    """The sentence for one of `DISK_ERRORS`: of the file that it names, or else of what was being written."""
    return f"cannot write {written}: {error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from locking the folder during the block. A killed process leaves no lock.

    Raises:
        ValueError: if another process has locked it, or the lock's file cannot be written.
    """
    try:
        file = (folder / LOCK_FILE).open("ab")
    except OSError as error:
        raise ValueError(f"cannot write {folder / LOCK_FILE}: {error.strerror}") from error
    with file:
        lock(file, folder)
        yield


def lock(file: BinaryIO, folder: Path, holder: str = "process") -> None:
    """Lock an open file of a folder until it is closed, which the end of the process does in any case.

    Where the system (Windows) or the file system has no such locks, nothing happens.

    Raises:
        ValueError: if another process has locked it.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another {holder} is writing {folder}; wait for it or choose another folder") from error
    except OSError:
        return


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a value as indented JSON, as `write_text` does. Raises ValueError on NaN and infinity unless ``allow_nan``."""
    write_text(path, json.dumps(value, indent=2, allow_nan=allow_nan) + "\n")


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises OSError and UnicodeDecodeError as `Path.read_text`."""
    return path.read_text(encoding="utf-8").removeprefix("\ufeff")


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file (UTF-8, with or without a byte order mark).

    Raises:
        ValueError: one sentence that names the file, the reason and the remedy, if it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_utf8(path))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); {remedy}") from error


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
        probe.unlink(missing_ok=True)  # another process may have removed it
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be written: {error.strerror}; choose another one") from error
    return folder


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of ``path`` whose processes have ended."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        process = leftover.name.removeprefix(f"{path.name}.").removesuffix(".part")
        if process.isdecimal() and not _runs(int(process)):
            with suppress(OSError):
                leftover.unlink()


def _runs(process: int) -> bool:
    """Whether a process of this number exists; True where that cannot be known."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
