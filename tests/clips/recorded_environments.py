"""Environments that the tests record; importing the module registers them.

Every frame of `Walk` has one colour, (heading, place, start), so what a recording should hold can be computed from its actions.
"""

from __future__ import annotations

import os
import time

import gymnasium as gym
import numpy as np

MODULE = "tests.clips.recorded_environments"
WALK, NUMBERS, MAPS, DARK = (f"{MODULE}:far_env_tests/{name}-v0" for name in ("Walk", "Numbers", "Maps", "Dark"))


def colour(heading: int, place: int, start: int) -> tuple[int, int, int]:
    return heading % 12 * 20, 128 + place, start


class Walk(gym.Env):
    """Actions turn left and right and step forward and backward; ``length`` steps end an episode."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Discrete(4)
    observation_space = gym.spaces.Box(-1000, 1000, (2,), np.int64)
    moves = {"left": 0, "right": 1, "forward": 2, "backward": 3}

    def __init__(self, render_mode=None, length=10**6, draws="uint8", seconds=0.0, dies=False):
        self.length, self.draws, self.seconds, self.dies = length, draws, seconds, dies

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.heading, self.place, self.steps = 0, 0, 0
        self.start = int(self.np_random.integers(256))
        return np.array([0, 0]), {}

    def step(self, action):
        if self.dies:
            os._exit(9)
        time.sleep(self.seconds)
        self.heading += {0: -1, 1: 1}.get(int(action), 0)
        self.place += {2: 1, 3: -1}.get(int(action), 0)
        self.steps += 1
        return np.array([self.heading, self.place]), 0.0, self.steps >= self.length, False, {}

    def render(self):
        frame = np.empty((40, 60 + (self.steps if self.draws == "growing" else 0), 3), dtype=np.uint8)
        frame[:] = colour(self.heading, self.place, self.start)
        return {
            "grey": frame[..., 0],
            "rgba": np.concatenate([frame, frame[..., :1]], axis=-1),
            "float": (frame / 255).astype(np.float32),
            "int64": frame.astype(np.int64),
            "bright": frame.astype(np.float32),
            "bool": frame > 0,
            "nothing": None,
            "list": [frame, frame],
        }.get(self.draws, frame)


class Numbers(Walk):
    """The actions are continuous."""

    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    moves = {}

    def step(self, action):
        return super().step(int(action[0] > 0))


class Maps(Walk):
    """The start is the map's number."""

    map_splits = {"train": ("11", "12", "13"), "validation": ("21",), "test": ("31", "32")}

    def __init__(self, map="0", **arguments):
        super().__init__(**arguments)
        self.map = map

    def reset(self, **arguments):
        observation, info = super().reset(**arguments)
        self.start = int(self.map)
        return observation, info


class Dark(Walk):
    """Does not render."""

    metadata = {"render_modes": ["human"]}


for kind in (Walk, Numbers, Maps, Dark):
    if f"far_env_tests/{kind.__name__}-v0" not in gym.registry:
        gym.register(f"far_env_tests/{kind.__name__}-v0", kind)
