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
}.items():
    gymnasium.register(
        id=f"far_env/{_name}-v0",
        entry_point="far_env.env:FrameRetentionEnv",
        vector_entry_point="far_env.vector_env:FrameRetentionVectorEnv",
        kwargs={"workload": _workload},
    )
