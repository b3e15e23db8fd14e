"""Policy files in a separate process, where they cannot stop an evaluation, exhaust its memory or forge its output."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from far_env.contract import ChunkDecision, FrameMeta, RolloutState, TemporalCachePlan
from far_env.errors import PolicyError

CALL_SECONDS = 10.0
LOAD_SECONDS = 120.0
MEMORY_GIB = 8.0
"""What a policy's process may allocate. Importing torch takes about 1 GiB of it."""
MAX_ANSWER_BYTES = 2**24
MARK = "FAR_ENV_POLICY_PROCESS"
"""Environment variable by which every process that a policy started is found and ended with it."""
_SHOWN = 200
_PACKAGE = Path(__file__).parents[1]


class PolicyProcess:
    """One object of the file's class, called over a pipe in JSON lines; see `far_env.policy_worker`.

    To be used in a ``with`` statement, which ends the process. A call whose step is not larger than that of the call before
    begins a new clip. For copies of the policy, one per clip, see `IsolatedPolicy`.

    Args:
        path: the policy file.
        call_seconds: how long one call may take.
        load_seconds: how long the file may take to load.
        memory_gib: how much memory the process may allocate, where the system can limit it.

    Attributes:
        name: the file.
        signals: names of `far_env.contract.SIGNALS` that the policy declares.

    Raises:
        PolicyError: if the file cannot be loaded, in time or at all; later, if a call raises, takes too long, ends the process
            or returns something that is not a plan.
    """

    def __init__(
        self,
        path: Path,
        *,
        call_seconds: float = CALL_SECONDS,
        load_seconds: float = LOAD_SECONDS,
        memory_gib: float = MEMORY_GIB,
    ) -> None:
        if not hasattr(os, "killpg"):
            raise PolicyError("policy files need a POSIX system (Linux or macOS), where they can run in a separate process")
        self.name = str(path)
        self.signals: tuple[str, ...] = ()
        self._call_seconds = call_seconds
        self._last_step: int | None = None
        self._unread = b""
        theirs_in, self._questions = os.pipe()
        self._answers, theirs_out = os.pipe()
        # -P: a file beside the policy must not pass for a module of the standard library.
        command = [sys.executable, "-P", "-m", "far_env.policy_worker", str(path), str(theirs_in), str(theirs_out)]
        inherited = os.environ.get("PYTHONPATH")
        mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [*command, str(int(memory_gib * 2**30))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
            env=os.environ | {MARK: mark, "PYTHONPATH": os.pathsep.join([str(_PACKAGE), *([inherited] if inherited else [])])},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._output = _Output(self._process.stdout)
        self._end = weakref.finalize(self, _end, self._process, mark, self._output, (self._questions, self._answers))
        try:
            answer = self._receive(load_seconds)
            self.signals = tuple(map(str, answer.get("signals", ())))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PolicyProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Call the policy in its process."""
        step = rollout_state.step
        new_clip = self._last_step is None or step <= self._last_step
        self._last_step = step
        return self.ask(chunk_meta_list, rollout_state, budget_state, new_clip=new_clip)

    def ask(
        self,
        chunk_meta_list: list[FrameMeta],
        rollout_state: RolloutState,
        budget_state: dict[str, float],
        **question: Any,
    ) -> TemporalCachePlan:
        """Send one call with further keys of the question, see `far_env.policy_worker`, and return the plan."""
        question["metas"] = [astuple(meta) for meta in chunk_meta_list]
        question["state"] = [rollout_state.step, rollout_state.budget_capacity_mb, rollout_state.total_steps]
        question["budget"] = budget_state
        try:
            self._write((json.dumps(question) + "\n").encode())
        except BrokenPipeError:
            self._raise_ended()
        answer = self._receive(self._call_seconds)
        return TemporalCachePlan([ChunkDecision(chunk_id, action) for chunk_id, action in answer["decisions"]])

    def close(self) -> None:
        """End the process and everything that it started."""
        self._end()
        self._questions = self._answers = -1

    @property
    def num_printed(self) -> int:
        """Bytes that the policy has printed."""
        return self._output.count

    def printed(self) -> str | None:
        """One sentence with the beginning of what the policy printed; None if it printed nothing."""
        if not self._output.count:
            return None
        lines = self._output.start.decode(errors="replace").strip().splitlines()
        return f"policy {self.name} printed {self._output.count} bytes, which are not shown: {lines[0] if lines else ''!r} …"

    def _write(self, content: bytes) -> None:
        """Send a question. Raises PolicyError if the process does not read it in time."""
        if self._questions < 0:
            raise PolicyError("its process has been ended")
        deadline = time.monotonic() + self._call_seconds
        while content:
            _, ready, _ = select.select([], [self._questions], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._raise_late(self._call_seconds)
            content = content[os.write(self._questions, content[: select.PIPE_BUF]) :]

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises PolicyError if it is an error, is too long, or does not arrive in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._raise_late(seconds)
            chunk = os.read(self._answers, 65536)
            if not chunk:
                self._raise_ended()
            self._unread += chunk
            if len(self._unread) > MAX_ANSWER_BYTES:
                self.close()
                raise PolicyError(f"answered more than {MAX_ANSWER_BYTES // 2**20} MiB, and was stopped")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise PolicyError(" ".join(str(answer["error"]).split())[:500])
            answer["decisions"] = [(int(chunk_id), str(action)) for chunk_id, action in answer["decisions"]]
            return answer
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PolicyError(f"wrote {line[:_SHOWN]!r} over its answers") from error

    def _raise_late(self, seconds: float) -> None:
        self.close()
        raise PolicyError(f"took longer than {seconds:g} s, and was stopped")

    def _raise_ended(self) -> None:
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            raise PolicyError("closed its answers") from None
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise PolicyError(f"ended its process with {how}")


class IsolatedPolicy:
    """A policy file as a policy: one process, in which every deep copy of this object is a copy of the policy.

    `far_env.rollout.play.play` copies a policy for each clip; so the clips of a batch do not share its memory. Before each call
    the generators of `random`, NumPy and torch are seeded by the clip's noise seed and the step, so that results do not depend
    on the batch.

    Args:
        process: runs the file.

    Attributes:
        name: the file.
        signals: what the policy declares.
    """

    def __init__(self, process: PolicyProcess) -> None:
        self.name, self.signals = process.name, process.signals
        self._process = process
        self._numbers = itertools.count(1)
        self._forgotten: list[int] = []
        self._copy, self._seed = 0, 0

    def __deepcopy__(self, memo: dict) -> IsolatedPolicy:
        copied = object.__new__(IsolatedPolicy)
        vars(copied).update(vars(self), _copy=next(self._numbers))
        weakref.finalize(copied, self._forgotten.append, copied._copy)
        return copied

    def begin_clip(self, seed: int) -> None:
        """Remember the clip's noise seed; a policy with a method of this name receives it before its first call."""
        self._seed = int(seed)

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Call this copy of the policy in its process. Raises PolicyError as `PolicyProcess`, and on a malformed plan."""
        signals = {
            name: [values.shape, base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()]
            for name, values in getattr(rollout_state, "signals", {}).items()
        }
        forget = self._forgotten.copy()
        del self._forgotten[: len(forget)]
        copy = {"copy": self._copy, "seed": self._seed, "signals": signals, "forget": forget}
        return self._process.ask(chunk_meta_list, rollout_state, budget_state, **copy)


class _Output:
    """Reads what a process prints, counts it and keeps its beginning."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.count, self.start = 0, b""
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while chunk := stream.read1(65536):
                self.count += len(chunk)
                self.start = (self.start + chunk)[:_SHOWN]

    def join(self) -> None:
        """Wait a second at most for what was printed last."""
        self._thread.join(timeout=1)


def _end(process: subprocess.Popen, mark: str, output: _Output, descriptors: tuple[int, ...]) -> None:
    """Kill a policy's process, its process group, and processes that left the group but carry its mark."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    output.join()
    for descriptor in descriptors:
        os.close(descriptor)


def _marked(mark: str) -> list[int]:
    """Processes that inherited a mark in their environment, where the system lists it (Linux)."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
