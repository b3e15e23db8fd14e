"""The process between an evaluation and a policy file: starts the policy's worker, and ends everything that the policy started.

    python -P far_env/policy_supervisor.py EVALUATION_PID STATUS_FD FILE READ_FD WRITE_FD MEMORY_BYTES

The last four are those of `far_env.policy_worker`. Once the worker has ended, how it ended goes to STATUS_FD. Then, or on
SIGTERM, or once the evaluation has ended, every process that the policy started is killed. On Linux they are found in any
session and environment, because orphans become children of this process; elsewhere only the worker's group is killed.

It is started as a file and imports no other module of the package, so that it takes little time and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

MAX_PROCESSES = 256
"""How many processes a policy may have at once."""
_SECONDS = 0.5
_PR_SET_CHILD_SUBREAPER = 36


def main(evaluation: int, status_fd: int, read_fd: int, write_fd: int, worker_arguments: list[str]) -> None:
    """Start the worker, and wait until it, the evaluation, or this process is to end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(status_fd, False)
    # -P: a file beside the policy must not pass for a module of the standard library.
    command = [sys.executable, "-P", "-m", "far_env.policy_worker", *worker_arguments]
    # A process group of its own: a policy that kills its group must leave this process alive.
    worker = os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)
    # Whoever holds an end of these keeps the evaluation from seeing the other end close.
    os.close(read_fd)
    os.close(write_fd)
    reason = _watch(worker, evaluation)
    if reason:
        with contextlib.suppress(OSError):
            os.write(status_fd, reason.encode())
    _end_everything(worker)


def processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process, by its number; empty where the system does not list them in files (not Linux)."""
    found = {}
    numbers = [name for name in os.listdir("/proc") if name.isdigit()] if sys.platform == "linux" else []
    for number in numbers:
        with contextlib.suppress(OSError), open(f"/proc/{number}/stat", "rb") as file:
            # The name comes second, in parentheses, and may hold anything.
            fields = file.read().rpartition(b")")[2].split()
            found[int(number)] = int(fields[1]), int(fields[3])
    return found


def _watch(worker: int, evaluation: int) -> str:
    """Wait; returns why the worker has to end or has ended, and nothing if the evaluation is the reason."""
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signals, counted = b"", time.monotonic()
    while signal.SIGTERM not in signals and os.getppid() == evaluation:
        if (status := _reap().get(worker)) is not None:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            return f"ended its process with {how}"
        if time.monotonic() - counted >= _SECONDS:
            if len(_descendants()) > MAX_PROCESSES:
                return f"started more than {MAX_PROCESSES} processes, and was stopped"
            counted = time.monotonic()
        ready, _, _ = select.select([awake], [], [], _SECONDS)
        signals = os.read(awake, 4096) if ready else b""
    return ""


def _reap() -> dict[int, int]:
    """Exit status of the children that have ended, by their number; orphans that were adopted are among them."""
    statuses = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            statuses[found[0]] = os.waitstatus_to_exitcode(found[1])
    return statuses


def _end_everything(worker: int) -> None:
    """Kill the worker's group and all descendants, again until there are none, because they may start others meanwhile."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _descendants():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.005)


def _descendants() -> set[int]:
    """Children of this process, their children, and so on, where the system lists them."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes().items():
        children.setdefault(parent, []).append(pid)
    found, pending = set(), [os.getpid()]
    while pending:
        new = children.get(pending.pop(), [])
        found.update(new)
        pending.extend(new)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[3:])
