"""The frozen video model: FAR or FAR-Long transformer, DCAE autoencoder and flow-matching sampler."""
