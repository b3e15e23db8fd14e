"""Real input: decoding, both protocols, and files that cannot be used."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from far_env.clips.benchmark_files import write_clip_list
from far_env.clips.datasets import UCF101, DMLab
from far_env.clips.video import VideoError, count_frames, crop_centre, read_frames, to_pixels
from far_env.contract import NewestFrames
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.host.weights import save_host
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workloads import make_workload
from tests.conftest import DATA, TINY_DCAE, TINY_FAR_LONG


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


def test_squeezed_frames_are_those_of_the_benchmarks_reader():
    """What decord gave at width = height = 64, to the last bit; resizing RGB pixels with antialiasing is something else."""
    expected = np.load(DATA / "harness" / "decode.npz")
    start, frames = int(expected["start"]), expected["frames"]
    squeezed = read_frames(DATA / "harness" / "decode.mp4", start, len(frames), 64)
    np.testing.assert_array_equal(np.stack(squeezed), frames)
    pixels = torch.from_numpy(np.stack(read_frames(DATA / "harness" / "decode.mp4", start, len(frames))))
    resized = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (64, 64), mode="bilinear", antialias=True)
    assert np.abs(resized.permute(0, 2, 3, 1).numpy() - frames).mean() > 1


def test_squeezing_keeps_everything_and_cropping_keeps_the_aspect(tmp_path):
    frames = np.zeros((2, 64, 128, 3), dtype=np.uint8)
    frames[:, :, :32] = 255  # the left quarter
    np.savez(tmp_path / "episode.npz", video=frames)
    squeezed, cropped = to_pixels(read_frames(tmp_path / "episode.npz", 0, 2, 64)), crop_centre(frames, 64)
    assert squeezed.shape == cropped.shape == (2, 3, 64, 64)
    assert squeezed.dtype == np.float32 and squeezed.min() >= 0 and squeezed.max() <= 1
    assert squeezed[..., :14].min() > 0.9 and squeezed[..., 18:].max() < 0.1
    assert cropped.max() < 0.1, "the centre of 128 columns starts at column 32"
    tall = crop_centre(frames.transpose(0, 2, 1, 3), 32)
    assert tall.shape == (2, 3, 32, 32) and tall[:, :, 2:].max() < 0.1
    noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    np.savez(tmp_path / "noise.npz", video=noise)
    np.testing.assert_array_equal(read_frames(tmp_path / "noise.npz", 0, 1, 64), noise)


LENGTHS = {f"c{i % 3}/v{i:02d}.mp4": 14 if i % 7 == 3 else 16 + 3 * (i % 5) for i in range(14)}
"""Of videos, of which some are shorter than a clip."""


class FewUCF101(UCF101):
    benchmark_clips = 5


class FewDMLab(DMLab):
    benchmark_clips = 5


def restated(files, lengths, num_clips, damaged=()):
    """The benchmark's way from a list of files to its clips: one generator shuffles, then draws a start for every file that is
    long enough; what cannot be read after its draw is left out."""
    rng, files, clips = random.Random(42), list(files), []
    rng.shuffle(files)
    for place, name in enumerate(files):
        if len(clips) == num_clips:
            return clips, files[place:]
        if lengths.get(name, 0) < 16:
            continue
        start = rng.randint(0, lengths[name] - 16)
        if name not in damaged:
            clips.append((name, start))
    return clips, []


def places(source, split="test"):
    """File and first frame of every clip of a split."""
    found = [source.place(split, i) for i in range(source.num_clips(split))]
    return [(path.relative_to(source.folder).as_posix(), start) for path, start in found]


@pytest.fixture
def many(tmp_path):
    for name, length in LENGTHS.items():
        write_video(tmp_path / "ucf" / "video" / name, length)
    (tmp_path / "ucf" / "video" / "c0" / "text.mp4").write_text("this is no video")
    # Neither is found by the benchmark: another kind of file, and one beside the folder that it searches.
    write_video(tmp_path / "ucf" / "video" / "c0" / "other.avi", 20)
    write_video(tmp_path / "ucf" / "beside.mp4", 20)
    return tmp_path / "ucf"


def test_the_benchmarks_clips_are_drawn_as_it_draws_them(many):
    source = FewUCF101(many, num_frames=16)
    names = sorted([f"video/{name}" for name in LENGTHS] + ["video/c0/text.mp4"])
    expected, rest = restated(names, {f"video/{name}": length for name, length in LENGTHS.items()}, 5)
    assert places(source) == expected and len(expected) == 5
    assert source.found_by_benchmark
    usable = [name for name in rest if LENGTHS.get(name.removeprefix("video/"), 0) >= 16]
    assert [name for split in ("validation", "train") for name, _ in places(source, split)] == usable
    assert source.num_clips("validation") == 1 and len(usable) > 3
    for clip_id, (_, start) in enumerate(expected):
        clip = source.clip("test", clip_id)
        assert clip.frames.shape == (16, 3, 64, 64) and clip.actions is None
        assert round(clip.frames[0, :, 10:-10, 40:].mean() * 255 / 8) == start
    assert {start for _, start in expected} > {0}


def test_where_there_are_fewer_files_the_benchmark_plays_them_all(many):
    source = UCF101(many, num_frames=16)
    assert source.num_clips("test") == sum(length >= 16 for length in LENGTHS.values()) == 12
    assert source.num_clips("train") == source.num_clips("validation") == 0


def test_a_file_that_is_damaged_in_its_clip_has_had_its_draw(many):
    first, _ = places(FewUCF101(many, num_frames=16))[0]
    content = bytearray((many / first).read_bytes())
    for place in range(len(content) // 8, len(content) // 2, 5):
        content[place] ^= 0xFF
    (many / first).write_bytes(content)
    source = FewUCF101(many, num_frames=16)
    names = sorted([f"video/{name}" for name in LENGTHS] + ["video/c0/text.mp4"])
    lengths = {f"video/{name}": length for name, length in LENGTHS.items()}
    assert places(source) == restated(names, lengths, 5, damaged=(first,))[0]
    assert many / first in source.skipped


def test_dmlab_has_its_mp4_files_before_its_avi_files(tmp_path):
    for i in range(9):
        write_video(tmp_path / f"{i}{'.avi' if i < 4 else '.mp4'}", 20)
    names = [f"{i}.mp4" for i in range(4, 9)] + [f"{i}.avi" for i in range(4)]
    source = FewDMLab(tmp_path, num_frames=16)
    assert places(source) == restated(names, dict.fromkeys(names, 20), 5)[0]


def test_a_list_of_files_repeats_a_run(many, tmp_path):
    """The order of another machine's file system, with its folders, and a file that is not here."""
    names = [*reversed(LENGTHS), "c1/gone.mp4"]
    order = tmp_path / "order.txt"
    order.write_text("".join(f"/data/ucf101/video/{name}\n" for name in names) + "\n")
    source = FewUCF101(many, file_order=order, num_frames=16)
    lengths = {f"video/{name}": length for name, length in LENGTHS.items()}
    listed = [f"video/{name}" for name in names]
    assert places(source) == restated(listed, lengths, 5)[0] != places(FewUCF101(many, num_frames=16))
    order.write_text("".join(f"{name}\n" for name in names))
    assert places(FewUCF101(many, file_order=order, num_frames=16)) == places(source)
    for text, message in (("\n", "names no file"), ("a.mp4\na.mp4\n", r"names .*a\.mp4 twice")):
        order.write_text(text)
        with pytest.raises(ValueError, match=message):
            UCF101(many, file_order=order, num_frames=16)
    with pytest.raises(ValueError, match="cannot be read"):
        UCF101(many, file_order=tmp_path / "gone.txt", num_frames=16)
    with pytest.raises(ValueError, match="a file order is for the benchmark's data sets"):
        UCF101(many, "far", file_order=order, num_frames=16)


def test_files_that_the_benchmark_plays_can_be_kept_from_training_under_fars_protocol(many, tmp_path):
    source = FewUCF101(many, num_frames=16)
    played = [source.place("test", i) for i in range(5)]
    write_clip_list(tmp_path / "clips.json", source.folder, "ucf101_short_prediction", 16, played)
    whole, kept = UCF101(many, "far", num_frames=16), UCF101(many, "far", num_frames=16, exclude=tmp_path / "clips.json")
    names = {path.relative_to(many).as_posix() for path, _ in played}
    for split in ("train", "validation"):
        assert places(kept, split) == [(name, start) for name, start in places(whole, split) if name not in names]
    assert places(kept) == places(whole) and kept.num_clips("train") < whole.num_clips("train")
    (tmp_path / "clips.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no list of clips; give a file that far-env benchmark --list-clips wrote"):
        UCF101(many, "far", num_frames=16, exclude=tmp_path / "clips.json")


def test_folders_without_files_of_the_benchmark_are_played_all_the_same(tmp_path):
    for i in range(7):
        write_video(tmp_path / f"{i}.avi", 18)
    source = FewUCF101(tmp_path, num_frames=16)
    assert not source.found_by_benchmark and source.num_clips("test") == 5


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
        source = UCF101(folder, "far", num_frames=16)
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
    with pytest.raises(ValueError, match="workload pan does not take the clip option data_dir"):
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


def test_clips_of_all_classes_in_turn_at_an_interval(tmp_path):
    """FAR's generation of UCF-101: every third frame from the first on, or successive ones of a video that is too short."""
    entries = []
    for i, (label, length) in enumerate([(7, 20), (7, 20), (2, 20), (7, 8), (5, 20), (2, 5), (9, 4)]):
        write_video(tmp_path / f"{i}.mp4", length)
        entries.append({"video_path": f"datasets/ucf101/{i}.mp4", "label": label})
    (tmp_path / "trainval.json").write_text(json.dumps(entries))
    source = UCF101(tmp_path, "far", num_frames=5, interval=3, class_list="trainval.json")
    clips = [source.clip("test", i) for i in range(source.num_clips("test"))]
    assert [clip.label for clip in clips] == [2, 5, 7, 2, 7, 7], "6.mp4 has too few frames for any clip"
    for i, clip in enumerate(clips):
        numbers = np.arange(5) * (1 if source.path("test", i).stem in ("3", "5") else 3)
        assert clip.frames.shape == (5, 3, 64, 64)
        np.testing.assert_allclose(255 * clip.frames[:, :, :, 40:].mean(axis=(1, 2, 3)), 8 * numbers, atol=4)
    again = UCF101(tmp_path, "far", num_frames=5, interval=3, class_list="trainval.json")
    assert [again.path("test", i) for i in range(6)] == [source.path("test", i) for i in range(6)]
    for options, sentence in (({"interval": 0}, "from 1 on"), ({"protocol": "benchmark", "interval": 2}, "protocol far")):
        with pytest.raises(ValueError, match=sentence):
            UCF101(tmp_path, **{"protocol": "far", "num_frames": 5} | options)
    (tmp_path / "trainval.json").write_text(json.dumps([{"video_path": "0.mp4"}]))
    with pytest.raises(ValueError, match=r"trainval.json, entry 0: needs a video with a label"):
        UCF101(tmp_path, "far", num_frames=5, class_list="trainval.json")
