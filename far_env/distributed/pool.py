"""Actors that work off a list of tasks; the tasks of an actor that is lost are given to others.

A task is lost with its actor or its machine at most once per loss: it is done again by another actor, and its result is handed
out once, because only this process collects results.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from far_env.distributed.cluster import ActorSettings
from far_env.errors import ClipIdError, MetricUnavailable, PolicyError, first_line
from far_env.provenance import versions

MAX_LOSSES = 3
"""Actors that a task may lose, or that may fail to start one after the other, before the work is given up."""
WAIT_SECONDS = 1.0
WARN_SECONDS = 15.0
"""After so long without a single actor a remark is printed."""
_OF_USERS = (ValueError, PolicyError, ClipIdError, MetricUnavailable)


@dataclass(frozen=True, eq=False)
class Task:
    """Arguments of an actor's method ``work``, and the name of what it shares with others.

    Attributes:
        arguments: pickled, so they are plain values or small arrays.
        group: tasks of one group are given to the same actor as long as the others have work, because they share something.
        name: in messages.
    """

    arguments: tuple
    group: Hashable
    name: str


class ActorPool:
    """Actors of one class on a cluster. Their method ``prepare`` returns facts, ``work`` does a task.

    Args:
        ray: Ray's module, connected.
        actor_class: a plain class, in a module that the machines of the cluster can import.
        arguments: of its constructor.
        check: receives the facts of every actor that has started; raises ValueError where it may not work.
        remark: receives sentences about losses.
    """

    def __init__(
        self,
        ray: ModuleType,
        actor_class: type,
        arguments: tuple,
        settings: ActorSettings,
        check: Callable[[Mapping[str, Any]], None],
        remark: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
    ) -> None:
        self._ray, self._arguments, self._settings, self._check, self._remark = ray, arguments, settings, check, remark
        options = {"num_cpus": settings.cpus_per_actor, "num_gpus": settings.gpus_per_actor, "max_restarts": 0}
        self._class = ray.remote(actor_class).options(**options)
        self._starting: dict[Any, Any] = {}
        self._failed_starts = 0
        for _ in range(settings.actors):
            self._start()

    def completed(self, tasks: Sequence[Task], skip: Callable[[Task], bool] = lambda task: False) -> Iterator[tuple[Task, Any]]:
        """Do the tasks and hand out each with its result, in the order in which they end.

        Args:
            skip: asked before a task is given to an actor; True leaves it out.

        Raises:
            ValueError, PolicyError and other errors of users, as the actor raised them; ValueError if actors do not start or a
            task loses `MAX_LOSSES` of them.
        """
        waiting, losses = _Queue(tasks, skip), dict.fromkeys(tasks, 0)
        working: dict[Any, tuple[Any, Task]] = {}
        idle: list[tuple[Any, Hashable]] = []
        last_actor, warned = time.monotonic(), False
        while waiting or working:
            still_idle = []
            for actor, group in idle:
                task = waiting.pop(group)
                if task is None:
                    still_idle.append((actor, group))
                else:
                    working[actor.work.remote(*task.arguments)] = actor, task
            idle = still_idle
            if not waiting and not working:
                break
            if working or idle:
                last_actor, warned = time.monotonic(), False
            elif not warned and time.monotonic() - last_actor > WARN_SECONDS:
                warned = True
                self._remark("no actor is left; waiting for the cluster to have CPU cores or GPUs for one")
            ready, _ = self._ray.wait([*working, *self._starting], num_returns=1, timeout=WAIT_SECONDS)
            for reference in ready:
                if reference in self._starting:
                    actor = self._started(reference)
                    if actor is not None:
                        idle.append((actor, None))
                    continue
                actor, task = working.pop(reference)
                try:
                    result = self._ray.get(reference)
                except self._ray.exceptions.RayTaskError as error:
                    raise cause(error) from error
                except self._ray.exceptions.RayError as error:
                    self._replace(actor)
                    losses[task] += 1
                    sentence = f"an actor was lost during {task.name} ({first_line(error)})"
                    if losses[task] == MAX_LOSSES:
                        raise ValueError(f"{sentence}; {MAX_LOSSES} were lost, so its memory may be too small") from error
                    self._remark(f"{sentence}; another one does it again")
                    waiting.push(task)
                    continue
                idle.append((actor, task.group))
                yield task, result
        for actor, _ in idle:  # for another list of tasks
            self._starting[actor.prepare.remote()] = actor

    def _start(self) -> None:
        actor = self._class.remote(*self._arguments)
        self._starting[actor.prepare.remote()] = actor

    def _started(self, reference: Any) -> Any:
        """The actor, or None if it is lost and another one is started."""
        actor = self._starting.pop(reference)
        try:
            facts = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise cause(error) from error
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts == MAX_LOSSES:
                raise ValueError(f"actors do not start: {_reason(error)}") from error
            self._replace(actor)
            return None
        self._failed_starts = 0
        self._check(facts)
        return actor

    def _replace(self, actor: Any) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor)
        self._start()


class _Queue:
    """Tasks by group, in their order; those that are done again come first."""

    def __init__(self, tasks: Sequence[Task], skip: Callable[[Task], bool]) -> None:
        self._skip = skip
        self._again: deque[Task] = deque()
        self._groups: dict[Hashable, deque[Task]] = {}
        for task in tasks:
            self._groups.setdefault(task.group, deque()).append(task)
        self._begun: dict[Hashable, None] = {}

    def __bool__(self) -> bool:
        return bool(self._again or self._groups)

    def push(self, task: Task) -> None:
        self._again.append(task)

    def pop(self, group: Hashable) -> Task | None:
        """The next task for an actor that worked on this group: of it, else of one not begun, else of the longest."""
        while self:
            if self._again:
                task = self._again.popleft()
            else:
                fresh = next((name for name in self._groups if name not in self._begun), None)
                if group not in self._groups:
                    group = max(self._groups, key=lambda name: len(self._groups[name])) if fresh is None else fresh
                self._begun[group] = None
                task = self._groups[group].popleft()
                if not self._groups[group]:
                    del self._groups[group]
            if not self._skip(task):
                return task
        return None


def start_facts(weights: Mapping[str, str]) -> dict[str, Any]:
    """Facts about an actor: machine, process, versions of packages, and the hash of each workload's host."""
    return {"machine": platform.node(), "pid": os.getpid(), "versions": versions(), "weights": dict(weights)}


def check_same(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise ValueError if an actor's facts differ from those of this machine in anything but the machine."""
    for kind, what in (("versions", "version of"), ("weights", "host of"), ("policies", "content of policy")):
        for name, value in here.get(kind, {}).items():
            if (other := there.get(kind, {}).get(name)) != value:
                raise ValueError(
                    f"the machine {there['machine']} has another {what} {name} than this one ({other}, not {value}); "
                    "results of both would not be comparable"
                )


def use_device(gpus: float, cpus: int) -> str:
    """Compute with so many threads, and on the GPU that Ray assigned, of whose memory the share ``gpus`` is used."""
    torch.set_num_threads(cpus)
    if not gpus:
        return "cpu"
    if gpus < 1:
        torch.cuda.set_per_process_memory_fraction(gpus)
    return "cuda"


def cause(error: Any) -> Exception:
    """What a task raised, where it is an error of users."""
    return error.cause if isinstance(error.cause, _OF_USERS) else error


def _reason(error: Exception) -> str:
    """The last line of a message of Ray that names an exception, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
    return lines[-1] if lines else first_line(error)
