"""Commands of far-env in forked processes, which can be killed, and disks that are nearly full."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from far_env.cli import main

FILLER = "filler"


class Process:
    """A command of far-env in a forked process.

    Args:
        output: file for the standard output; the standard error stream is read through a pipe.
        before: called in the new process first.
    """

    def __init__(self, args: list[str], output: Path, before: Callable[[], None] | None = None) -> None:
        self._errors = b""
        self._pipe, pipe_end = os.pipe()
        self._start = time.perf_counter()
        self._pid = os.fork()
        if self._pid:
            os.close(pipe_end)
            os.set_blocking(self._pipe, False)
            return
        status = 70
        try:
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
            os.dup2(pipe_end, 2)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
            if before is not None:
                before()
            status = main(args)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 71
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def ended(self, seconds: float = 600.0) -> int | None:
        """Wait, and kill the process after so many seconds: the exit status, or None if it was killed."""
        while (found := os.waitpid(self._pid, os.WNOHANG))[0] == 0:
            self._read_errors()
            if time.perf_counter() - self._start >= seconds:
                os.kill(self._pid, 9)
                os.waitpid(self._pid, 0)
                os.close(self._pipe)
                return None
            time.sleep(0.001)
        self.seconds = time.perf_counter() - self._start
        self._read_errors()
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(found[1])

    def errors(self) -> str:
        """What it wrote to the standard error stream, once it has ended."""
        return self._errors.decode()

    def _read_errors(self) -> None:
        with suppress(BlockingIOError):
            while text := os.read(self._pipe, 65536):
                self._errors += text

    def refusal(self) -> list[str]:
        """What is wrong with the way it reported an error: it should be one sentence."""
        lines = [line for line in self.errors().splitlines() if "error" in line.lower()]
        if len(lines) != 1 or not lines[0].startswith("far-env: error: ") or "Traceback" in self.errors():
            return [f"no single sentence: {self.errors()[-1500:]!r}"]
        return []


@contextmanager
def limited_space(folder: Path, size: int, largest: int) -> Iterator[Callable[[], None] | None]:
    """Give the folder a disk of its own with so many bytes free; yields what a process has to call first.

    Where disks cannot be mounted, no file of the process can become larger than ``largest`` bytes.
    """
    mount = ["mount", "-t", "tmpfs", "-o", f"size={64 << 20}", "none", folder]
    if shutil.which(mount[0]) is None or subprocess.run(mount, capture_output=True).returncode != 0:
        yield lambda: _limit_files(largest)
        return
    try:
        space = os.statvfs(folder)
        with (folder / FILLER).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - size)
        yield None
    finally:
        subprocess.run(["umount", folder], check=True)


def free_space(folder: Path) -> None:
    """Empty the disk of `limited_space`."""
    (folder / FILLER).unlink(missing_ok=True)


def _limit_files(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
