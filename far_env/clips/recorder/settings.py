"""The settings of ``far-env record``: a validated dataclass. Imports no torch, so that ``--help`` answers quickly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from far_env.clips.clip import SPLITS
from far_env.config import require_positive
from far_env.errors import unknown_name

MOVES = ("left", "right", "forward", "backward")
"""The names that actions can be given: turns, and steps in the direction of view."""
MAX_EPISODES = 1_000_000
"""Of a split, so that the seeds of splits do not meet."""
MAX_SEED = 1000
"""So that the seeds of environments have 32 bits."""


@dataclass(frozen=True)
class RecordSettings:
    """Record clips from any Gymnasium environment that renders rgb_array, or from a Minari data set of pixels.

    The folder gets train/, validation/ and test/ with one .npz file per episode, a card (README.md) and the same facts as
    recording.json. An interrupted recording is continued by the same command, and a finished one extended by more episodes.
    """

    out: str
    """Folder to write to."""
    env: str | None = None
    """Gymnasium id; MODULE:ID imports a module that registers it, from the working directory too."""
    minari: str | None = None
    """Name of a local Minari data set, in place of an environment; all of its episodes are read, nothing is played."""
    pixels: str | None = None
    """The entry of its observations that holds the pixels, if they are a dictionary with several images."""
    env_options: tuple[str, ...] = ()
    """Arguments of the environment, each KEY=VALUE, the value as in YAML: size=8 is_slippery=false."""
    behaviours: str = "random"
    """random, sticky (repeats its last action with the probability in --repeat), scan (walks and turns, and most of the way
    back; needs moves), or a .py file with a class that has act(observation). Several, separated by commas, take turns."""
    repeat: float = 0.75
    """Probability with which sticky repeats its last action."""
    excursion: int = 20
    """Most actions that scan takes before it returns."""
    moves: tuple[str, ...] = ()
    """Numbers of the actions that move the camera, such as left=0 right=1 forward=2 backward=3. If given, random and sticky
    draw from these alone. By default those that the environment declares as its attribute moves."""
    frames: int = 100
    """Frames of an episode. One that ends earlier is padded with its last frame, and counted."""
    frame_skip: int = 1
    """Steps of the environment per frame, all with the same action."""
    size: int = 64
    """Side of the square frames in pixels; what the environment draws is resized with antialiasing, without keeping its
    aspect."""
    train_episodes: int = 200
    """Episodes of the train split."""
    validation_episodes: int = 20
    """Episodes of the validation split."""
    test_episodes: int = 40
    """Episodes of the test split."""
    maps: tuple[str, ...] = ()
    """Maps of every split, such as train=A,B validation=C test=D: splits then share no map. By default those that the
    environment declares as its attribute map_splits; without maps, splits share no seed."""
    map_option: str = "map"
    """The argument of the environment that takes the map."""
    seed: int = 0
    """Seed of everything that is random."""
    processes: int = 1
    """Episodes that are played at the same time; the result does not depend on it."""

    def __post_init__(self) -> None:
        require_positive(self, "frames", "frame_skip", "size", "processes", "excursion")
        if (self.env is None) == (self.minari is None):
            raise ValueError("give --env with the id of an environment, or --minari with the name of a data set")
        if not 0 <= self.repeat < 1:
            raise ValueError(f"repeat must be a probability below 1, got {self.repeat}")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed must be in 0 to {MAX_SEED - 1}, got {self.seed}")
        for split, count in self.episodes.items():
            if not 0 <= count <= MAX_EPISODES:
                raise ValueError(f"{split}_episodes must be in 0 to {MAX_EPISODES:,}, got {count}")
        if not any(self.episodes.values()):
            raise ValueError("no episode is asked for; set train_episodes, validation_episodes or test_episodes above 0")
        _ = self.move_numbers, self.map_names, self.env_arguments
        if self.minari is not None:
            fields = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _OF_PLAYING:
                if getattr(self, name) != fields[name]:
                    raise ValueError(f"{name} is for playing an environment; a Minari data set is read as it is")
        elif self.pixels is not None:
            raise ValueError("pixels is for Minari data sets; an environment's frames are those that it renders")

    @property
    def episodes(self) -> dict[str, int]:
        """Split → number of episodes."""
        return {split: getattr(self, f"{split}_episodes") for split in SPLITS}

    @property
    def env_arguments(self) -> dict[str, Any]:
        """The environment's arguments. Raises ValueError unless each is KEY=VALUE."""
        arguments = {}
        for key, text in _pairs(self.env_options, "env_options", "size=8").items():
            try:
                arguments[key] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"env_options: the value of {key} is not valid YAML: {text}") from error
        return arguments

    @property
    def move_numbers(self) -> dict[str, int]:
        """Move → number of its action. Raises ValueError on an unknown move or what is no number."""
        numbers = {}
        for name, text in _pairs(self.moves, "moves", "left=0").items():
            if name not in MOVES:
                raise ValueError(f"moves: {unknown_name('move', name, MOVES)}")
            if not text.isdecimal():
                raise ValueError(f"moves: {name} needs the number of an action, got {text!r}")
            numbers[name] = int(text)
        return numbers

    @property
    def map_names(self) -> dict[str, tuple[str, ...]]:
        """Split → maps; empty without maps. Raises ValueError on an unknown split, or on a map that two splits share."""
        maps = {}
        for split, text in _pairs(self.maps, "maps", "train=A,B").items():
            if split not in SPLITS:
                raise ValueError(f"maps: {unknown_name('split', split, SPLITS)}")
            maps[split] = tuple(name.strip() for name in text.split(",") if name.strip())
        check_maps(maps, self.episodes)
        return maps

    @property
    def determining(self) -> dict[str, Any]:
        """The settings on which every episode depends, as plain values."""
        values = dataclasses.asdict(self)
        left_out = {"out", "processes", *(f"{split}_episodes" for split in SPLITS)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if key not in left_out}


_OF_PLAYING = ("env_options", "behaviours", "repeat", "excursion", "moves", "frame_skip", "maps", "map_option", "processes")


def check_maps(maps: dict[str, tuple[str, ...]], episodes: dict[str, int]) -> None:
    """Raise ValueError if two splits share a map, or if there are maps, but none of a split of which episodes are wanted."""
    if not maps:
        return
    for split, count in episodes.items():
        if count and not maps.get(split):
            raise ValueError(f"maps: the split {split} has none; name some, or set {split}_episodes to 0")
    names = [name for split in maps for name in maps[split]]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"maps: {name} appears twice; every map belongs to one split")


def _pairs(texts: Sequence[str], option: str, example: str) -> dict[str, str]:
    """KEY=VALUE texts as a dict. Raises ValueError on one that is none, or a key that appears twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not (key and sign and value):
            raise ValueError(f"{option} takes pairs such as {example}, got {text!r}")
        if key in pairs:
            raise ValueError(f"{option}: {key} appears twice")
        pairs[key] = value
    return pairs
