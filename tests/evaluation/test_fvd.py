"""FVD: the distance against closed forms, features through cd-fvd with a small network, columns of tables, honest absence."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import far_env.workloads
from far_env import cli
from far_env.clips.worlds import WORLDS
from far_env.evaluation import fvd
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.fvd import FeatureStore, VideoFeatures, frechet_distance, fvd_unavailable, gaussian_distance, with_fvd
from far_env.host.far import FAR
from far_env.host.weights import save_host
from far_env.hub import HubFile
from far_env.rollout.noise import trajectory_seeds
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from tests.clips.test_video import write_video
from tests.conftest import TINY_DCAE, TINY_FAR, randomise
from tests.evaluation.test_records import policies

ONLY_METRICS = "from nothing, which have no true continuation: its only metrics are kept_ssim, kept_lpips, colour_drift and fvd"


def random_covariance(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or size))
    return factor @ factor.T / size


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_with_common_axes_it_is_the_distance_of_means_and_deviations():
    """Of covariances that commute: |μ₁ − μ₂|² + Σ (σ₁ − σ₂)², along whichever axes."""
    rng = np.random.default_rng(0)
    means, deviations, turn = rng.normal(size=(2, 6)), rng.uniform(0, 3, (2, 6)), rotation(rng, 6)
    deviations[0, 0] = deviations[1, 1] = 0  # singular
    covariances = [turn @ np.diag(row**2) @ turn.T for row in deviations]
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert gaussian_distance(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected)
    assert gaussian_distance(means[0], covariances[0], means[0], covariances[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [8, 3])
def test_it_is_that_of_the_matrix_root(rank):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    first, second = random_covariance(rng, 8), random_covariance(rng, 8, rank)
    expected = np.trace(first + second - 2 * np.real(sqrtm(first @ second)))
    mean = np.zeros(8)
    assert gaussian_distance(mean, first, mean, second) == pytest.approx(expected, abs=1e-3 if rank < 8 else 1e-8)
    assert gaussian_distance(mean, second, mean, first) == pytest.approx(gaussian_distance(mean, first, mean, second))


def test_samples_of_known_gaussians_have_their_distance():
    rng = np.random.default_rng(2)
    mean, first, second = rng.normal(size=5), random_covariance(rng, 5), random_covariance(rng, 5)
    samples = [rng.multivariate_normal(m, c, 200_000) for m, c in ((np.zeros(5), first), (mean, second))]
    assert frechet_distance(*samples) == pytest.approx(gaussian_distance(np.zeros(5), first, mean, second), rel=0.01)
    assert frechet_distance(samples[0][:1000], samples[0][:1000] + 2) == pytest.approx(4 * 5), "a shift alone"
    assert frechet_distance(samples[0][:500, :1], samples[0][:500, :1] * 3) == pytest.approx(
        4 * samples[0][:500, 0].mean() ** 2 + 4 * samples[0][:500, 0].var(ddof=1)
    ), "one feature: means and deviations, with n − 1"
    with pytest.raises(ValueError, match="at least two videos on each side, got 1 and 5"):
        frechet_distance(samples[0][:1], samples[1][:5])


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_it_is_the_packages_distance():
    package = pytest.importorskip("cdfvd.fvd")
    rng, statistics = np.random.default_rng(3), []
    samples = [rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + rng.normal(size=12) for _ in range(2)]
    for features in samples:
        statistics.append(package.FeatureStats(capture_mean_cov=True))
        statistics[-1].append(features.astype(np.float32))
    moments = [one.get_mean_cov() for one in statistics]
    try:
        expected = package.cdfvd.compute_fvd_from_stats(None, *statistics)
    except TypeError as error:
        pytest.skip(f"the package's distance does not work with this SciPy: {error}")
    assert gaussian_distance(*moments[0], *moments[1]) == pytest.approx(expected, rel=1e-5)
    unbiased = [(mean, covariance * 300 / 299) for mean, covariance in moments]
    assert frechet_distance(*samples) == pytest.approx(gaussian_distance(*unbiased[0], *unbiased[1]), rel=1e-4)


class Colours(torch.nn.Module):
    """Six features of videos (N, 3, T, 224, 224) in [−1, 1]: the mean of each colour, and of its change in time."""

    def forward(self, videos):
        changes = (videos[:, :, -1] - videos[:, :, 0]).mean(dim=(2, 3))
        return torch.cat([videos.mean(dim=(2, 3, 4)), changes], dim=1)


def colours(videos):
    """The same features of uint8 videos (N, T, H, W, 3), computed otherwise."""
    pixels = 2 * videos.astype(np.float64) / 255 - 1
    return np.concatenate([pixels.mean(axis=(1, 2, 3)), (pixels[:, -1] - pixels[:, 0]).mean(axis=(1, 2))], axis=1)


@pytest.fixture
def small_network(monkeypatch, tmp_path):
    """cd-fvd as it is, but with a small network in place of I3D, and a file in place of its weights."""
    package = pytest.importorskip("cdfvd.fvd")
    monkeypatch.setenv("FAR_ENV_CACHE", str(tmp_path / "cache"))
    fvd.i3d_path().parent.mkdir(parents=True)
    fvd.i3d_path().write_bytes(b"weights")
    loaded = []

    def load(device, path):
        loaded.append((str(device), path))
        return Colours()

    monkeypatch.setattr(package, "load_i3d_model", load)
    return loaded


def test_features_are_those_of_the_packages_network(small_network, capsys):
    extract = VideoFeatures(torch.device("cpu"))
    assert small_network == [("cpu", str(fvd.i3d_path()))], "our file, and no download by the package"
    assert "cd-fvd 0." in extract.source and "I3D (" in extract.source and capsys.readouterr().out == ""
    videos = np.random.default_rng(0).integers(0, 256, (3, 12, 8, 8, 3), dtype=np.uint8)
    features = extract(videos)
    assert features.shape == (3, 6) and features.dtype == np.float32
    np.testing.assert_allclose(features, colours(videos), atol=0.01)
    with pytest.raises(ValueError, match="at least 10 frames, these have 9"):
        extract(videos[:, :9])


def expected_fvd(workload, clip_ids, seeds, policy=None, budget=9999):
    """The definition, from the specification's rollouts: given frames go through the autoencoder."""
    values = []
    clips = [workload.clips.clip("test", i) for i in clip_ids]
    truth = np.stack([np.rint(255 * clip.frames[: workload.num_frames].transpose(0, 2, 3, 1)) for clip in clips])
    for seed in seeds:
        videos = []
        for clip in clips:
            frames = reference_rollout(workload, clip, policy, budget, seed + clip.clip_id).frames
            if workload.num_context:
                given = torch.from_numpy(clip.frames[None, : workload.num_context])
                autoencoder = workload.host.autoencoder
                frames = torch.cat([autoencoder.decode(autoencoder.encode(given))[0], frames])
            videos.append(np.rint(255 * frames.numpy().transpose(0, 2, 3, 1)))
        values.append(frechet_distance(colours(np.stack(videos)), colours(truth)))
    return values


def test_fvd_is_that_of_the_videos_averaged_over_trajectories(small_network, tiny_workload, tmp_path):
    store = FeatureStore(VideoFeatures(torch.device("cpu")), "small", tmp_path)
    options = {"metrics": ("psnr",), "progress": False, "batch_size": 3, "out": tmp_path, "features": store}
    seeds = [seed for first in (0, 2) for seed in trajectory_seeds(first, 2)]
    names = policies("recent_fill", "full_history")
    results = evaluate_grid([tiny_workload], [4], names, range(3), seeds=seeds, **options)
    table = with_fvd(tabulate(results, "tiny_pan", 4, range(3), (0, 2), trajectories=2), store, None, (0, 2), 4)
    for name, budget in (("recent_fill", 4), ("full_history", 9999)):
        values = np.reshape(expected_fvd(tiny_workload, range(3), seeds, names[name], budget), (2, 2))
        np.testing.assert_allclose(table.fvd[name], values.mean(axis=1), rtol=0.02)
        row = table.summary()["policies"][name]["fvd"]
        assert row["by_seed"] == table.fvd[name].tolist() and row["deviation"] == pytest.approx(table.fvd[name].std(ddof=1))
    again = FeatureStore(VideoFeatures(torch.device("cpu")), "small", tmp_path)
    assert again.episodes == store.episodes and len(again.episodes) == 2 * 3 * 4
    kept = with_fvd(replace(table, fvd={}), again, None, (0, 2), 4)
    np.testing.assert_array_equal(kept.fvd["recent_fill"], table.fvd["recent_fill"])


@pytest.fixture
def label_workload(tiny_host):
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "label", "num_classes": 5})
    randomise(transformer, 5)
    host = replace(tiny_host, name="tiny_label", transformer=transformer.eval().requires_grad_(False))

    class Labelled:
        name, size = "labelled", 64

        def num_clips(self, split):
            return 8

        def clip(self, split, clip_id):
            return replace(WORLDS["pan"].clip(split, clip_id), label=clip_id % 5)

    return Workload("from_nothing", Labelled(), host, 0, 10, num_steps=2, guidance=2.0, labels=True)


def test_videos_from_nothing_have_no_metric_but_fvd(small_network, label_workload):
    store = FeatureStore(VideoFeatures(torch.device("cpu")), "small", None)
    arguments = ([label_workload], [], {"full_history": None}, range(4))
    for options in ({"metrics": ("psnr",), "features": store}, {"metrics": ()}):
        with pytest.raises(
            ValueError,
            match=ONLY_METRICS,
        ):
            evaluate_grid(*arguments, progress=False, **options)
    results = evaluate_grid(*arguments, metrics=(), progress=False, features=store, seeds=(0, 2))
    table = with_fvd(tabulate(results, "from_nothing", 9999, range(4), (0, 2)), store, None, (0, 2), 9999)
    np.testing.assert_allclose(table.fvd["full_history"], expected_fvd(label_workload, range(4), (0, 2)), rtol=0.02)


def evaluate(capsys, host, *args):
    status = cli.main(["evaluate", "--host", str(host), "--device", "cpu", "--clips", "2", "--policies", "recent_fill", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_shows_it_and_adds_it_to_finished_episodes(capsys, small_network, tiny_host_folder, tmp_path):
    out = tmp_path / "results"
    assert evaluate(capsys, tiny_host_folder, "--metrics", "psnr", "--out", str(out))[0] == 0
    records = (out / "records.jsonl").read_text()
    status, table, error = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--out", str(out))
    assert status == 0 and "22/22 frames" in error and (out / "records.jsonl").read_text() == records
    assert " FVD " in table.splitlines()[0] and "FVD of 2 videos to as many true ones, by cd-fvd 0." in table
    _, text, error = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--out", str(out), "--json", "-")
    assert "frames" not in error, "nothing is played again"
    value = json.loads(text)["policies"]["recent_fill"]["fvd"]["mean"]
    assert value > 0 and f"{value:.1f}" in table
    (part,) = (out / "features" / "pan" / "b4" / "recent_fill").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    status, _, error = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--out", str(out))
    assert status == 2 and f"{part} is damaged" in error and "delete the file and evaluate again" in error
    part.unlink()
    assert (
        evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--out", str(out))[1].splitlines()[2:3]
        == (table.splitlines()[2:3])
    )
    (out / "features" / "source.json").write_text('{"source": "another"}')
    status, _, error = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--out", str(out))
    assert status == 2 and "holds features of another, not of cd-fvd" in error


def test_the_command_measures_generation_from_nothing(capsys, small_network, label_workload, tmp_path, monkeypatch):
    """FAR's generation of UCF-101 with a host that takes its labels; one ODE step."""
    config = {**TINY_FAR, "condition_cfg": {"type": "label", "num_classes": 5}}
    configs = {"transformer": config, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    host = label_workload.host
    save_host(tmp_path / "host", host.transformer, host.autoencoder, configs, frame_size=128, num_steps=1)
    monkeypatch.setattr(far_env.workloads, "UCF101_C0P16_128", replace(far_env.workloads.UCF101_C0P16_128, num_steps=1))
    entries = [{"video_path": f"datasets/ucf101/{i}.mp4", "label": i % 3} for i in range(4)]
    for i in range(4):
        write_video(tmp_path / "data" / f"{i}.mp4", 46)
    (tmp_path / "data" / "trainval.json").write_text(json.dumps(entries))
    args = ("--workload", "ucf101_c0p16_128", "--data-dir", str(tmp_path / "data"), "--budget", "full_history_budget")
    args = (*args, "--policies", "full_history", "--clips", "4", "--out", str(tmp_path / "out"))
    status, _, error = evaluate(capsys, tmp_path / "host", *args)
    assert (
        status == 2
        and "from nothing, which have no true continuation: its only metrics are kept_ssim, kept_lpips, colour_drift and fvd"
        in error
    )
    status, table, _ = evaluate(capsys, tmp_path / "host", *args, "--metrics", "fvd", "--seeds", "0,2")
    assert status == 0 and " ± " in table and "mean and deviation over noise seeds" in table
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len({record["latents_sha256"] for record in records}) == 8 and records[0]["guidance"] == 2.0
    assert cli.main(["validate", str(tmp_path / "out"), "--host", str(tmp_path / "host"), "--device", "cpu"]) == 0


def test_alone_it_needs_no_other_metric_and_has_no_report(capsys, small_network, tiny_host_folder, tmp_path):
    status, table, _ = evaluate(capsys, tiny_host_folder, "--metrics", "fvd", "--out", str(tmp_path / "results"))
    assert status == 0 and table.split()[:3] == ["policy", "FVD", "ms/decision"]
    assert cli.main(["report", str(tmp_path / "results"), "--out", str(tmp_path / "x.html")]) == 2
    assert "no metric of single clips" in capsys.readouterr().err
    status, table, _ = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--clips", "1")
    assert status == 0 and "no fvd column: FVD needs at least two clips, there are 1" in table


def test_where_it_cannot_be_computed_it_is_absent_with_the_reason(capsys, tiny_host_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FAR_ENV_CACHE", str(tmp_path / "cache"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "cdfvd" else found(name, *more))
    assert fvd_unavailable() == 'FVD needs the package cd-fvd: pip install "far-env[fvd]"'
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: object() if name == "cdfvd" else found(name, *more))
    reason = fvd_unavailable()
    assert str(tmp_path) in reason and "far-env weights download fvd fetches them" in reason
    status, table, _ = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd")
    assert status == 0 and f"no fvd column: {reason}" in table and " FVD " not in table.splitlines()[0]
    _, text, _ = evaluate(capsys, tiny_host_folder, "--metrics", "psnr,fvd", "--json", "-")
    assert json.loads(text)["unavailable"]["fvd"] == reason and "fvd" not in json.loads(text)["policies"]["recent_fill"]
    status, _, error = evaluate(capsys, tiny_host_folder, "--metrics", "fvd")
    assert status == 2 and reason in error


def test_weights_are_fetched_by_name_and_those_of_another_network_are_refused(capsys, monkeypatch, tmp_path):
    pytest.importorskip("cdfvd.fvd")
    monkeypatch.setenv("FAR_ENV_CACHE", str(tmp_path / "cache"))
    asked = []

    def fetch(url, path, expected: HubFile, *_):
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weight": torch.zeros(3)}, path)

    monkeypatch.setattr("far_env.hub._fetch", fetch)
    assert cli.main(["weights", "verify", "fvd"]) == 2 and "weights download fvd fetches them" in capsys.readouterr().err
    assert cli.main(["weights", "download", "fvd"]) == 2 and asked == [fvd.I3D_URL]
    error = capsys.readouterr().err
    assert "cannot be used" in error and "Traceback" not in error and not fvd.i3d_path().exists(), "it is not kept"
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d

    torch.save(InceptionI3d(400, in_channels=3).state_dict(), fvd.i3d_path())
    assert cli.main(["weights", "download", "fvd"]) == 0 and "is complete" in capsys.readouterr().out
    features = VideoFeatures(torch.device("cpu"))(np.zeros((1, 10, 8, 8, 3), dtype=np.uint8))
    assert features.shape == (1, 400) and np.isfinite(features).all()


def test_damaged_features_are_told_by_name(tmp_path):
    folder = tmp_path / "features"
    (folder / "pan" / "b4" / "x").mkdir(parents=True)
    (folder / "source.json").write_text('{"source": "small"}')
    path = folder / "pan" / "b4" / "x" / "c0_s42.npz"
    one = np.zeros(1, dtype=int)
    for arrays in (
        {"clips": one},
        {"clips": one, "seeds": one, "features": np.full((1, 3), np.nan)},
        {"clips": one, "seeds": one, "features": np.zeros((2, 3))},
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"c0_s42.npz is damaged .*; delete the file and evaluate again"):
            FeatureStore(colours, "small", tmp_path)
