"""Procedural worlds: (split, clip_id) in, a 64×64 RGB clip out, in which memory decides what can be predicted.

Mazes are first-person walks. Every frame of the other worlds is drawn on a grid of 4-pixel cells: rows 0–47 scenery, rows 48–55 a ruler whose hue encodes the absolute position
(or the shot), rows 56–63 a schedule strip, a ring of 16 action colours that rolls one cell per frame, cell 0 being the
action that leads to the next frame. So motion can be read off any single kept frame; what dropping a frame loses is content.

Worlds take options, whose defaults are the clips that the embedded hosts were trained on. Each has a wide form with all ranges
open.
"""

from far_env.clips.worlds.base import World
from far_env.clips.worlds.cuts import Cuts, CutsWide
from far_env.clips.worlds.maze import Maze, MazeLong, MazeRetrieval, MazeRetrievalC36P36
from far_env.clips.worlds.orbit import Orbit, OrbitWide
from far_env.clips.worlds.pan import Pan, PanWide

GRID_WORLDS: dict[str, World] = {world.name: world for world in (Pan(), Cuts(), Orbit(), PanWide(), CutsWide(), OrbitWide())}
MAZES: dict[str, World] = {world.name: world for world in (Maze(), MazeLong(), MazeRetrieval(), MazeRetrievalC36P36())}
WORLDS: dict[str, World] = GRID_WORLDS | MAZES

__all__ = ["GRID_WORLDS", "MAZES", "WORLDS", "World"]
