"""Walks through Freedoom's maps as a Gymnasium environment: ViZDoom's software renderer, no enemies, no display.

It is registered as ``far_env/DoomWalk-v0``. ViZDoom (extra ``record``) brings the engine and Freedoom's maps and pictures.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

HEIGHT, WIDTH = 120, 160
TURN_DEGREES = 30
_STEP_TICS, _STEP_SPEED = 4, 40
_REST_TICS = 40
"""The walker glides after a step; after so many tics it has come to rest, but for a hundredth of its speed."""
_TRIES = 20
_ENGINE_FOLDER = Path("_vizdoom")
_CHANGE_THE_VIEW = ("InvulnerabilitySphere", "Infrared", "RadSuit", "BlurSphere", "DoomPlayer")
"""Things at which no episode begins, because picking them up recolours everything for a while."""


def _episode(number: int) -> tuple[str, ...]:
    return tuple(f"E{number}M{level}" for level in range(1, 10))


class DoomWalk(gym.Env):
    """A walker in a map of Freedoom, who turns on the spot and takes steps; nobody else is there.

    ## Description
    An action is finished when the walker has come to rest, so every frame shows a view from a place. Doors stay closed, floors
    do no harm.

    ## Action Space
    ``Discrete(4)``: 0 turns left by 30°, 1 turns right, 2 steps forward (about 70 units where nothing is in the way; a corridor
    is 64 or 128 wide), 3 steps backward.

    ## Observation Space
    ``Box(0, 255, (120, 160, 3), uint8)``: what `render` returns, with a field of view of 90°.

    ## Starting State
    The place of a random thing in the map, from which a step is possible, and a random direction.

    ## Reward
    None: 0.

    ## Episode End
    When a line is crossed that ends the map, which is rare.

    ## Arguments
    - ``map``: E1M1 to E4M9 (freedoom1.wad) or MAP01 to MAP32 (freedoom2.wad).

    ## Version History
    - v0: first version
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    package = "vizdoom"
    licence = "BSD-3-Clause (Freedoom's maps and pictures)"
    moves = {"left": 0, "right": 1, "forward": 2, "backward": 3}
    map_splits = {
        "train": (*(f"MAP{number:02}" for number in range(1, 33)), *_episode(1), *_episode(2)),
        "validation": _episode(3),
        "test": _episode(4),
    }
    """The maps of every split; policies are never trained on any of them."""
    action_space = gym.spaces.Discrete(4)
    observation_space = gym.spaces.Box(0, 255, (HEIGHT, WIDTH, 3), np.uint8)

    def __init__(self, map: str = "MAP01", render_mode: str | None = None) -> None:
        names = [name for split in self.map_splits.values() for name in split]
        if map not in names:
            raise ValueError(f"unknown map {map!r}; Freedoom has E1M1 to E4M9 and MAP01 to MAP32")
        try:
            import vizdoom
        except ImportError as error:
            raise ImportError('walks in Freedoom need ViZDoom: pip install "far-env[record]"') from error
        self.render_mode, self.map = render_mode, map
        self._game = vizdoom.DoomGame()
        wad = "freedoom2.wad" if map.startswith("MAP") else "freedoom1.wad"
        self._game.set_doom_game_path(str(Path(vizdoom.__file__).parent / wad))
        self._game.set_doom_map(map)
        self._game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        self._game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        self._game.set_window_visible(False)
        for part in ("hud", "weapon", "messages", "crosshair", "decals", "particles", "screen_flashes"):
            getattr(self._game, f"set_render_{part}")(False)
        buttons = vizdoom.Button
        self._game.set_available_buttons([buttons.TURN_LEFT_RIGHT_DELTA, buttons.MOVE_FORWARD_BACKWARD_DELTA])
        variables = vizdoom.GameVariable
        self._game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y])
        self._game.set_objects_info_enabled(True)
        self._game.set_episode_timeout(0)
        self._files = tempfile.TemporaryDirectory(prefix="far_env_doom")
        self._game.set_doom_config_path(str(Path(self._files.name) / "doom.ini"))  # else written to the working directory
        self._game.add_game_args("-nomonsters +sv_cheats 1 +cl_showsecretmessage 0 +con_midtime 0")
        self._running = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin at a random place of the map."""
        super().reset(seed=seed)
        self._game.set_seed(int(self.np_random.integers(2**31)))
        if self._running:
            self._game.new_episode()
        else:
            self._game.init()
            with suppress(OSError):
                _ENGINE_FOLDER.rmdir()  # which the engine makes in the working directory; what others put there stays
            self._running = True
        self._game.send_game_command("iddqd")  # no harm
        things = sorted((o.position_x, o.position_y) for o in self._game.get_state().objects if o.name not in _CHANGE_THE_VIEW)
        for number in self.np_random.permutation(len(things))[:_TRIES]:
            if self._can_walk(*things[number]):
                break
        self._act(float(self.np_random.integers(360)), 0)
        self._frame = self._game.get_state().screen_buffer.copy()
        return self._frame, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Turn or take a step, and come to rest."""
        turn = {0: -TURN_DEGREES, 1: TURN_DEGREES}.get(int(action), 0)
        self._act(turn, {2: _STEP_SPEED, 3: -_STEP_SPEED}.get(int(action), 0))
        state = self._game.get_state()
        if state is not None:
            self._frame = state.screen_buffer.copy()
        return self._frame, 0.0, state is None, False, {}

    def render(self) -> np.ndarray:
        """The current view, uint8 (120, 160, 3)."""
        return self._frame

    def close(self) -> None:
        """End the game."""
        self._game.close()
        self._files.cleanup()

    def _act(self, turn: float, speed: float) -> None:
        """Turn to the right by so many degrees, or else walk at a speed for a step and rest."""
        if turn:
            self._game.make_action([turn, 0], 1)
            return
        self._game.make_action([0, speed], _STEP_TICS)
        if not self._game.is_episode_finished():
            self._game.make_action([0, 0], _REST_TICS)

    def _can_walk(self, x: float, y: float) -> bool:
        """Move the walker to a place; returns whether it can take a step forward or backward from there, and is back then."""
        place = f"warp {x} {y}"
        self._game.send_game_command(place)
        self._game.make_action([0, 0], 2)
        for speed in (_STEP_SPEED, -_STEP_SPEED):
            self._act(0, speed)
            if self._game.is_episode_finished():
                self._game.new_episode()
                return False
            moved = math.dist(self._game.get_state().game_variables[:2], (x, y))
            self._game.send_game_command(place)
            self._game.make_action([0, 0], 2)
            if moved > _STEP_SPEED / 2:
                self._act(0, 0)
                return True
        return False
