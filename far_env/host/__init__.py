"""The frozen video model: FAR transformer, DCAE autoencoder and flow-matching sampler."""

from far_env.host.far import FAR

__all__ = ["FAR"]
