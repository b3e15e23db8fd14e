"""far-env: a clip goes in, a policy decides at every generated frame which history frames the frozen video model may still
see, and a quality number comes out. Importing the package registers the Gymnasium environments, and imports no torch."""

import re
import warnings

import gymnasium

from far_env.plugins import WORKLOADS, entry_points

__version__ = "0.1.0"

_ENVIRONMENT_NAMES = {
    "maze_retrieval_c36p36": "MazeRetrievalC36P36",
    "ucf101_short_prediction": "UCF101Short",
    "dmlab_long_prediction": "DMLabLong",
    "ucf101_c4p12": "UCF101C4P12",
    "bair_c2p14": "BAIRC2P14",
    "bair_c2p28": "BAIRC2P28",
    "dmlab_c144p156": "DMLabC144P156",
    "dmlab_c36p264": "DMLabC36P264",
    "minecraft_c144p156": "MinecraftC144P156",
    "minecraft_c36p264": "MinecraftC36P264",
}
"""Workloads whose environment is not called by the workload's name in camel case."""
_WITHOUT_ENVIRONMENT = ("ucf101_c0p16_128", "ucf101_c0p16_256", "prompted")
"""Workloads that generate from nothing, so that there is nothing to reward."""


def environment_id(workload: str) -> str:
    """The Gymnasium id of a workload's environment: "my_world" is "far_env/MyWorld-v0"."""
    parts = re.split(r"[^A-Za-z0-9]+", workload)
    name = _ENVIRONMENT_NAMES.get(workload) or "".join(part[:1].upper() + part[1:] for part in parts)
    return f"far_env/{name}-v0"


def _register_environments() -> None:
    """Register an environment for every workload; names come from the installed metadata, no plugin is imported."""
    try:
        workloads = list(entry_points(WORKLOADS))
    except ValueError as error:
        warnings.warn(f"no environments are registered: {error}", stacklevel=3)
        return
    for workload in workloads:
        if workload in _WITHOUT_ENVIRONMENT:
            continue
        environment = environment_id(workload)
        if environment not in gymnasium.registry:
            gymnasium.register(
                id=environment,
                entry_point="far_env.envs.retention_env:FrameRetentionEnv",
                vector_entry_point="far_env.envs.vector_env:FrameRetentionVectorEnv",
                kwargs={"workload": workload},
            )


_register_environments()
for _id, _workload in (("far_env/OrbitTokens-v0", "orbit"), ("far_env/MazeRetrievalTokens-v0", "maze_retrieval")):
    if _id not in gymnasium.registry:
        gymnasium.register(id=_id, entry_point="far_env.envs.token_env:TokenRetentionEnv", kwargs={"workload": _workload})
if "far_env/DoomWalk-v0" not in gymnasium.registry:  # which far-env record plays
    gymnasium.register(id="far_env/DoomWalk-v0", entry_point="far_env.clips.recorder.doom:DoomWalk")
