"""Records of a large results folder: read from the file where they are needed, so that memory does not grow with their plans.

What stays in memory is where each line begins and which episode it is, about 100 bytes per record.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from far_env.evaluation.records import Key, Record

JobKey = tuple[str, int, str]
"""Workload, budget and policy."""


class StoredRecords(Sequence):
    """A sequence of the records in a file, in its order. Lines were checked before, by whoever calls ``append``.

    Args:
        path: of JSON lines.
        read: a record from the values of a line.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], Record]) -> None:
        self.path = path
        self.clip_hashes: dict[tuple[str, int], str] = {}
        """Workload and clip → hash of the clip's frames."""
        self._read = read
        self._jobs: dict[JobKey, int] = {}
        self._facts: Counter[tuple[JobKey, str]] = Counter()
        self._seeds: dict[int, int] = {}
        self._begin, self._job, self._clip, self._seed = array("q", [0]), array("i"), array("q"), array("i")
        self._chosen: Collection[str] | None = None

    def append(self, record: Record, size: int) -> None:
        """Count a record whose line of so many bytes is in the file after all before."""
        self._begin.append(self._begin[-1] + size)
        job = record.workload, record.budget, record.policy
        self._job.append(self._jobs.setdefault(job, len(self._jobs)))
        self._clip.append(record.clip)
        self._seed.append(self._seeds.setdefault(record.seed, len(self._seeds)))
        self._facts[job, json.dumps(record.facts)] += 1
        self.clip_hashes[record.workload, record.clip] = record.clip_sha256

    def extend(self, records: Iterable[Record]) -> None:
        """Count records that were added at the end of the file."""
        for record in records:
            self.append(record, len(record.line().encode()))

    def episode_keys(self) -> Iterator[Key]:
        """The episodes, in the order of the file."""
        jobs, seeds = list(self._jobs), list(self._seeds)
        for place in self._places():
            yield *jobs[self._job[place]], self._clip[place], seeds[self._seed[place]]

    def counted_facts(self) -> Iterator[tuple[str, dict[str, Any], int]]:
        """Workload, facts, and the number of records that have them."""
        for (job, text), count in self._facts.items():
            if self._chosen is None or job[2] in self._chosen:
                yield job[0], json.loads(text), count

    def jobs(self) -> list[JobKey]:
        """The workloads, budgets and policies that have records."""
        return [job for job in self._jobs if self._chosen is None or job[2] in self._chosen]

    def of_job(self, job: JobKey) -> Iterator[Record]:
        """The records of a workload, budget and policy, in the order of the file."""
        yield from self._at(np.flatnonzero(np.array(self._job) == self._jobs[job]).tolist())

    def of_clips(self, clips: Collection[tuple[str, int]]) -> Iterator[Record]:
        """The records of these workloads' clips, in the order of the file."""
        jobs = list(self._jobs)
        wanted = (i for i, (job, clip) in enumerate(zip(self._job, self._clip, strict=True)) if (jobs[job][0], clip) in clips)
        yield from (record for record in self._at(wanted) if self._chosen is None or record.policy in self._chosen)

    def of_policies(self, policies: Collection[str]) -> StoredRecords:
        """The records of these policies alone; the hashes of clips stay those of all."""
        chosen = object.__new__(StoredRecords)
        vars(chosen).update(vars(self), _chosen=frozenset(policies))
        return chosen

    def _places(self) -> list[int]:
        return np.flatnonzero(np.isin(np.array(self._job), [self._jobs[job] for job in self.jobs()])).tolist()

    def _at(self, indices: Iterable[int]) -> Iterator[Record]:
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self._begin[index])
                yield self._read(json.loads(file.read(self._begin[index + 1] - self._begin[index])))

    def __len__(self) -> int:
        if self._chosen is None:
            return len(self._job)
        return len(self._places())

    def __iter__(self) -> Iterator[Record]:
        yield from self._at(self._places())

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        places = self._places()
        found = list(self._at(places[index] if isinstance(index, slice) else [places[index]]))
        return found if isinstance(index, slice) else found[0]
