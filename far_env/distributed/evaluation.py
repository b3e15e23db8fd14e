"""``far-env evaluate --ray``: actors play episodes, this process keeps them, as one process alone would.

A task is one policy under one budget on one of the batches of a workload's episodes. One process plays several policies
together; on a CPU an actor's plans and latents are the same to the last bit. Records travel to this process, which alone
writes the results folder: no machine needs to share its disk, what a lost actor had not finished is done again, and nothing is
kept twice. Hosts, clips and policies are loaded on each machine, from its installation or from the same paths, and compared
with those here by their hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from far_env.contract import RetentionPolicy
from far_env.distributed.cluster import ActorSettings, connected
from far_env.distributed.pool import ActorPool, Task, check_same, start_facts, use_device
from far_env.errors import PolicyError, VideoError
from far_env.evaluation.facts import record_facts
from far_env.evaluation.records import Record, Results, Settings, cell
from far_env.evaluation.results_folder import Recorder, png
from far_env.evaluation.session import ClipSeed, Job, Session
from far_env.policies import is_policy_file, is_tuned_form, load_policy
from far_env.progress import show_progress
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.workload import Workload
from far_env.workloads import make_workload


@dataclass(frozen=True)
class ActorPlayer:
    """A `far_env.evaluation.session.Player`: plays the missing episodes of a session by actors.

    Attributes:
        workload_options: arguments of `far_env.workloads.make_workload` other than the name and the device.
        policy_seconds: how long one call of a policy file may take.
        memo_bytes: memory of each actor for frames that policies share.
    """

    settings: ActorSettings
    workload_options: Mapping[str, Any]
    policy_seconds: float
    memo_bytes: int = DEFAULT_BYTES

    def __call__(self, session: Session, workloads: Sequence[Workload], jobs: Sequence[Job], batch_size: int) -> None:
        """Play the episodes that the session lacks and keep them in it; one bar shows all actors' progress.

        Raises:
            PolicyError: if a policy that is not optional fails.
            ValueError: if the cluster cannot be used, or if a machine has other versions, hosts, policies or clips.
            VideoError: if no clip of a workload can be read.
        """
        by_name = {workload.name: workload for workload in workloads}
        tasks = _tasks(session, workloads, jobs, batch_size)
        if not tasks:
            return
        expected = start_facts({name: workload.host.weights_hash for name, workload in by_name.items()})
        expected["policies"] = _policy_hashes([job.name for job in jobs])
        options = {name: value for name, value in self.workload_options.items() if name != "device"}
        options["precision"] = workloads[0].host.precision
        setup = _Setup(session.asked, list(by_name), options, [job.name for job in jobs], self.policy_seconds, self.memo_bytes)
        failures: dict[tuple[str, int, str], int] = {}
        with session.bar(workloads, jobs) as bar, connected(self.settings) as ray:

            def has_failed(task: Task) -> bool:
                number, workload, budget, policy, _ = task.arguments
                return failures.get((workload, budget, policy), number) < number

            arguments = (setup, self.settings.gpus_per_actor, self.settings.cpus_per_actor)
            pool = ActorPool(ray, EvaluationActor, arguments, self.settings, partial(check_same, expected), bar.write)
            for task, played in pool.completed(tasks, has_failed):
                number, workload, budget, policy, episodes = task.arguments
                for clip in _keep(session, workload, played):
                    bar.write(f"left out clip {clip} of {workload}: {played.unreadable[clip]}")
                if played.failed is not None:
                    if policy not in session.optional:
                        raise PolicyError(played.failed)
                    # The reason is that of the first batch, whichever fails first.
                    if number < failures.get((workload, budget, policy), number + 1):
                        failures[workload, budget, policy] = number
                        session.leave_out(by_name[workload], Job(budget, policy, None), played.failed)
                        bar.write(f"left out {policy} on {workload} under budget {budget}: {played.failed}")
                bar.set_postfix_str(f"{workload} {budget} {policy}")
                bar.update(by_name[workload].num_predict * len(episodes))


@dataclass(frozen=True)
class _Setup:
    """What an actor needs to know, as plain values."""

    settings: Settings
    workloads: list[str]
    workload_options: dict[str, Any]
    policies: list[str]
    policy_seconds: float
    memo_bytes: int


@dataclass
class TaskResult:
    """What came of a task.

    Attributes:
        records: of the episodes that were played.
        pictures: path within the results folder → PNG.
        unreadable: clip → why its file could not be read.
        failed: why the policy could not play.
    """

    records: list[Record] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    failed: str | None = None


class EvaluationActor:
    """Holds the hosts of an evaluation on one device and plays its tasks."""

    def __init__(self, setup: _Setup, gpus: float, cpus: int) -> None:
        self._setup = setup
        self._device = use_device(gpus, cpus)
        self._memo = FrameMemo(setup.memo_bytes)
        self._policies: dict[str, RetentionPolicy | None] = {}
        self._workloads: dict[str, Workload] = {}
        self._facts: dict[str, dict[str, object]] = {}

    def prepare(self) -> dict[str, Any]:
        """Load the hosts; returns facts for `far_env.distributed.pool.check_same`."""
        setup = self._setup
        for name in setup.workloads:
            if name not in self._workloads:
                workload = self._workloads[name] = make_workload(name, **setup.workload_options, device=self._device)
                self._facts[name] = record_facts(workload)
        weights = {name: workload.host.weights_hash for name, workload in self._workloads.items()}
        return start_facts(weights) | {"policies": _policy_hashes(setup.policies)}

    def work(self, number: int, workload: str, budget: int, policy: str, episodes: Sequence[ClipSeed]) -> TaskResult:
        """Play one policy on some episodes of a workload; ``number`` is that of their batch."""
        store = _CollectedRecords(self._setup.settings)
        session = Session(self._setup.settings, store, self._memo, frozenset([policy]), progress=False, features=None)
        try:
            job = Job(budget, policy, self._policy(policy))
        except PolicyError as error:
            return TaskResult(failed=str(error))
        with show_progress(disable=True) as bar:
            bar.write = lambda text, file=None: None
            try:
                session.play_batch(self._workloads[workload], episodes, [job], len(episodes), self._facts[workload], bar)
            except VideoError:
                if not store.results.unreadable:  # else no clip at all can be read, which this process cannot know
                    raise
        store.result.unreadable = {clip: reason for (_, clip), reason in store.results.unreadable.items()}
        return store.result

    def _policy(self, name: str) -> RetentionPolicy | None:
        """Load a policy where it is first used. Raises PolicyError if a file cannot be loaded, as one that cannot play."""
        if name not in self._policies:
            try:
                self._policies[name] = load_policy(name, self._setup.policy_seconds)
            except ValueError as error:
                if is_policy_file(name):
                    raise PolicyError(str(error)) from error
                raise
        return self._policies[name]


class _CollectedRecords:
    """Keeps what a session plays, to be sent: a `far_env.evaluation.session.RecordStore`."""

    FOLDER = Path("results")

    def __init__(self, settings: Settings) -> None:
        self.results = Results(settings, [], self.FOLDER)
        self.result = TaskResult()

    def add(self, records: Iterable[Record]) -> None:
        self.result.records.extend(records)

    def leave_out(self, policy: str, where: str, reason: str) -> None:
        self.result.failed = reason

    def has_picture(self, path: Path) -> bool:
        return path.relative_to(self.FOLDER).as_posix() in self.result.pictures

    def save_picture(self, path: Path, frames: np.ndarray) -> None:
        self.result.pictures[path.relative_to(self.FOLDER).as_posix()] = png(frames)


def _tasks(session: Session, workloads: Sequence[Workload], jobs: Sequence[Job], batch_size: int) -> list[Task]:
    """The missing episodes: batch by batch, with all jobs on one batch after each other, because they share frames."""
    tasks = []
    for workload in workloads:
        for number, batch in enumerate(session.batches(batch_size)):
            for job in jobs:
                if episodes := tuple(session.missing(workload, job, batch)):
                    name = f"{cell(workload.name, job.budget)} {job.name}, clips {episodes[0][0]} to {episodes[-1][0]}"
                    arguments = (number, workload.name, job.budget, job.name, episodes)
                    tasks.append(Task(arguments, (workload.name, number), name))
    return tasks


def _keep(session: Session, workload: str, played: TaskResult) -> list[int]:
    """Add what an actor has played to the session; returns the clips that are newly known to be unreadable."""
    for record in played.records:
        session.check_clip(workload, record.clip, record.clip_sha256)
    if isinstance(session.store, Recorder):
        for path, content in played.pictures.items():
            session.store.write_picture(session.results.folder / path, content)
    session.keep(played.records)
    unreadable = session.results.unreadable
    new = [clip for clip in played.unreadable if (workload, clip) not in unreadable]
    unreadable |= {(workload, clip): played.unreadable[clip] for clip in new}
    if all((workload, clip) in unreadable for clip in session.asked.clips):
        raise VideoError(next(iter(unreadable.values())))
    return new


def _policy_hashes(names: Sequence[str]) -> dict[str, str]:
    """Name → hash of the content, of policies that are files or folders, which every machine must have."""
    hashes = {}
    for name in names:
        path = Path(name)
        if is_policy_file(name) or is_tuned_form(name):
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        elif path.is_dir():
            digest = hashlib.sha256()
            for file in sorted(path.glob("policy.*")):
                digest.update(file.name.encode() + file.read_bytes())
            hashes[name] = digest.hexdigest()[:16]
    return hashes
