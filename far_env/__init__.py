"""far-env: a clip goes in, a policy decides at every generated frame which history frames the frozen video model may still
see, and a quality number comes out. Importing the package registers the Gymnasium environments."""

import gymnasium

__version__ = "0.1.0"

for _name, _workload in {
    "Pan": "pan",
    "Cuts": "cuts",
    "Orbit": "orbit",
    "UCF101Short": "ucf101_short_prediction",
    "DMLabLong": "dmlab_long_prediction",
    "UCF101C4P12": "ucf101_c4p12",
    "BAIRC2P14": "bair_c2p14",
    "BAIRC2P28": "bair_c2p28",
    "DMLabC144P156": "dmlab_c144p156",
    "DMLabC36P264": "dmlab_c36p264",
    "MinecraftC144P156": "minecraft_c144p156",
    "MinecraftC36P264": "minecraft_c36p264",
}.items():
    gymnasium.register(
        id=f"far_env/{_name}-v0",
        entry_point="far_env.envs.retention_env:FrameRetentionEnv",
        vector_entry_point="far_env.envs.vector_env:FrameRetentionVectorEnv",
        kwargs={"workload": _workload},
    )
