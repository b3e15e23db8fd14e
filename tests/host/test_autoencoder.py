"""The DCAE against the published autoencoder's numbers, and FAR's scaling of videos."""

from __future__ import annotations

import torch

from far_env.host.autoencoder import Autoencoder
from far_env.host.training.autoencoder import scale_to_unit_variance

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


def test_scaling_before_batch_norms_changes_nothing_but_the_size_of_kernels_and_statistics():
    generator = torch.Generator().manual_seed(0)
    settings = {"latent_channels": 4, "attention_head_dim": 8, "encoder_block_out_channels": [8, 8]}
    settings |= {"encoder_layers_per_block": [1, 1]}
    settings |= {"decoder_block_out_channels": [8, 8], "decoder_layers_per_block": [1, 1], "decoder_norm_types": "batch_norm"}
    settings |= {"encoder_qkv_multiscales": [[], []], "decoder_qkv_multiscales": [[], []], "decoder_act_fns": "silu"}
    settings |= {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    model = Autoencoder(**settings).eval()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert norms
    for norm in norms.values():
        norm.running_mean.copy_(1e5 * torch.randn(8, generator=generator))
        norm.running_var.copy_(1e9 * (1 + torch.rand(8, generator=generator)))
    for name, kernel in model.named_parameters():
        if "decoder" in name and name.endswith("conv2.weight"):
            kernel.data *= 3e4
    latents = torch.randn((2, 1, 4, 4, 4), generator=generator)
    with torch.no_grad():
        before = model.decode(latents)
        scale_to_unit_variance(model)
        torch.testing.assert_close(model.decode(latents), before, rtol=1e-3, atol=1e-4)
    for norm in norms.values():
        assert 0.5 < norm.running_var.mean() < 2 and norm.running_mean.abs().max() < 100
