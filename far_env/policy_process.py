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
import weakref
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

import numpy as np

from far_env import policy_supervisor
from far_env.contract import ChunkDecision, FrameMeta, RolloutState, TemporalCachePlan
from far_env.errors import PolicyError

CALL_SECONDS = 10.0
LOAD_SECONDS = 120.0
MEMORY_GIB = 8.0
"""What a policy's process may allocate. Importing torch takes about 1 GiB of it."""
MAX_ANSWER_BYTES = 2**24
END_SECONDS = 10.0
"""How long the supervisor may take to end what a policy started."""
_SHOWN = 200
_PACKAGE = Path(__file__).parents[1]


class PolicyProcess:
    """One object of the file's class, called over a pipe in JSON lines; see `far_env.policy_worker`.

    Between this process and the policy's is a supervisor, which ends what the policy started; see `far_env.policy_supervisor`.

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
        self._unread = bytearray()
        self._reason = "the evaluation has ended it"
        theirs_in, self._questions = os.pipe()
        self._answers, theirs_out = os.pipe()
        self._status, theirs_status = os.pipe()
        theirs = (theirs_in, theirs_out, theirs_status)
        command = [sys.executable, "-P", policy_supervisor.__file__, str(os.getpid()), str(theirs_status), str(path)]
        inherited = os.environ.get("PYTHONPATH")
        self._supervisor = subprocess.Popen(
            [*command, str(theirs_in), str(theirs_out), str(int(memory_gib * 2**30))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=theirs,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGE), *([inherited] if inherited else [])])},
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._output = _Output(self._supervisor.stdout)
        ours = (self._questions, self._answers, self._status)
        self._end = weakref.finalize(self, _end, self._supervisor, self._output, ours)
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
        self._questions = self._answers = self._status = -1

    def printed(self) -> str | None:
        """One sentence with the beginning of what the policy printed; None if it printed nothing."""
        if not self._output.count:
            return None
        lines = self._output.start.decode(errors="replace").strip().splitlines()
        return f"policy {self.name} printed {self._output.count} bytes, which are not shown: {lines[0] if lines else ''!r} …"

    def _write(self, content: bytes) -> None:
        """Send a question. Raises PolicyError if the process does not read it in time."""
        if self._questions < 0:
            raise PolicyError(f"its process has been ended ({self._reason})")
        deadline = time.monotonic() + self._call_seconds
        while content:
            _, ready, _ = select.select([], [self._questions], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"took longer than {self._call_seconds:g} s, and was stopped")
            content = content[os.write(self._questions, content[: select.PIPE_BUF]) :]

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises PolicyError if it is an error, is too long, or does not arrive in time."""
        deadline, searched = time.monotonic() + seconds, 0
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            ready, _, _ = select.select([self._answers, self._status], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"took longer than {seconds:g} s, and was stopped")
            # The worker may have answered before it ended. It may also have ended while a child of it holds the pipe open.
            if not select.select([self._answers], [], [], 0)[0] or not (chunk := os.read(self._answers, 65536)):
                self._raise_ended()
            self._unread += chunk
            if len(self._unread) > MAX_ANSWER_BYTES:
                self._fail(f"answered more than {MAX_ANSWER_BYTES // 2**20} MiB, and was stopped")
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise PolicyError(" ".join(str(answer["error"]).split())[:500])
            answer["decisions"] = [(int(chunk_id), str(action)) for chunk_id, action in answer["decisions"]]
            return answer
        except (ValueError, KeyError, TypeError, RecursionError):
            self._fail(f"wrote {line[:_SHOWN]!r} over its answers")

    def _raise_ended(self) -> NoReturn:
        """Raise PolicyError with what the supervisor says about the end of the worker, for which it gets a second."""
        if not select.select([self._status], [], [], 1)[0]:
            self._fail("closed its answers")
        said = os.read(self._status, 1000).decode(errors="replace")
        self._fail(said or "ended the process that supervises it")

    def _fail(self, reason: str) -> NoReturn:
        """End the process and raise PolicyError."""
        self._reason = f"it {reason}"
        self.close()
        raise PolicyError(reason)


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


def _end(supervisor: subprocess.Popen, output: _Output, descriptors: tuple[int, ...]) -> None:
    """Let the supervisor end the policy and what it started, or do so if the policy has killed or stopped the supervisor."""
    supervisor.terminate()
    try:
        ended = supervisor.wait(END_SECONDS) == 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        for pid in [
            supervisor.pid,
            *(pid for pid, (_, session) in policy_supervisor.processes().items() if session == supervisor.pid),
        ]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        supervisor.wait()
    output.join()
    for descriptor in descriptors:
        os.close(descriptor)
