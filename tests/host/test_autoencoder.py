"""The DCAE against the published autoencoder's numbers, and FAR's scaling of videos."""

from __future__ import annotations

import torch

from far_env.host.autoencoder import Autoencoder

ATOL = 5e-5


@torch.no_grad()
def test_dcae_equals_the_published_autoencoder(golden):
    fixture = golden("dcae_tiny.npz")
    model = Autoencoder(**fixture.config)
    model.dcae.load_state_dict(fixture.weights, strict=True)
    model.eval()

    def close(actual, expected):
        torch.testing.assert_close(actual, fixture[expected], atol=ATOL, rtol=0)

    close(model.dcae.encode(fixture["in.image"]).latent, "out.latent")
    close(model.dcae.decode(fixture["out.latent"]).sample, "out.decoded")
    close(model.dcae.encode(fixture["in.image_small"]).latent, "out.latent_small")
    close(model.dcae.decode(fixture["out.latent_small"]).sample, "out.decoded_small")
    close(model.dcae.decode(fixture["in.latent_random"]).sample, "out.decoded_random")
    latents = model.encode(fixture["in.video01"])
    close(latents, "out.video_scaled_latent")
    close(model.decode(latents), "out.video_reconstructed01")
