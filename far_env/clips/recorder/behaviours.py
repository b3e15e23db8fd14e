"""What plays the recorded environments: random, sticky and scanning behaviours, and classes from files."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from far_env.errors import first_line, unknown_name

NAMES = ("random", "sticky", "scan")
_OPPOSITE = {"left": "right", "right": "left", "forward": "backward", "backward": "forward"}
_LONGEST_WALK = 4
"""Steps of `Scan` in one direction; longer walks would mostly end at walls."""


class Behaviour(Protocol):
    """Chooses the actions of one episode."""

    def act(self, observation: Any) -> Any:
        """An action of the environment."""


class Random:
    """Draws every action uniformly from the action space, or from the moves where some are given."""

    def __init__(self, space: gym.Space, moves: Mapping[str, int], rng: np.random.Generator) -> None:
        self._space, self._numbers, self._rng = copy.deepcopy(space), sorted(moves.values()), rng
        self._space.seed(int(rng.integers(2**31)))

    def act(self, observation: Any) -> Any:
        """A random action."""
        return int(self._rng.choice(self._numbers)) if self._numbers else self._space.sample()


class Sticky(Random):
    """Repeats its last action with a probability, and else draws one as `Random` does."""

    def __init__(self, space: gym.Space, moves: Mapping[str, int], rng: np.random.Generator, repeat: float) -> None:
        super().__init__(space, moves, rng)
        self._repeat, self._last = repeat, None

    def act(self, observation: Any) -> Any:
        """The last action or a random one."""
        if self._last is None or self._rng.random() >= self._repeat:
            self._last = super().act(observation)
        return self._last


class Scan:
    """Makes excursions and retraces them: turns one way and back, walks forth and back.

    An excursion has ``excursion`` actions at most and half as many at least, in runs of one move: 2 to 4 steps, or 2 turns to
    three fifths of an excursion. Then at least four fifths of it are undone, newest first, as far as the moves have
    opposites; so most views are seen again, some of them long after. Moves that exist are used: an environment without
    ``backward`` is only turned back, one without turns only walked.

    Raises:
        ValueError: if there is no pair of opposite moves.
    """

    def __init__(self, moves: Mapping[str, int], rng: np.random.Generator, excursion: int) -> None:
        if not any(_OPPOSITE[move] in moves for move in moves):
            raise ValueError(
                "the behaviour scan needs to know the actions that turn or walk, at least one pair of opposites: give moves, "
                "such as left=0 right=1 forward=2 backward=3"
            )
        self._moves, self._rng, self._excursion = dict(moves), rng, excursion
        self._queue: list[str] = []

    def act(self, observation: Any) -> int:
        """The next action of the excursion or of the way back."""
        if not self._queue:
            there = self._there()
            self._queue = there + self._back(there)
        return self._moves[self._queue.pop(0)]

    def _there(self) -> list[str]:
        length = int(self._rng.integers((self._excursion + 1) // 2, self._excursion + 1))
        there: list[str] = []
        while len(there) < length:
            moves = [move for move in self._moves if move != "backward"]
            if there:  # another move, and not back at once
                moves = [move for move in moves if move not in (there[-1], _OPPOSITE[there[-1]])] or [there[-1]]
            move = moves[int(self._rng.integers(len(moves)))]
            longest = _LONGEST_WALK if move == "forward" else max(2, self._excursion * 3 // 5)
            there += [move] * int(self._rng.integers(2, longest + 1))
        return there[:length]

    def _back(self, there: list[str]) -> list[str]:
        undone = int(self._rng.integers(len(there) * 4 // 5, len(there) + 1))
        back: list[str] = []
        for move in there[::-1][:undone]:
            if _OPPOSITE[move] not in self._moves:
                break
            back.append(_OPPOSITE[move])
        return back


class FromFile:
    """One episode of a class from a file: a copy of its object, whose ``begin_episode(seed)`` is called if it has one."""

    def __init__(self, loaded: Behaviour, rng: np.random.Generator) -> None:
        self._object = copy.deepcopy(loaded)
        seed = int(rng.integers(2**31))
        if hasattr(self._object, "begin_episode"):
            self._object.begin_episode(seed)

    def act(self, observation: Any) -> Any:
        """What the object answers."""
        return self._object.act(observation)


def check_name(name: str) -> None:
    """Raise ValueError unless this is one of `NAMES` or an existing .py file."""
    if name in NAMES:
        return
    if not name.endswith(".py"):
        raise ValueError(unknown_name("behaviour", name, NAMES) + "; a .py file works too")
    if not Path(name).is_file():
        raise ValueError(f"the behaviour file {name} does not exist")


def file_sha256(name: str) -> str | None:
    """SHA-256 of a behaviour's file; None for a name."""
    return None if name in NAMES else hashlib.sha256(Path(name).read_bytes()).hexdigest()


def load_behaviour(path: Path) -> Behaviour:
    """Run a Python file and make an instance of its one class with ``act``.

    Raises:
        ValueError: if the file cannot be run, or does not define exactly one such class.
    """
    name = f"behaviour_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses search for their module there
    try:
        spec.loader.exec_module(module)
        classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
        classes = [cls for cls in classes if callable(getattr(cls, "act", None))]
        if len(classes) == 1:
            return classes[0]()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"the behaviour file {path} cannot be loaded: {reason}") from error
    raise ValueError(f"{path} must define exactly one class with act(observation); it has {len(classes)}")
