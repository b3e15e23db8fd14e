"""Procedural worlds: (split, clip_id) in, a 64×64 RGB clip out, in which memory decides what can be predicted.

Every frame is drawn on a grid of 4-pixel cells: rows 0–47 scenery, rows 48–55 a ruler whose hue encodes the absolute position
(or the shot), rows 56–63 a schedule strip, a ring of 16 action colours that rolls one cell per frame, cell 0 being the
action that leads to the next frame. So motion can be read off any single kept frame; what dropping a frame loses is content.
"""

from far_env.clips.worlds.base import World
from far_env.clips.worlds.cuts import Cuts
from far_env.clips.worlds.maze import MazeWorld
from far_env.clips.worlds.orbit import Orbit
from far_env.clips.worlds.pan import Pan

MAZES = (
    MazeWorld("maze", 4, num_frames=72),
    MazeWorld("maze_long", 5, num_frames=300),
    MazeWorld("maze_retrieval", 6, num_frames=32, retraced_from=16),
    MazeWorld("maze_retrieval_c36p36", 7, num_frames=72, retraced_from=36),
)
WORLDS: dict[str, World | MazeWorld] = {world.name: world for world in (Pan(), Cuts(), Orbit(), *MAZES)}

__all__ = ["WORLDS", "MazeWorld", "World"]
