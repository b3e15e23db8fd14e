"""Runs the drills and prints their table."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from benchmarks.drills import Options
from benchmarks.drills import __doc__ as description
from benchmarks.drills.commands import Command, commands
from benchmarks.drills.process import free_space, limited_space
from benchmarks.drills.state import differences, folder_state, leftovers
from far_env.cli import run_guarded
from far_env.errors import unknown_name

OTHER_USER = 65534
"""The user "nobody"."""
DAYS_BACK = 10
OTHERS = {"two": "two processes", "moved": "moved folder", "other_user": "another user", "clock": "clock set back"}


@dataclass
class Table:
    """Attempts by drill and command, and what was lost in them."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: dict[str, None] = field(default_factory=dict)

    def add(self, drill: str, command: str, problems: list[str], count: int = 1) -> None:
        """Enter an attempt, or several with one outcome."""
        self.tried[drill, command] += count
        if problems:
            self.lost[drill, command] += count
            self.problems[f"{drill} of {command}: {problems[0]}"] = None

    def lines(self, command: str) -> str:
        """The lines of one command."""
        rows = [(drill, tried, self.lost[drill, name]) for (drill, name), tried in self.tried.items() if name == command]
        return "\n".join(line(drill, command, str(tried), str(tried - lost), str(lost)) for drill, tried, lost in rows)


def line(drill: str, command: str, tried: str, survived: str, lost: str) -> str:
    """A line of the table."""
    return f"{drill:<16}{command:<16}{tried:>6}{survived:>10}{lost:>6}"


@dataclass
class Drills:
    """The drills of one command.

    Attributes:
        place: an empty folder.
        expected: what the undisturbed command leaves.
        seconds: that it takes.
        sizes: of the files that it leaves.
    """

    command: Command
    place: Path
    rng: random.Random
    expected: dict[str, object] = field(init=False)
    seconds: float = field(init=False)
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        folder = self.new_folder()
        process = self.command.start(folder)
        if process.ended() != 0:
            raise RuntimeError(process.errors())
        self.seconds, self.expected = process.seconds, folder_state(folder)
        self.sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        if again := self.command.finish(self.new_folder(), self.expected):
            raise RuntimeError(f"two undisturbed runs of {self.command.name} differ: {again}")

    def new_folder(self) -> Path:
        """An empty folder, always of the same name."""
        folder = self.place / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def moment(self) -> float:
        """A random one of the undisturbed run."""
        return self.rng.uniform(0, self.seconds)

    def kills(self, count: int) -> Iterator[tuple[int, list[str]]]:
        """Kill at random moments, in each folder until a process ends by itself. Yields kills and problems of each folder."""
        while count > 0:
            folder, killed, status = self.new_folder(), 0, None
            while killed < count and (status := self.command.start(folder).ended(self.moment())) is None:
                killed += 1
            count -= killed
            if status:
                yield max(killed, 1), [f"status {status} after a kill"]
            elif killed:
                yield killed, self.command.finish(folder, self.expected)

    def disk(self) -> list[str]:
        """Run with too little space, make space, and finish."""
        folder, problems = self.new_folder(), []
        share = self.rng.uniform(0, 0.8)
        with limited_space(folder, int(share * sum(self.sizes)), int(share * max(self.sizes))) as before:
            process = self.command.start(folder, before)
            status = process.ended()
            problems = process.refusal() if status == 2 else [f"status {status} on a full disk: {process.errors()[-1500:]!r}"]
            problems += [f"left behind: {name}" for name in leftovers(folder)]
            free_space(folder)
            return problems or self.command.finish(folder, self.expected)

    def two(self) -> list[str]:
        """Start a second process on the folder while the first one works: it finishes too, or refuses in one sentence."""
        folder = self.new_folder()
        first = self.command.start(folder)
        time.sleep(self.moment() / 2)
        second = self.command.start(folder)
        statuses = first.ended(), second.ended()
        problems = []
        for process, status in zip((first, second), statuses, strict=True):
            if status == 2 and "is writing" in process.errors():
                problems += process.refusal()
            elif status != 0:
                problems.append(f"status {status}: {process.errors()[-1500:]!r}")
        if 0 not in statuses:
            problems.append("neither finished")
        return problems or differences(folder_state(folder), self.expected) or self.command.finish(folder, self.expected)

    def moved(self) -> list[str]:
        """Kill, rename the folder, and finish there."""
        folder = self.new_folder()
        self.command.start(folder).ended(self.moment())
        elsewhere = self.place / "elsewhere"
        shutil.rmtree(elsewhere, ignore_errors=True)
        folder.rename(elsewhere)
        return self.command.finish(elsewhere, self.expected)

    def other_user(self) -> list[str]:
        """Kill, continue as a user who may not write the folder, which is one sentence, and finish as its owner."""
        folder = self.new_folder()
        self.command.start(folder).ended(self.moment())
        files = [folder, *folder.rglob("*")]
        if os.geteuid() != 0:
            for path in files:
                path.chmod(0o555 if path.is_dir() else 0o444)
        process = self.command.start(folder, _become_other_user if os.geteuid() == 0 else None)
        status = process.ended()
        problems = process.refusal() if status == 2 else [f"status {status}: {process.errors()[-1500:]!r}"]
        for path in files:
            path.chmod(0o755 if path.is_dir() else 0o644)
        return problems or self.command.finish(folder, self.expected)

    def clock(self) -> list[str]:
        """Kill, set the clock back, and finish."""
        folder = self.new_folder()
        self.command.start(folder).ended(self.moment())
        return self.command.finish(folder, self.expected, _set_the_clock_back)


def _become_other_user() -> None:
    os.setgid(OTHER_USER)
    os.setuid(OTHER_USER)


def _set_the_clock_back() -> None:
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - DAYS_BACK * 86400
    time.time_ns = lambda: now_ns() - DAYS_BACK * 86400 * 10**9


def run() -> int:
    """Run the drills and print their table; the status is 1 if anything was lost."""
    options = tyro.cli(Options, description=description)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # forked processes cannot use the threads of this one
    table = Table()
    print(line("drill", "command", "tried", "survived", "lost"), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        place.chmod(0o755)
        chosen = commands(place)
        known = [command.name for command in chosen]
        for name in options.names:
            if name not in known:
                raise ValueError(unknown_name("command", name, known))
        for command in chosen:
            if options.names and command.name not in options.names:
                continue
            (place / "drills").mkdir(exist_ok=True)
            drills = Drills(command, place / "drills", random.Random(f"{options.seed} {command.name}"))
            for count, problems in drills.kills(options.kills):
                table.add("SIGKILL", command.name, problems, count)
            for _ in range(options.disks):
                table.add("full disk", command.name, drills.disk())
            if not command.prints:
                for _, (drill, name) in itertools.product(range(options.others), OTHERS.items()):
                    table.add(name, command.name, getattr(drills, drill)())
            print(table.lines(command.name), flush=True)
    if table.problems:
        print("\n" + "\n".join(list(table.problems)[:20]))
    return int(bool(table.problems))


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.drills", run))
