"""Prompts, and videos with prompts: what is read, how it is evaluated with and without a true continuation, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from far_env.cli import main
from far_env.clips.clip import Clip
from far_env.clips.prompted import PromptedVideos, PromptFolder
from far_env.evaluation.results_folder import load as load_results
from far_env.evaluation.unreferenced import colour_drift, kept_pairs, unreferenced_metrics
from far_env.host.protocol import Host, Unit
from far_env.workload import Workload
from far_env.workloads import make_workload
from tests.clips.test_video import write_video
from tests.host.test_protocol import declare

SIZE = 32


class Painter(Host):
    """Chunks of one, then four frames in a colour that the prompt decides, mixed with what was kept; latents are pixels."""

    name, latent_shape, frame_size, chunked, condition = "painter", (3, SIZE, SIZE), SIZE, True, "prompt"

    def encode(self, frames):
        return frames

    def decode(self, latents):
        return latents.clamp(0, 1)

    def generate(self, kept, noise, conditions):
        colour = torch.full_like(noise, len(conditions.prompt) / 40)
        past = torch.cat(list(kept)).mean(dim=0) if kept else colour
        return 0.5 * colour + 0.5 * past + noise / 20

    def units(self, num_frames):
        return (Unit(), *(Unit(4, 4),) * ((num_frames - 1) // 4))


@pytest.fixture(autouse=True)
def painter(monkeypatch):
    declare(monkeypatch, "painter", f"{__name__}:Painter")
    return Painter(torch.device("cpu"), torch.float32)


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b.txt").write_text("a dog\n at night ")
    (folder / "a.txt").write_text("a red cat walks")
    return folder


@pytest.fixture
def videos(tmp_path):
    for name in "abc":
        write_video(tmp_path / "videos" / f"{name}.mp4", 24, 64, 48)
        (tmp_path / "videos" / f"{name}.txt").write_text(f"the video {name}")
    return tmp_path / "videos"


OPTIONS = ["--host", "painter", "--clip-options", f"{{size: {SIZE}}}", "--budget", "2", "--device", "cpu", "--clips", "2"]
POLICIES = ["--policies", "recent_fill,sink_recent,full_history", "--show-clips", "1"]


def test_prompts_are_read_in_order_on_one_line(prompts):
    source = PromptFolder(prompts, num_frames=17, size=SIZE)
    assert [source.clip("test", i).prompt for i in range(2)] == ["a red cat walks", "a dog at night"]
    assert source.clip("test", 0).frames.shape == (0, 3, SIZE, SIZE) and source.num_clips("train") == 0


def test_videos_have_the_prompts_beside_them(videos):
    source = PromptedVideos(videos, num_frames=17, size=SIZE)
    clips = {split: source.clip(split, 0) for split in ("test", "validation", "train")}
    assert [clip.prompt for clip in clips.values()] == ["the video a", "the video b", "the video c"]
    assert clips["test"].frames.shape == (17, 3, SIZE, SIZE)


def test_prompts_alone_are_evaluated_without_a_reference(prompts, tmp_path, capsys):
    out = tmp_path / "results"
    args = ["--workload", "prompted", "--data-dir", str(prompts), "--num-predict", "25", *OPTIONS]
    assert main(["evaluate", *args, *POLICIES, "--metrics", "kept_ssim,colour_drift", "--out", str(out)]) == 0
    assert "SSIM with kept frames" in capsys.readouterr().out
    results = load_results(out)
    assert results.settings.metrics == ["kept_ssim", "colour_drift"]
    assert all(record.psnr_per_frame == [] and len(record.metrics) == 2 for record in results.records)
    assert len({record.clip_sha256 for record in results.records}) == 2, "a prompt is part of its clip"
    assert main(["validate", str(out), "--host", "painter", "--data-dir", str(prompts), "--device", "cpu"]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0


def test_videos_with_prompts_have_psnr_beside(videos, tmp_path):
    out = tmp_path / "results"
    args = ["--workload", "prompted_video", "--data-dir", str(videos), "--num-context", "5", "--num-predict", "12", *OPTIONS]
    args[args.index("--clips") + 1] = "1"
    assert main(["evaluate", *args, *POLICIES, "--metrics", "psnr,kept_ssim", "--out", str(out)]) == 0
    results = load_results(out)
    assert all(len(record.psnr_per_frame) == 12 and set(record.metrics) == {"psnr", "kept_ssim"} for record in results.records)
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0


def test_what_a_unit_is_compared_with_is_what_was_kept(painter):
    workload = Workload("w", None, painter, 5, 12, 1, prompts=True)
    plan = [{"step": 0, "kept": [0], "demoted": [2]}, {"step": 1, "kept": [3], "demoted": []}]
    assert kept_pairs(workload, plan) == [(2, 0), (2, 1), (3, 0), (3, 2), (4, 3)]
    frames = np.random.default_rng(0).random((17, 3, SIZE, SIZE), dtype=np.float32)
    clip, ends = Clip(0, frames, prompt="x"), [0, 4, 8, 12, 16]

    def similarity(a, b):
        images = (np.pad(frames[ends[i]], ((0, 0), (5, 5), (5, 5)), mode="reflect") for i in (a, b))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        return structural_similarity(*images, channel_axis=0, data_range=1.0, **options)

    best = [max(similarity(2, 0), similarity(2, 1)), max(similarity(3, 0), similarity(3, 2)), similarity(4, 3)]
    (scores,) = unreferenced_metrics(workload, [clip], torch.from_numpy(frames[None, 5:]), [plan], ["kept_ssim"])
    assert scores == {"kept_ssim": pytest.approx(np.mean(best), abs=1e-6)}


def test_true_frames_that_are_fed_back_are_what_was_kept(painter):
    workload = Workload("w", None, painter, 5, 12, 1, prompts=True, feedback="true")
    clip = Clip(0, np.random.default_rng(0).random((17, 3, SIZE, SIZE), dtype=np.float32), prompt="x")
    generated = torch.from_numpy(clip.frames[[5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12]])[None]
    (scores,) = unreferenced_metrics(workload, [clip], generated, [[]], ["kept_ssim"])
    assert scores["kept_ssim"] == pytest.approx(1), "each unit ends like the true frame of the unit before"


def test_drift_alone_needs_no_history(painter):
    workload = Workload("w", None, painter, 0, 1, 1, prompts=True)
    clip = Clip(0, np.zeros((0, 3, SIZE, SIZE), dtype=np.float32), prompt="x")
    assert (
        unreferenced_metrics(workload, [clip], torch.zeros(1, 1, 3, SIZE, SIZE), [[]], ["colour_drift"])[0]["colour_drift"] == 0
    )


def test_a_memory_of_tokens_has_no_whole_frames_to_compare_with(capsys):
    args = ["--memory", "tokens", "--workload", "pan", "--budget", "128", "--policies", "recent_fill", "--clips", "1"]
    assert main(["evaluate", *args, "--metrics", "kept_ssim"]) == 2
    assert "which a memory of tokens does not have; leave them out" in capsys.readouterr().err


def test_guidance_for_the_null_class_is_refused_with_prompts(painter):
    with pytest.raises(ValueError, match="has guidance -1 with actions, labels or prompts"):
        Workload("w", None, painter, 5, 12, 1, prompts=True, guidance=-1)


def test_colour_drift_is_zero_for_a_standing_video_and_the_change_of_an_even_one():
    still = torch.rand(1, 3, 4, 4).expand(20, -1, -1, -1)
    assert colour_drift(still) == 0
    brighter = torch.linspace(0, 1, 20)[:, None, None, None].expand(20, 3, 4, 4)
    # Two frames at each end: means 1/38 and 37/38, equal deviations, in three channels.
    assert colour_drift(brighter) == pytest.approx(np.sqrt(3) * 36 / 38, abs=1e-6)


def test_kept_lpips_is_computed_where_there_is_alexnet(painter, random_alexnet):
    workload = Workload("w", None, painter, 5, 12, 1, prompts=True)
    clip = Clip(0, np.random.default_rng(0).random((17, 3, SIZE, SIZE), dtype=np.float32), prompt="x")
    same = torch.from_numpy(clip.frames[4]).expand(1, 12, 3, SIZE, SIZE)
    (scores,) = unreferenced_metrics(workload, [clip], same, [[]], ["kept_lpips"])
    assert scores["kept_lpips"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: PromptFolder(None, num_frames=9), "prompts need a folder: give data_dir"),
        (lambda folder: PromptFolder(folder / "none", num_frames=9), "does not exist; give another one"),
        (lambda folder: PromptFolder(folder, num_frames=9), "holds no prompts: put each into a .txt file"),
        (lambda folder: (folder / "a.txt").write_text(" \n") and PromptFolder(folder, num_frames=9), "a.txt is empty"),
        (
            lambda folder: write_video(folder / "v.mp4", 9) and PromptedVideos(folder, num_frames=9),
            "v.mp4 has no prompt: v.txt beside it must hold one",
        ),
        (
            lambda folder: make_workload("prompted", host="painter", data_dir=folder, num_context=5, device="cpu"),
            "gives no frames: num_context must be 0, got 5",
        ),
    ],
)
def test_missing_prompts_are_one_sentence(tmp_path, monkeypatch, make, message):
    monkeypatch.delenv("PROMPTS_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_metrics_that_need_a_true_continuation_are_refused_without_one(prompts, capsys):
    args = ["--workload", "prompted", "--data-dir", str(prompts), "--num-predict", "9", *OPTIONS, "--policies", "recent_fill"]
    assert main(["evaluate", *args, "--metrics", "psnr"]) == 2
    assert "its only metrics are kept_ssim, kept_lpips, colour_drift and fvd" in capsys.readouterr().err
    assert main(["evaluate", "--workload", "pan", *OPTIONS, "--policies", "recent_fill", "--metrics", "psnr"]) == 2
