"""Plays episodes of an environment: makes it, turns what it renders into square frames, and pads what ends early."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image

from far_env.clips.clip import SPLITS
from far_env.clips.recorder import behaviours
from far_env.clips.recorder.behaviours import Behaviour, FromFile, Random, Scan, Sticky
from far_env.clips.recorder.settings import MAX_EPISODES, MOVES, RecordSettings, check_maps
from far_env.errors import first_line, unknown_name


@dataclass(frozen=True)
class Episode:
    """A recorded episode.

    Attributes:
        video: uint8 (T, size, size, 3).
        actions: int64 (T,), ``actions[i]`` leads to frame i and the first is 0; None if the actions are no single numbers.
        padded: how many frames at the end repeat the last one, because the episode had ended.
    """

    video: np.ndarray
    actions: np.ndarray | None
    padded: int = 0


def environment_seed(seed: int, split: str, number: int) -> int:
    """Seed with which episode ``number`` of a split is reset: no two splits, episodes or recordings share one."""
    return (seed * len(SPLITS) + SPLITS.index(split)) * MAX_EPISODES + number


class Player:
    """Plays single episodes, each a function of the settings, the split and its number.

    The environment is made once, with maps once for each change of map.

    Raises:
        ValueError: if the environment does not exist, cannot be made or does not render, if a behaviour cannot be used, or if
            moves or maps do not fit the environment.
    """

    def __init__(self, settings: RecordSettings) -> None:
        self.settings = settings
        self._names = [name.strip() for name in settings.behaviours.split(",") if name.strip()]
        for name in self._names or [""]:
            behaviours.check_name(name)
        loaded = {name: behaviours.load_behaviour(Path(name)) for name in self._names if name not in behaviours.NAMES}
        self._loaded: dict[str, Behaviour] = loaded
        self._env: gym.Env | None = None
        self._map: str | None = None
        self.maps = settings.map_names or self._declared_maps()
        self.env = self._environment(next((names[0] for names in self.maps.values() if names), None))
        self.num_actions = int(self.env.action_space.n) if isinstance(self.env.action_space, gym.spaces.Discrete) else None
        self.moves = self._checked_moves()
        self.drawn: str | None = None
        """Type and shape of what the environment draws, once an episode was played."""

    def map_of(self, split: str, number: int) -> str | None:
        """The map of an episode: those of its split take turns."""
        names = self.maps.get(split)
        return names[number % len(names)] if names else None

    def play(self, split: str, number: int) -> Episode:
        """Play one episode. Raises ValueError if the environment or the behaviour fails, or frames cannot be used."""
        settings = self.settings
        self.env = self._environment(self.map_of(split, number))
        seed = environment_seed(settings.seed, split, number)
        behaviour = self._behaviour(self._names[number % len(self._names)], np.random.default_rng(seed))
        frames, actions, ended = [], [0], False
        where = f"episode {number} of {split}"
        try:
            observation, _ = self.env.reset(seed=seed)
            frames.append(self._frame())
            while len(frames) < settings.frames and not ended:
                action = behaviour.act(observation)
                if not self.env.action_space.contains(action):
                    action = self._as_action(action)
                for _ in range(settings.frame_skip):
                    observation, _, terminated, truncated, _ = self.env.step(action)
                    if ended := bool(terminated or truncated):
                        break
                frames.append(self._frame())
                actions.append(action)
        except ValueError as error:
            raise ValueError(f"{settings.env}, {where}: {first_line(error)}") from error
        except Exception as error:  # environments and behaviours raise many kinds
            raise ValueError(f"{settings.env}, {where} failed: {type(error).__name__}: {first_line(error)}") from error
        padded = settings.frames - len(frames)
        video = np.stack(frames + frames[-1:] * padded)
        if self.num_actions is None:
            return Episode(video, None, padded)
        start = int(self.env.action_space.start)
        numbers = [0, *(int(action) - start for action in actions[1:])]
        return Episode(video, np.array(numbers + numbers[-1:] * padded, dtype=np.int64), padded)

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _environment(self, chosen_map: str | None) -> gym.Env:
        """The environment for a map; made anew if the map is another than before."""
        if self._env is None or chosen_map != self._map:
            self.close()
            arguments = self.settings.env_arguments
            if chosen_map is not None:
                arguments[self.settings.map_option] = chosen_map
            self._env, self._map = make_environment(self.settings.env, arguments), chosen_map
        return self._env

    def _declared_maps(self) -> dict[str, tuple[str, ...]]:
        """The maps that the environment's class declares as ``map_splits``."""
        if self.settings.map_option in self.settings.env_arguments:
            return {}  # a map was chosen by hand: splits differ in their seeds
        declared = getattr(_creator(find_environment(self.settings.env)), "map_splits", None) or {}
        maps = {split: tuple(names) for split, names in declared.items()}
        check_maps(maps, self.settings.episodes)
        return maps

    def _checked_moves(self) -> dict[str, int]:
        """The actions that move, of the settings or else of the environment. Raises ValueError if they do not exist."""
        moves = self.settings.move_numbers
        if not moves:
            declared: Mapping[str, int] = getattr(self.env.unwrapped, "moves", None) or {}
            moves = {name: declared[name] for name in MOVES if name in declared}
        if moves and self.num_actions is None:
            raise ValueError(f"moves need a Discrete action space; that of {self.settings.env} is {self.env.action_space}")
        for name, number in moves.items():
            if number >= self.num_actions:
                last = self.num_actions - 1
                raise ValueError(f"moves: {self.settings.env} has the actions 0 to {last}, got {name}={number}")
        start = int(self.env.action_space.start) if moves else 0
        return {name: number + start for name, number in moves.items()}

    def _behaviour(self, name: str, rng: np.random.Generator) -> Behaviour:
        if name == "random":
            return Random(self.env.action_space, self.moves, rng)
        if name == "sticky":
            return Sticky(self.env.action_space, self.moves, rng, self.settings.repeat)
        if name == "scan":
            return Scan(self.moves, rng, self.settings.excursion)
        return FromFile(self._loaded[name], rng)

    def _as_action(self, action: Any) -> Any:
        """A whole number of another type, as the environment takes it. Raises ValueError if it is no action."""
        if self.num_actions is not None and np.ndim(action) == 0 and np.issubdtype(np.asarray(action).dtype, np.integer):
            converted = np.int64(action)
            if self.env.action_space.contains(converted):
                return converted
        raise ValueError(f"the behaviour chose {action!r}, which is not in the action space {self.env.action_space}")

    def _frame(self) -> np.ndarray:
        drawn = self.env.render()
        pixels = as_rgb(drawn)
        self.drawn = f"{np.asarray(drawn).dtype} {np.asarray(drawn).shape}"
        return resize(pixels, self.settings.size)


def find_environment(name: str) -> gym.envs.registration.EnvSpec:
    """What is registered under an id, or under MODULE:ID after importing the module, also from the working directory.

    Raises:
        ValueError: if there is no such module or environment; the nearest id is suggested.
    """
    module, _, plain = name.rpartition(":")
    try:
        if module:
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # an installed script does not search there
            importlib.import_module(module)
        return gym.spec(plain)
    except ImportError as error:
        raise ValueError(f"the environment {name} cannot be made: {first_line(error)}") from error
    except gym.error.Error as error:
        hint = "MODULE:ID imports the module that registers an environment"
        raise ValueError(f"{unknown_name('environment', plain, sorted(gym.registry))}; {hint}") from error


def make_environment(name: str, arguments: dict[str, Any]) -> gym.Env:
    """An environment that renders ``rgb_array``.

    Raises:
        ValueError: one sentence, if it does not exist, cannot be made, or does not render.
    """
    spec = find_environment(name)
    metadata = getattr(_creator(spec), "metadata", None)
    modes = [str(mode) for mode in metadata.get("render_modes", ())] if isinstance(metadata, dict) else ["rgb_array"]
    if "rgb_array" not in modes:
        offered = ", ".join(modes) or "no mode"
        raise ValueError(f"{name} cannot be recorded, because it does not render rgb_array; it offers {offered}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gym.make(spec, render_mode="rgb_array", disable_env_checker=True, **arguments)
    except Exception as error:  # missing packages, unknown arguments, missing displays
        raise ValueError(f"the environment {name} cannot be made: {type(error).__name__}: {first_line(error)}") from error


def _creator(spec: gym.envs.registration.EnvSpec) -> object:
    """The class or function that makes an environment; None if it cannot be imported, which making it reports."""
    try:
        return (
            gym.envs.registration.load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
        )
    except Exception:  # of any kind: modules run when they are imported
        return None


def as_rgb(drawn: Any) -> np.ndarray:
    """What an environment draws as uint8 (H, W, 3): grey is repeated, alpha dropped, floats in [0, 1] scaled.

    Raises:
        ValueError: if it is no picture of these kinds.
    """
    if drawn is None:
        raise ValueError("render() returned nothing; the environment does not draw rgb_array")
    pixels = np.asarray(drawn)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in pixels.shape or pixels.dtype.kind not in "uif":
        raise ValueError(
            f"render() returned {pixels.dtype} {np.shape(drawn)}; frames must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        )
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
    if pixels.dtype == np.uint8:
        return pixels
    low, high = pixels.min(), pixels.max()
    largest = 1.0 if pixels.dtype.kind == "f" else 255
    if not (low >= 0 and high <= largest):
        raise ValueError(
            f"render() returned {pixels.dtype} values from {low:g} to {high:g}; frames of this type must be in 0 to {largest:g}"
        )
    return np.round(pixels * (255 / largest)).astype(np.uint8)


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (size, size, 3): bilinear with antialiasing, without keeping the aspect."""
    if pixels.shape[:2] == (size, size):
        return np.ascontiguousarray(pixels)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
