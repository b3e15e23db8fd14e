"""The frozen video model: FAR or FAR-Long transformer, DCAE autoencoder and flow-matching sampler."""

from far_env.host.far import FAR
from far_env.host.far_long import FARLong

__all__ = ["FAR", "FARLong"]
