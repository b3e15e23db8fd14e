"""Drills with policy files that do harm: evaluations go on, the benchmark ends in one sentence, and no process is left.

OMP_NUM_THREADS=1 python -m benchmarks.drills.policies [--attempts 20] [loops "forks without end" …]

Each policy is evaluated beside one that is sound, whose numbers must be those of an evaluation without it; it is given to the
benchmark; and its evaluation is killed at a random moment, after which the policy's processes have to end as well.
"""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.drills.process import Process
from far_env.cli import run_guarded
from far_env.errors import unknown_name
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.weights import save_host
from tests.conftest import TINY_DCAE, TINY_FAR, randomise

LATE = "took longer than 1 s, and was stopped"
LIMIT = 1.0
"""Seconds that one call may take, of a policy that exceeds any limit."""
OTHER_LIMIT = 120.0
"""Seconds that one call of the others may take: whatever ends them must not wait for that."""
SLACK = 30.0
"""Seconds that an attempt may take beyond the limit: two processes start, and rollouts of the tiny host are played."""
GRACE = 10.0
"""Seconds within which a policy's processes end after their evaluation has ended or was killed."""
_FILE = """
import os, signal, socket, sys, time

def tell():
    with open({told!r}, "a") as file:
        file.write(f"{{os.getpid()}}\\n")

tell()
{load}

class Hostile:
    def build_temporal_cache_plan(self, metas, state, budget):
        {call}
        newest = len(metas) - int(budget["max_frames"])
        return TemporalCachePlan([ChunkDecision(m.chunk_id, "keep" if m.chunk_id >= newest else "drop") for m in metas])
"""


@dataclass(frozen=True)
class Hostile:
    """A policy that does harm.

    Attributes:
        call: what it does when it is called.
        says: a part of the sentence that reports it; None if it is to be played like any other.
        load: what it does when its file is loaded.
    """

    call: str
    says: str | None
    load: str = ""

    @property
    def limit(self) -> float:
        """Seconds that one of its calls may take."""
        return LIMIT if self.says == LATE else OTHER_LIMIT

    def write(self, path: Path, told: Path) -> Path:
        """Make the policy file; its processes write their numbers to ``told``."""
        text = _FILE.format(told=str(told), load=self.load, call=self.call.replace("\n", "\n        "))
        path.write_text(text, encoding="utf-8")
        return path


_FORK_TWICE = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        tell()
        os.execve("/bin/sleep", ["sleep", "600"], {})
    os._exit(0)
os.wait()
time.sleep(0.1)
os._exit(7)
"""
HOSTILE = {
    "loops": Hostile("while True: pass", LATE),
    "sleeps": Hostile("time.sleep(600)", LATE),
    "stops itself": Hostile("os.kill(os.getpid(), signal.SIGSTOP)", LATE),
    "waits for the network": Hostile(
        "server = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(server.getsockname()).recv(1)",
        LATE,
    ),
    "raises": Hostile("raise RuntimeError('enough\\nof this')", "raised RuntimeError: enough of this"),
    "raises SystemExit": Hostile("sys.exit('enough')", "raised SystemExit: enough"),
    "raises SystemExit when loaded": Hostile("pass", "cannot be loaded: SystemExit: enough", load="sys.exit('enough')"),
    "exits": Hostile("os._exit(3)", "ended its process with status 3"),
    "exits when loaded": Hostile("pass", "ended its process with status 4", load="os._exit(4)"),
    "kills itself": Hostile("os.kill(os.getpid(), signal.SIGKILL)", "ended its process with signal SIGKILL"),
    "kills its process group": Hostile("os.killpg(0, signal.SIGKILL)", "ended its process with signal SIGKILL"),
    "kills its supervisor": Hostile(
        "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)", "ended the process that supervises it"
    ),
    "forks": Hostile(
        "if os.fork() == 0:\n    tell()\n    time.sleep(600)\ntime.sleep(0.1)\nraise ValueError('forked')", "forked"
    ),
    "forks and exits": Hostile(
        "if os.fork() == 0:\n    tell()\n    time.sleep(600)\ntime.sleep(0.1)\nos._exit(7)", "ended its process with status 7"
    ),
    "forks twice, clears its environment": Hostile(_FORK_TWICE, "ended its process with status 7"),
    "forks without end": Hostile(
        "for _ in range(400):\n    if os.fork() == 0:\n        tell()\n        time.sleep(600)\ntime.sleep(600)",
        "started more than",
    ),
    "fills memory": Hostile("bytearray(40 * 2**30)", "raised MemoryError"),
    "floods the standard output": Hostile("print('x' * 10**6)\nprint('y' * 10**6, file=sys.stderr)", None),
    "writes over its answers": Hostile("os.write(int(sys.argv[3]), b'nonsense\\n')", "over its answers"),
    "floods its answers": Hostile("os.write(int(sys.argv[3]), b'x' * 2**25)", "answered more than 16 MiB"),
    "closes all files": Hostile("os.closerange(0, 99)\ntime.sleep(600)", "closed its answers"),
}


def running(told: Path, seconds: float = GRACE) -> list[int]:
    """Processes that a policy started and that still run after so many seconds at most."""
    deadline = time.monotonic() + seconds
    while True:
        numbers = [int(number) for number in told.read_text(encoding="utf-8").split()] if told.exists() else []
        alive = [number for number in numbers if _runs(number)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # What has ended and was not waited for is a zombie.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return sys.platform != "linux"


@dataclass(frozen=True)
class Options:
    """Which policies, and how many attempts."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of the policies; all by default."""
    attempts: int = 20
    """Of each kind with each policy."""
    seed: int = 0


class Drills:
    """Attempts in a folder.

    Args:
        place: an empty folder.
        host: folder of a host.
    """

    def __init__(self, place: Path, host: Path) -> None:
        self.place = place
        self.table, self.told, self.policy = place / "table.json", place / "told", place / "policy.py"
        common = ["--device", "cpu", "--clips", "1"]
        self.evaluate = ["evaluate", *common, "--host", str(host), "--metrics", "psnr", "--json", str(self.table)]
        self.benchmark = ["benchmark", *common, "--host", "embedded", "--policy", str(self.policy)]
        process = self._run([*self.evaluate, "--policies", "recent_fill"])[1]
        if process.ended() != 0:
            raise RuntimeError(process.errors())
        self.expected = self._scores()

    def evaluation(self, hostile: Hostile) -> tuple[float, list[str]]:
        """Evaluate it beside a sound policy: seconds, and problems."""
        start, process = self._run([*self.evaluate, "--policies", f"{self.policy},recent_fill"], hostile)
        status = process.ended()
        seconds = time.perf_counter() - start
        problems = self._problems(hostile, process, status, seconds)
        if not problems and self._scores() != self.expected:
            problems.append("the sound policy has other numbers")
        if not problems and (str(self.policy) in json.loads(self.table.read_text(encoding="utf-8"))["policies"]) != (
            hostile.says is None
        ):
            problems.append("a row is missing or superfluous")
        return seconds, problems

    def benchmarked(self, hostile: Hostile) -> tuple[float, list[str]]:
        """Give it to the benchmark: seconds, and problems."""
        start, process = self._run(self.benchmark, hostile)
        status = process.ended()
        seconds = time.perf_counter() - start
        return seconds, self._problems(hostile, process, status, seconds)

    def killed(self, hostile: Hostile, moment: float) -> tuple[float, list[str]]:
        """Kill the evaluation so many seconds after the policy started: seconds until no process is left, and problems."""
        begin, process = self._run([*self.evaluate, "--policies", f"{self.policy},recent_fill"], hostile)
        while not self.told.exists() and time.perf_counter() - begin < SLACK:
            time.sleep(0.01)
        process.ended(time.perf_counter() - begin + moment)
        start = time.perf_counter()
        problems = ["processes are left"] if running(self.told) else []
        return time.perf_counter() - start, problems

    def _run(self, command: list[str], hostile: Hostile | None = None) -> tuple[float, Process]:
        self.told.unlink(missing_ok=True)
        self.table.unlink(missing_ok=True)
        if hostile is not None:
            hostile.write(self.policy, self.told)
            command = [*command, "--policy-seconds", str(hostile.limit)]
        return time.perf_counter(), Process(command, Path(os.devnull))

    def _problems(self, hostile: Hostile, process: Process, status: int | None, seconds: float) -> list[str]:
        expected, problems = 0 if hostile.says is None else 2, []
        if status != expected:
            problems.append(f"status {status}, not {expected}: {process.errors()[-500:]!r}")
        elif hostile.says is not None:
            if "Traceback" in process.errors() or process.errors().count("far-env: error: ") != 1:
                problems.append(f"no single sentence: {process.errors()[-500:]!r}")
            if hostile.says not in process.errors().splitlines()[-1]:
                problems.append(f"another reason: {process.errors()[-500:]!r}")
        if seconds > LIMIT + SLACK:
            problems.append(f"took {seconds:.1f} s")
        if running(self.told):
            problems.append("processes are left")
        return problems

    def _scores(self) -> object:
        return json.loads(self.table.read_text(encoding="utf-8"))["policies"]["recent_fill"]["psnr"]


def run() -> int:
    """Run the drills and print their table; the status is 1 if anything was lost."""
    options = tyro.cli(Options, description=__doc__)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # forked processes cannot use the threads of this one
    for name in options.names:
        if name not in HOSTILE:
            raise ValueError(unknown_name("policy", name, list(HOSTILE)))
    rng, lost = random.Random(options.seed), []
    print(f"{'policy that':<38}{'drill':<12}{'tried':>6}{'survived':>10}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        host = Path(temporary) / "host"
        transformer, autoencoder = FAR(**TINY_FAR), Autoencoder(**TINY_DCAE, scaling_factor=0.8)
        randomise(transformer, 1)
        randomise(autoencoder, 2)
        configs = {"transformer": TINY_FAR, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
        save_host(host, transformer, autoencoder, configs, frame_size=64, num_steps=2)
        drills = Drills(Path(temporary), host)
        kinds: dict[str, Callable[[Hostile], tuple[float, list[str]]]] = {
            "evaluate": drills.evaluation,
            "benchmark": drills.benchmarked,
            "SIGKILL": lambda hostile: drills.killed(hostile, rng.uniform(0, 1)),
        }
        for name in options.names or HOSTILE:
            for kind, attempt in kinds.items():
                outcomes = [attempt(HOSTILE[name]) for _ in range(options.attempts)]
                problems = [f"{name}, {kind}: {found[0]}" for _, found in outcomes if found]
                median = statistics.median(seconds for seconds, _ in outcomes)
                survived = options.attempts - len(problems)
                print(f"{name:<38}{kind:<12}{options.attempts:>6}{survived:>10}{median:>9.2f}", flush=True)
                lost += problems
    if lost:
        print("\n" + "\n".join(lost[:20]))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.drills.policies", run))
