"""What the distribution of tasks costs: actors that only sleep, as long as a rollout on a GPU would take.

python -m benchmarks.actors --actors 8,32 --seconds 1

With no cost, n tasks of s seconds on a actors take n / a · s seconds. What is above that is the driver's work and Ray's.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.sleeping import SleepingActor
from far_env.cli import run_guarded
from far_env.cli.options import split_list, whole_number
from far_env.config import parse
from far_env.distributed.cluster import ActorSettings, connected
from far_env.distributed.pool import ActorPool, Task


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    actors: str = "8,32"
    """Numbers of actors, one measurement each, separated by commas."""
    seconds: float = 1.0
    """Of each task."""
    tasks: int = 20
    """Per actor."""
    address: str | None = None
    """A running Ray cluster; by default one is started on this machine."""


def measure(num_actors: int, options: Options) -> tuple[float, float]:
    """Per task of one actor, the seconds above those of sleeping; and per task of all, those of this process's processor."""
    started: list[Any] = []
    with connected(ActorSettings(num_actors, options.address)) as ray:
        pool = ActorPool(ray, SleepingActor, (options.seconds,), ActorSettings(num_actors), started.append)
        while len(started) < num_actors:
            for _ in pool.completed([Task((i,), i, "a first task") for i in range(num_actors)]):
                pass
        tasks = [Task((i,), i, "a task") for i in range(options.tasks * num_actors)]
        start, cpu = time.perf_counter(), time.process_time()
        done = sum(1 for _ in pool.completed(tasks))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert done == len(tasks)
    return (seconds - options.tasks * options.seconds) / options.tasks, cpu / done


def run() -> None:
    """Run the benchmark."""
    options = parse(Options, sys.argv[1:], "python -m benchmarks.actors", __doc__ or "")
    numbers = [whole_number(text, "actors") for text in split_list(options.actors, "actors", "number of actors")]
    for number in numbers:
        extra, cpu = measure(number, options)
        cost = f"{1e3 * extra:.0f} ms above {options.seconds:g} s"
        print(f"{number} actors: {cost}, {1e3 * cpu:.1f} ms of the driver's processor a task", flush=True)


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.actors", run))
