"""Real input: decoding, both protocols, and files that cannot be used."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from far_env.clips.datasets import UCF101, DMLab
from far_env.clips.video import VideoError, count_frames, crop_centre, read_frames, squeeze
from far_env.contract import NewestFrames
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.host.weights import save_host
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workloads import make_workload
from tests.conftest import TINY_DCAE, TINY_FAR_LONG


def write_video(path, num_frames, width=96, height=64, codec="mpeg4"):
    """A video whose frame t is grey 8·t with a bright left third."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 4_000_000
        for t in range(num_frames):
            picture = np.full((height, width, 3), 8 * t % 256, dtype=np.uint8)
            picture[:, : width // 3] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        suffix = ".avi" if i % 3 == 0 else ".mp4"
        write_video(tmp_path / f"class_{i % 2}" / f"v_{i:02d}{suffix}", 20 + i % 4)
    return tmp_path


def test_frames_come_in_order_and_as_asked(tmp_path):
    for name in ("clip.mp4", "clip.avi"):
        path = write_video(tmp_path / name, 20)
        assert count_frames(path) == 20
        frames = np.stack(read_frames(path, 4, 10))
        assert frames.shape == (10, 64, 96, 3) and frames.dtype == np.uint8
        np.testing.assert_allclose(frames[:, 10:-10, 60:].mean(axis=(1, 2, 3)), 8 * np.arange(4, 14), atol=3)
        with pytest.raises(VideoError, match="ends early: frames 15 to 24"):
            read_frames(path, 15, 10)


def test_squeezing_keeps_everything_and_cropping_keeps_the_aspect():
    frames = np.zeros((2, 64, 128, 3), dtype=np.uint8)
    frames[:, :, :32] = 255  # the left quarter
    squeezed, cropped = squeeze(frames, 64), crop_centre(frames, 64)
    assert squeezed.shape == cropped.shape == (2, 3, 64, 64)
    assert squeezed.dtype == np.float32 and squeezed.min() >= 0 and squeezed.max() <= 1
    assert squeezed[..., :14].min() > 0.9 and squeezed[..., 18:].max() < 0.1
    assert cropped.max() < 0.1, "the centre of 128 columns starts at column 32"
    tall = crop_centre(frames.transpose(0, 2, 1, 3), 32)
    assert tall.shape == (2, 3, 32, 32) and tall[:, :, 2:].max() < 0.1
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    np.testing.assert_allclose(squeeze(noise, 64)[0], noise[0].transpose(2, 0, 1) / 255, atol=1e-6)


def test_the_benchmark_protocol_shuffles_the_sorted_list(folder):
    source = UCF101(folder, "benchmark", num_frames=16)
    videos = sorted(p for p in folder.rglob("*.*"))
    random.Random(42).shuffle(videos)
    splits = {
        split: [source.path(split, i) for i in range(source.num_clips(split))] for split in ("test", "validation", "train")
    }
    assert [len(paths) for paths in splits.values()] == [3, 2, 7]
    assert [path for paths in splits.values() for path in paths] == videos
    starts = []
    for clip_id in range(7):
        clip = source.clip("train", clip_id)
        assert clip.frames.shape == (16, 3, 64, 64) and clip.actions is None
        starts.append(round(clip.frames[0, :, 10:-10, 40:].mean() * 255 / 8))
        np.testing.assert_array_equal(UCF101(folder, num_frames=16).clip("train", clip_id).frames, clip.frames)
    assert len(set(starts)) > 1 and max(starts) <= 7


def test_fars_protocol_takes_every_tenth_file_from_its_start(folder):
    source = UCF101(folder, "far", num_frames=16)
    videos = sorted(p for p in folder.rglob("*.*"))
    assert [source.path("test", i) for i in range(2)] == videos[::10] and source.num_clips("test") == 2
    assert [source.path("validation", i) for i in range(2)] == videos[1::10]
    assert source.num_clips("train") == 8
    assert source.clip("test", 1).frames[0, :, 20:40, 40:].mean() < 0.02


def test_unusable_files_are_skipped_counted_and_logged(folder, caplog):
    good = (folder / "class_0" / "v_00.avi").read_bytes()
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video")
    (folder / "cut.mp4").write_bytes((folder / "class_1" / "v_01.mp4").read_bytes()[:700])
    (folder / "cut.avi").write_bytes(good[:300])
    write_video(folder / "short.mp4", 15)
    with caplog.at_level(logging.WARNING):
        source = UCF101(folder, num_frames=16)
    reasons = {path.name: reason for path, reason in source.skipped.items()}
    assert set(reasons) == {"empty.mp4", "text.mp4", "cut.mp4", "cut.avi", "short.mp4"}
    assert reasons["empty.mp4"].endswith("is empty")
    assert reasons["short.mp4"].endswith("has 15 frames, clips need 16")
    assert "skipped 5 of 17 videos" in caplog.text
    assert sum(source.num_clips(split) for split in ("train", "validation", "test")) == 12


def test_a_file_with_fewer_frames_than_its_header_says_is_an_error_when_read(tmp_path):
    path = write_video(tmp_path / "v.avi", 40)
    content = path.read_bytes()
    source = UCF101(tmp_path, "far", num_frames=40)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match=r"v\.avi"):
        source.clip("test", 0)


def test_missing_data_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("UCF101_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match="give data_dir, or set UCF101_DATA_DIR"):
        UCF101(num_frames=16)
    with pytest.raises(ValueError, match="does not exist"):
        UCF101(tmp_path / "nowhere", num_frames=16)
    with pytest.raises(ValueError, match=r"holds no \.mp4, \.avi or \.npz"):
        UCF101(tmp_path, num_frames=16)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="no usable video"):
        UCF101(tmp_path, num_frames=16)
    with pytest.raises(ValueError, match="unknown ucf101 protocol"):
        UCF101(tmp_path, "mcvd", num_frames=16)
    with pytest.raises(ValueError, match="workload pan does not take these clip options"):
        make_workload("pan", data_dir=str(tmp_path))


@pytest.mark.parametrize("protocol", ["benchmark", "far"])
def test_an_episode_runs_on_a_real_clip_with_the_embedded_host(samples, protocol):
    options = {"data_dir": str(samples), "protocol": protocol}
    env = FrameRetentionEnv(
        "ucf101_short_prediction", 4, host="embedded", split="test", device="cpu", clip_options=options, metrics=("ssim",)
    )
    env.reset(seed=0)
    done, steps = False, 0
    while not done:
        _, reward, done, _, info = env.step(np.ones(6, dtype=np.int8))
        steps += 1
    assert steps == 10 and reward == info["psnr"] > 0 and -1 <= info["ssim"] <= 1
    with pytest.raises(ValueError, match="ucf101_short_prediction/train has no clips"):
        FrameRetentionEnv("ucf101_short_prediction", 4, host="embedded", device="cpu", clip_options=options)


def write_episode(path, num_frames, **arrays):
    video = np.zeros((num_frames, 64, 64, 3), dtype=np.uint8)
    video[:] = np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    np.savez_compressed(path, **({"video": video, "actions": np.zeros(num_frames, dtype=np.int64)} | arrays))
    return path


def test_npz_episodes_are_read_like_videos(tmp_path):
    path = write_episode(tmp_path / "episode_1.npz", 80)
    assert count_frames(path) == 80
    np.testing.assert_array_equal(np.stack(read_frames(path, 4, 3))[:, 0, 0, 0], [4, 5, 6])
    with pytest.raises(VideoError, match="frames 79 to 80 were requested, 80 are there"):
        read_frames(path, 79, 2)
    clip = DMLab(tmp_path, "far", num_frames=72).clip("test", 0)
    np.testing.assert_allclose(clip.frames[:, 1, 3, 3] * 255, np.arange(72), atol=1e-3)


def test_damaged_npz_episodes_are_skipped_with_the_reason(tmp_path):
    good = write_episode(tmp_path / "good.npz", 80)
    content = good.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.npz").touch()
    write_episode(tmp_path / "float.npz", 80, video=np.zeros((80, 64, 64, 3)))
    np.savez(tmp_path / "other.npz", frames=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", video=np.array([{"a": 1}], dtype=object))
    source = DMLab(tmp_path, num_frames=72)
    reasons = {path.name: reason for path, reason in source.skipped.items()}
    assert set(reasons) == {"cut.npz", "empty.npz", "float.npz", "other.npz", "pickle.npz"}
    assert "must be uint8 (T, H, W, 3), got float64" in reasons["float.npz"]
    assert "holds no array 'video'" in reasons["other.npz"]
    assert sum(source.num_clips(split) for split in ("train", "validation", "test")) == 1


@pytest.fixture(params=["made", "real"])
def long_workload(request, tmp_path, tiny_long_host):
    """The benchmark's long workload on a small FAR-Long and autoencoder, two ODE steps."""
    data = tmp_path / "data"
    data.mkdir()
    if request.param == "real":
        (data / "episode.npz").symlink_to(request.getfixturevalue("samples") / "dmlab_episode_5.npz")
    else:
        rng = np.random.default_rng(0)
        video = np.cumsum(rng.integers(-9, 10, (300, 64, 64, 3)), axis=0).astype(np.uint8)
        write_episode(data / "episode.npz", 300, video=video, actions=rng.integers(0, 3, 300))
    configs = {"transformer": TINY_FAR_LONG, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    models = tiny_long_host.transformer, tiny_long_host.autoencoder
    save_host(tmp_path / "host", *models, configs, frame_size=64, num_steps=7)
    workload = make_workload("dmlab_long_prediction", host=tmp_path / "host", device="cpu", data_dir=data)
    assert (workload.num_context, workload.num_predict, workload.num_steps) == (36, 36, 20)
    return replace(workload, num_steps=2)


def test_the_long_workload_runs_on_an_episode(long_workload):
    env = FrameRetentionEnv(long_workload, "medium_history_budget", split="test")
    obs, info = env.reset(seed=0)
    assert obs["mask"].sum() == 37 and len(info["kept_frames"]) == 37, "the first decision is from 37 frames"
    done, steps = False, 0
    while not done:
        _, reward, done, _, info = env.step(np.ones(env.action_space.n, dtype=np.int8))
        steps += 1
    assert steps == 35 and info["kept_frames"] == list(range(63, 72)) and reward == info["psnr"] > 0


def test_its_host_receives_null_actions_whatever_the_episodes_are(long_workload):
    workload = replace(long_workload, num_predict=5)
    transformer, clip = workload.host.transformer, workload.clips.clip("test", 0)
    assert clip.actions.shape == (72,) and set(clip.actions) <= {0, 1, 2}
    batch, _ = play(workload, [clip], [42], NewestFrames(), 8)
    exact = reference_rollout(workload, clip, NewestFrames(), 8, 42)
    torch.testing.assert_close(batch.generated([0])[0], exact.latents, atol=1e-4, rtol=0)
    other, _ = play(workload, [replace(clip, actions=2 - clip.actions)], [42], NewestFrames(), 8)
    assert torch.equal(batch.generated([0]), other.generated([0]))
    latents, times = exact.latents[None, :2], torch.tensor([[-1.0, 500.0]])
    null, real = (transformer(latents, times, action=torch.full((1, 2), action)) for action in (3, 0))
    assert (null - real).abs().max() > 1e-3, "an action would have made a difference"


def test_a_host_for_other_frame_sizes_is_refused(tmp_path, monkeypatch, tiny_host):
    write_episode(tmp_path / "good.npz", 80)
    monkeypatch.setattr("far_env.workloads.load_host", lambda *_: replace(tiny_host, frame_size=128))
    with pytest.raises(ValueError, match="works on frames of 128², the clips of dmlab_long_prediction have 64²"):
        make_workload("dmlab_long_prediction", data_dir=str(tmp_path))
