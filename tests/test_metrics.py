"""Metrics against torchmetrics and lpips, the weights of LPIPS, and its honest absence where they are missing."""

from __future__ import annotations

import hashlib
import os
import time
import warnings

import pytest
import torch

from far_env import cli, metrics, perceptual


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


def test_fars_psnr_is_torchmetrics_per_frame(pair):
    """As the program of FAR's authors computes them: PSNR per frame, then the mean."""
    from torchmetrics.image import PeakSignalNoiseRatio

    predicted, truth = (batch.flatten(0, 1) for batch in pair)
    by_frame = PeakSignalNoiseRatio(data_range=1.0, reduction="none", dim=[1, 2, 3])(predicted, truth).view(3, 4)
    torch.testing.assert_close(metrics.far_psnr(*pair), by_frame.mean(dim=1))
    scores = metrics.clip_metrics(*pair, ("far_psnr", "ssim", "psnr"))
    assert [list(row) for row in scores] == [["psnr", "ssim", "far_psnr"]] * 3
    assert [row["far_psnr"] for row in scores] == pytest.approx(by_frame.mean(dim=1).tolist())


def test_fars_lpips_is_that_of_pixels_that_were_not_scaled(random_alexnet, pair):
    import lpips

    plain = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for _, module in plain.net.named_children():
        for index, layer in module.named_children():
            layer.load_state_dict(random_alexnet.features[int(index)].state_dict())
    with torch.no_grad():
        expected = torch.stack([plain.eval()(a, b).mean() for a, b in zip(*pair, strict=True)])
    torch.testing.assert_close(metrics.far_lpips(*pair), expected, atol=1e-6, rtol=1e-5)
    assert (metrics.far_lpips(*pair) - metrics.lpips(*pair)).abs().min() > 1e-5


def test_without_its_weights_lpips_says_so_at_once_and_never_touches_the_network(monkeypatch, tmp_path, pair):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    start = time.monotonic()
    reason = metrics.lpips_unavailable()
    assert "fetches them" in reason and str(tmp_path) in reason
    with pytest.raises(metrics.MetricUnavailable) as caught:
        metrics.lpips(*pair)
    assert str(caught.value) == reason
    assert time.monotonic() - start < 5


def test_lpips_is_the_packages_distance_averaged_over_frames(random_alexnet, monkeypatch, pair):
    """If a newer torchvision breaks the package, which calls it in a deprecated way, this test is what fails: ours goes on."""
    import lpips

    actual = metrics.lpips(*pair)
    plain = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, module in plain.net.named_children():
        for index, layer in module.named_children():
            layer.load_state_dict(random_alexnet.features[int(index)].state_dict())
        assert name.startswith("slice")
    plain.eval()
    with torch.no_grad():
        expected = torch.stack([plain(2 * a - 1, 2 * b - 1).mean() for a, b in zip(*pair, strict=True)])
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert (actual > 0).all() and len(set(actual.tolist())) == 3
    monkeypatch.setattr(metrics, "_LPIPS_FRAMES", 5)
    torch.testing.assert_close(metrics.lpips(*pair), expected, atol=1e-6, rtol=1e-5)
    assert not metrics.lpips(pair[0], pair[0]).any()


def test_lpips_calls_nothing_that_torchvision_deprecated(random_alexnet, pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.lpips(*pair).isfinite().all()
    with pytest.warns(UserWarning, match="deprecated"):
        __import__("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")
def test_lpips_on_a_gpu_is_that_of_the_cpu(random_alexnet, pair):
    expected = metrics.lpips(*pair)
    many = [batch.repeat(100, 1, 1, 1, 1).cuda() for batch in pair]
    torch.testing.assert_close(metrics.lpips(*many).cpu(), expected.repeat(100), atol=1e-4, rtol=1e-2)


def test_damaged_alexnet_weights_are_named(monkeypatch, tmp_path, pair):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / perceptual.ALEXNET_FILE).write_bytes(b"not weights")
    with pytest.raises(metrics.MetricUnavailable, match=r"cannot be used .*; delete and fetch them again"):
        metrics.lpips(*pair)


def test_weights_for_lpips_are_fetched_once_and_verified(hub, monkeypatch, tmp_path, capsys):
    content = os.urandom(3000)
    hub.add("torch/models", {perceptual.ALEXNET_FILE: content})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(perceptual, "ALEXNET_URL", f"{hub.url}/torch/models/resolve/main/{perceptual.ALEXNET_FILE}")
    assert cli.main(["weights", "download", "lpips"]) == 2
    assert "arrived with SHA-256" in capsys.readouterr().err and not list(tmp_path.rglob("*.pth*"))
    monkeypatch.setattr(perceptual, "ALEXNET_HASH", hashlib.sha256(content).hexdigest()[:8])
    path = perceptual.alexnet_path()
    path.with_name(f"{path.name}.part").write_bytes(content[:1000])
    assert cli.main(["weights", "download", "lpips"]) == 0
    assert path.read_bytes() == content and hub.fetched("alexnet") == [None, "bytes=1000-"]
    assert metrics.lpips_unavailable() is None
    assert cli.main(["weights", "download", "lpips"]) == 0 and len(hub.fetched("alexnet")) == 2
    monkeypatch.setenv("FAR_WEIGHTS_DIR", str(tmp_path))
    assert cli.main(["weights", "verify"]) == 0, "without names, what is there is verified"
    assert f"lpips: {path} is complete" in capsys.readouterr().out
    assert cli.main(["weights", "list"]) == 0
    assert "lpips: AlexNet's ImageNet weights for the metric LPIPS" in capsys.readouterr().out
    path.write_bytes(content[:-1])
    assert cli.main(["weights", "verify", "lpips"]) == 2
    assert "delete it and fetch it again with far-env weights download lpips" in capsys.readouterr().err
    path.unlink()
    assert cli.main(["weights", "verify", "lpips"]) == 2
    assert "far-env weights download lpips fetches them" in capsys.readouterr().err
    monkeypatch.setattr(perceptual, "ALEXNET_URL", "http://127.0.0.1:9/alexnet.pth")
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert cli.main(["weights", "download", "lpips"]) == 2
    assert "cannot be fetched from http://127.0.0.1:9 (" in (error := capsys.readouterr().err)
    assert "or put the file at" in error


def test_unknown_metrics_are_refused(pair):
    with pytest.raises(ValueError, match="unknown metric 'fvd'"):
        metrics.clip_metrics(*pair, ("psnr", "fvd"))
