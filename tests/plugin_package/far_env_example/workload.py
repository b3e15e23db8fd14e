"""A workload and a host of another distribution."""

from dataclasses import replace

import far_env.host.weights
from far_env.clips.worlds import WORLDS
from far_env.workloads import WorkloadSpec


def load_host(device, dtype):
    """The embedded host under another name."""
    return replace(far_env.host.weights.load_embedded(device, dtype), name="example_host")


def short_pan():
    """Two predicted frames of the world pan."""
    return WorkloadSpec(lambda: WORLDS["pan"], 5, 3, "example_host", num_steps=1)
