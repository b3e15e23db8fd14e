"""A policy file as a policy that runs in a separate process, where it cannot stop a benchmark or forge its output."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import astuple
from pathlib import Path
from types import TracebackType
from typing import IO

from far_env.contract import ChunkDecision, FrameMeta, RolloutState, TemporalCachePlan
from far_env.errors import PolicyError

_SHOWN = 200
_PACKAGE = Path(__file__).parents[2]


class PolicyProcess:
    """One object of the file's class, called over a pipe in JSON lines; see `far_env.evaluation.policy_worker`.

    To be used in a ``with`` statement, which ends the process. A call whose step is not larger than that of the call before
    begins a new clip.

    Args:
        path: the policy file.
        call_seconds: how long one call may take.
        load_seconds: how long the file may take to load.

    Attributes:
        name: the file.
        num_printed: bytes that the policy has printed to its standard output.

    Raises:
        PolicyError: if the file cannot be loaded, in time or at all; later, if a call raises, takes too long, ends the process
            or returns something that is not a plan.
    """

    def __init__(self, path: Path, *, call_seconds: float = 10.0, load_seconds: float = 120.0) -> None:
        if not hasattr(os, "killpg"):
            raise PolicyError("needs a process group, which Windows lacks; run policy files on Linux or macOS")
        self.name = str(path)
        self.num_printed = 0
        self._printed = b""
        self._call_seconds = call_seconds
        self._last_step: int | None = None
        self._unread = b""
        theirs_in, self._questions = os.pipe()
        self._answers, theirs_out = os.pipe()
        # -P: a file beside the policy must not pass for a module of the standard library.
        command = [sys.executable, "-P", "-m", "far_env.evaluation.policy_worker", str(path), str(theirs_in), str(theirs_out)]
        known = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(_PACKAGE), *([known] if known else [])])},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._reader = threading.Thread(target=self._swallow, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        try:
            self._receive(load_seconds)
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
        question = {
            "metas": [astuple(meta) for meta in chunk_meta_list],
            "state": astuple(rollout_state),
            "budget": budget_state,
            "new_clip": self._last_step is None or step <= self._last_step,
        }
        self._last_step = step
        try:
            _write(self._questions, (json.dumps(question) + "\n").encode())
        except BrokenPipeError:
            self._raise_ended()
        decisions = self._receive(self._call_seconds)
        return TemporalCachePlan([ChunkDecision(chunk_id, action) for chunk_id, action in decisions])

    def close(self) -> None:
        """End the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=1)
        for descriptor in (self._questions, self._answers):
            if descriptor >= 0:
                os.close(descriptor)
        self._questions = self._answers = -1

    def printed(self) -> str | None:
        """One sentence with the beginning of what the policy printed; None if it printed nothing."""
        if not self.num_printed:
            return None
        start = self._printed.decode(errors="replace").strip().splitlines()
        return f"policy {self.name} printed {self.num_printed} bytes, which are not shown: {start[0] if start else ''!r} …"

    def _swallow(self, output: IO[bytes]) -> None:
        with output:
            while chunk := output.read1(65536):
                self.num_printed += len(chunk)
                self._printed = (self._printed + chunk)[:_SHOWN]

    def _receive(self, seconds: float) -> list[tuple[int, str]]:
        """The decisions of the next answer. Raises PolicyError if the answer is an error, or does not arrive in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PolicyError(f"took longer than {seconds:g} s, and was stopped")
            chunk = os.read(self._answers, 65536)
            if not chunk:
                self._raise_ended()
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
            if "error" in answer:
                raise PolicyError(" ".join(str(answer["error"]).split())[:500])
            return [(int(chunk_id), str(action)) for chunk_id, action in answer["decisions"]]
        except (ValueError, KeyError, TypeError) as error:
            raise PolicyError(f"wrote {line[:_SHOWN]!r} over its answers") from error

    def _raise_ended(self) -> None:
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            raise PolicyError("closed its answers") from None
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        raise PolicyError(f"ended its process with {how}")


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
