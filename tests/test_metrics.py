"""Metrics against torchmetrics, and honest absence of LPIPS where its weights are missing."""

from __future__ import annotations

import time

import pytest
import torch

from far_env import metrics


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((3, 4, 3, 16, 16), generator=generator).repeat_interleave(4, -1).repeat_interleave(4, -2)
    noisy = coarse + torch.tensor([0.01, 0.1, 0.4])[:, None, None, None, None] * torch.randn(coarse.shape, generator=generator)
    return noisy.clamp(0, 1), coarse


def test_psnr_is_one_error_over_the_whole_clip(pair):
    from torchmetrics.functional.image import peak_signal_noise_ratio

    for row, value in enumerate(metrics.psnr(*pair)):
        torch.testing.assert_close(value, peak_signal_noise_ratio(pair[0][row], pair[1][row], data_range=1.0))
    frame_mean = metrics.psnr(pair[0][:, :, None], pair[1][:, :, None]).mean(dim=1)
    assert (frame_mean > metrics.psnr(*pair)).all(), "the mean of per-frame values is another, larger number"


def test_ssim_agrees_with_torchmetrics(pair):
    from torchmetrics.functional.image import structural_similarity_index_measure

    for predicted, truth in zip(*pair, strict=True):
        # torchmetrics crops the mirrored border away again unless the full image is requested
        _, image = structural_similarity_index_measure(
            predicted, truth, gaussian_kernel=True, sigma=1.5, kernel_size=11, data_range=1.0, return_full_image=True
        )
        assert metrics.ssim(predicted, truth) == pytest.approx(image.mean().item(), abs=1e-4)


def test_without_its_weights_lpips_says_so_at_once_and_never_touches_the_network(monkeypatch, tmp_path, pair):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    start = time.monotonic()
    reason = metrics.lpips_unavailable()
    assert "fetches them" in reason and str(tmp_path) in reason
    with pytest.raises(metrics.MetricUnavailable) as caught:
        metrics.lpips(*pair)
    assert str(caught.value) == reason
    assert time.monotonic() - start < 5


def test_lpips_is_the_packages_distance_averaged_over_frames(monkeypatch, tmp_path, pair):
    import lpips
    from torchvision.models import alexnet

    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    trunk = alexnet()
    torch.save(trunk.state_dict(), tmp_path / "checkpoints" / metrics.ALEXNET_FILE)
    actual = metrics.lpips(*pair)
    plain = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, module in plain.net.named_children():
        for index, layer in module.named_children():
            layer.load_state_dict(trunk.features[int(index)].state_dict())
        assert name.startswith("slice")
    plain.eval()
    with torch.no_grad():
        expected = [plain(2 * a - 1, 2 * b - 1).mean() for a, b in zip(*pair, strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected), atol=1e-6, rtol=1e-5)
    assert (actual > 0).all()


def test_damaged_alexnet_weights_are_named(monkeypatch, tmp_path, pair):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / metrics.ALEXNET_FILE).write_bytes(b"not weights")
    with pytest.raises(metrics.MetricUnavailable, match=r"cannot be used .*; delete and fetch them again"):
        metrics.lpips(*pair)


def test_unknown_metrics_are_refused(pair):
    with pytest.raises(ValueError, match="unknown metric 'fvd'"):
        metrics.clip_metrics(*pair, ("psnr", "fvd"))
