"""The data sets in their released form: lists, actions, latents, the index of headers, and the report of data check."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch

from far_env import cli
from far_env.clips import arrays, index
from far_env.clips.check import check_data
from far_env.clips.datasets import BAIR, UCF101, DMLab, Minecraft
from far_env.clips.index import Index
from far_env.clips.recordings import Recording, find_recordings
from far_env.contract import NewestFrames
from far_env.errors import VideoError
from far_env.io import cache_dir
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from far_env.workloads import make_workload
from tests.clips.test_video import write_episode, write_video

SPLITS = ("train", "validation", "test")


def write_list(path, entries):
    path.write_text(json.dumps(entries))
    return path


def names(source, split):
    return [source.path(split, i).stem for i in range(source.num_clips(split))]


def numbered(num_frames):
    """Actions by which frames can be recognised."""
    return np.arange(num_frames, dtype=np.int64) % 4


@pytest.fixture
def ucf(tmp_path):
    """FAR's layout: the lists name files from the root of its repository."""
    for split, count in (("train", 21), ("test", 12)):
        for i in range(count):
            write_video(tmp_path / "video" / "Class" / f"{split}{i:02d}.mp4", 16)
        # Not in the order of the names, and with a path that is right only without its first two folders.
        order = [f"datasets/ucf101/video/Class/{split}{i:02d}.mp4" for i in reversed(range(count))]
        write_list(tmp_path / f"{split}03.json", [{"video_path": name, "label": 3} for name in order])
    return tmp_path


def test_lists_are_the_splits_of_fars_protocol(ucf):
    source = UCF101(ucf, "far", num_frames=16)
    assert names(source, "test") == ["test11", "test01"], "every tenth entry of the test list"
    assert names(source, "validation") == ["train19", "train09"], "every tenth entry of the training list, from the second"
    assert names(source, "train") == [f"train{i:02d}" for i in reversed(range(21)) if i not in (19, 9)]
    assert source.clip("test", 0).frames.shape == (16, 3, 64, 64)
    benchmark = UCF101(ucf, "benchmark", num_frames=16)
    assert [benchmark.num_clips(split) for split in SPLITS] == [0, 0, 33], "the benchmark would play them all"


def test_of_several_lists_fars_is_used(ucf):
    write_list(ucf / "test01.json", [])
    assert len(names(UCF101(ucf, "far", num_frames=16), "test")) == 2
    with pytest.raises(ValueError, match=r"several lists for test \(test01.json, test03.json\); leave one"):
        BAIR(ucf, "far", num_frames=16)


def test_an_entry_whose_file_is_missing_is_skipped_with_the_reason(ucf):
    (ucf / "video" / "Class" / "test01.mp4").unlink()
    source = UCF101(ucf, "far", num_frames=16)
    assert names(source, "test") == ["test11"]
    (path,) = source.skipped
    assert path.name == "test01.mp4" and "No such file" in source.skipped[path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "test03.json cannot be read as JSON"),
        ("{}", "test03.json must hold a JSON list of entries, got dict"),
        ('[{"video_path": "a.mp4"}, {"label": 1}]', "test03.json, entry 1: needs the name of a file"),
        ('[{"video_path": 7}]', "test03.json, entry 0: needs the name of a file"),
    ],
)
def test_damaged_lists_are_refused(ucf, text, message):
    (ucf / "test03.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        UCF101(ucf, "far", num_frames=16)


def test_bair_needs_no_action_files_and_tests_on_its_whole_list(tmp_path):
    for i in range(3):
        write_video(tmp_path / "videos" / f"{i}.mp4", 30, width=64)
    entries = [{"video_path": f"datasets/bair/videos/{i}.mp4", "action_path": f"datasets/bair/{i}.npz"} for i in range(3)]
    write_list(tmp_path / "bair_val.json", entries)
    source = BAIR(tmp_path, "far", num_frames=30)
    assert names(source, "test") == ["0", "1", "2"] and source.num_clips("train") == 0
    assert source.clip("test", 2).actions is None and not source.skipped


@pytest.fixture
def minecraft(tmp_path):
    for i in range(4):
        write_video(tmp_path / "data" / f"{i}.mp4", 20, width=128, height=128)
        np.savez(tmp_path / "data" / f"{i}.npz", actions=numbered(20))
    return tmp_path


@pytest.mark.parametrize("listed", [False, True])
def test_minecraft_pairs_videos_with_their_actions(minecraft, listed):
    if listed:
        entries = [{"video_path": f"datasets/minecraft/data/{i}.mp4", "action_path": f"data/{i}.npz"} for i in range(4)]
        write_list(minecraft / "minecraft_train.json", entries)
        sources = [Minecraft(minecraft, "far", num_frames=16)]
        assert [sources[0].num_clips(split) for split in SPLITS] == [3, 1, 0]
    else:
        sources = [Minecraft(minecraft, protocol, num_frames=16) for protocol in ("far", "benchmark")]
        assert all(sum(source.num_clips(split) for split in SPLITS) == 4 for source in sources)
    for source in sources:
        assert source.size == 128
        clip = source.clip("train", 0)
        assert clip.frames.shape == (16, 3, 128, 128) and clip.actions.dtype == np.int64
        start = round(float(clip.frames[0, :, 20:-20, 70:-20].mean() * 255 / 8))  # frames encode their number
        np.testing.assert_array_equal(clip.actions, numbered(20)[start : start + 16])


def test_dmlab_clips_carry_the_actions_of_their_frames(tmp_path):
    for i in range(8):
        write_episode(tmp_path / f"{i}.npz", 100, actions=numbered(100))
    source = DMLab(tmp_path, "benchmark", num_frames=72)
    starts = []
    for split in SPLITS:
        for clip_id in range(source.num_clips(split)):
            clip = source.clip(split, clip_id)
            starts.append(round(float(clip.frames[0, 0, 0, 0] * 255)))
            np.testing.assert_array_equal(clip.actions, numbered(100)[starts[-1] : starts[-1] + 72])
    assert len(set(starts)) > 2


def test_the_real_episode_has_its_actions(samples):
    source = DMLab(samples, "far", num_frames=300)
    with np.load(samples / "dmlab_episode_5.npz") as episode:
        clip = source.clip("test", 0)
        np.testing.assert_array_equal(clip.actions, episode["actions"])
        np.testing.assert_allclose(clip.frames, episode["video"].transpose(0, 3, 1, 2) / 255, atol=1e-6)


def test_actions_that_do_not_fit_are_reported(tmp_path):
    write_episode(tmp_path / "a.npz", 80, actions=np.full(80, 4))
    write_episode(tmp_path / "b.npz", 80, actions=np.zeros(80))
    write_episode(tmp_path / "c.npz", 80, actions=np.zeros(71, dtype=np.int64))
    source = DMLab(tmp_path, "far", num_frames=72)
    reasons = {path.name: reason for path, reason in source.skipped.items()}
    assert "'actions' must be integers (T,), got float64 (80,)" in reasons["b.npz"]
    assert "has 71 frames, clips need 72" in reasons["c.npz"], "a frame without its action cannot be used"
    with pytest.raises(VideoError, match=r"a\.npz holds actions from 4 to 4, valid are 0 to 3"):
        source.clip("test", 0)
    report = check_data(tmp_path, "dmlab")
    assert len(report.damaged) == 2 and any("holds actions from 4 to 4" in reason for reason in report.damaged)


def test_episodes_without_actions_and_videos_of_dmlab_are_clips_without_them(tmp_path):
    np.savez(tmp_path / "a.npz", video=np.zeros((16, 64, 64, 3), dtype=np.uint8))
    write_video(tmp_path / "b.mp4", 16)
    source = DMLab(tmp_path, "far", num_frames=16)
    assert source.clip("test", 0).actions is None and source.clip("validation", 0).actions is None


@pytest.fixture
def latent_folder(tmp_path, tiny_host):
    """Three episodes and their latents as FAR stores them: not scaled, listed for training."""
    videos, latents = tmp_path / "videos", tmp_path / "latents"
    videos.mkdir(), latents.mkdir()
    rng, entries = np.random.default_rng(0), []
    for i in range(3):
        video = rng.integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
        write_episode(videos / f"{i}.npz", 20, video=video, actions=numbered(20))
        pixels = torch.from_numpy(video).permute(0, 3, 1, 2)[None] / 255
        encoded = tiny_host.autoencoder.encode(pixels)[0] / tiny_host.autoencoder.scaling_factor
        torch.save(encoded, latents / f"{i}.pt")
        np.savez(latents / f"{i}.npz", actions=numbered(20))
        entries.append({"latent_path": f"datasets/dmlab_latent/{i}.pt", "action_path": f"datasets/dmlab_latent/{i}.npz"})
    write_list(latents / "dmlab_train.json", entries)
    return tmp_path


def test_a_rollout_from_latents_is_the_one_from_the_pixels_they_were_encoded_from(latent_folder, tiny_long_host):
    pixels = DMLab(latent_folder / "videos", "far", num_frames=12).clip("train", 0)
    source = DMLab(latent_folder / "latents", "far", num_frames=12)
    assert [source.num_clips(split) for split in SPLITS] == [2, 1, 0]
    with pytest.raises(ValueError, match=r"0\.pt holds latents, which only a host can decode"):
        source.clip("train", 0)
    source.host = tiny_long_host
    clip = source.clip("train", 1)
    assert clip.latents.shape == (12, 4, 8, 8) and clip.frames.shape == (12, 3, 64, 64)
    np.testing.assert_array_equal(clip.actions, pixels.actions)
    workload = Workload("latents", source, tiny_long_host, num_context=8, num_predict=4, num_steps=2)
    (from_latents, _), (from_pixels, _) = (play(workload, [source], [5], NewestFrames(), 4) for source in (clip, pixels))
    torch.testing.assert_close(from_latents.generated([0]), from_pixels.generated([0]), atol=1e-4, rtol=0)
    exact = reference_rollout(workload, clip, NewestFrames(), 4, 5)
    torch.testing.assert_close(from_latents.generated([0])[0], exact.latents, atol=1e-4, rtol=0)
    decoded = tiny_long_host.autoencoder.decode(torch.from_numpy(clip.latents)[None])[0]
    torch.testing.assert_close(torch.from_numpy(clip.frames), decoded)


def test_a_workload_sets_the_host_of_latents_and_they_are_never_test_clips(latent_folder, tiny_host_folder, monkeypatch):
    options = {"data_dir": latent_folder / "latents", "num_frames": 20}
    write_list(latent_folder / "latents" / "dmlab_val.json", [{"latent_path": "0.pt", "action_path": "0.npz"}])
    workload = make_workload("dmlab_long_prediction", host=tiny_host_folder, device="cpu", protocol="far", **options)
    assert workload.clips.num_clips("test") == 0 and workload.clips.clip("validation", 0).frames.shape == (20, 3, 64, 64)
    with pytest.raises(ValueError, match=r"all 3 are damaged or shorter than 20 frames; protocol far uses its lists"):
        make_workload("dmlab_long_prediction", host=tiny_host_folder, **options)


class Malicious:
    """Unpickling this fails the test."""

    def __reduce__(self):
        return pytest.fail, ("executed",)


def test_files_without_usable_latents_are_skipped_or_refused(latent_folder, tiny_host):
    folder = latent_folder / "latents"
    torch.save(Malicious(), folder / "0.pt")
    torch.save({"latents": torch.zeros(20, 4, 8, 8)}, folder / "1.pt")
    torch.save(torch.full((20, 4, 8, 8), torch.nan), folder / "2.pt")
    torch.save(torch.zeros(20, 3, 8, 8), folder / "3.pt")
    entries = [{"latent_path": f"{i}.pt", "action_path": "0.npz"} for i in (0, 3, 1, 2)]
    write_list(folder / "dmlab_train.json", entries)
    source = DMLab(folder, "far", num_frames=12)
    reasons = {path.name: reason for path, reason in source.skipped.items()}
    assert set(reasons) == {"0.pt", "1.pt"}
    assert "cannot be read as a tensor of latents" in reasons["0.pt"] and "one tensor of floats" in reasons["1.pt"]
    source.host = tiny_host
    with pytest.raises(VideoError, match=r"3\.pt holds latents \(3, 8, 8\), the host .* has \(4, 8, 8\)"):
        source.clip("validation", 0)
    with pytest.raises(VideoError, match=r"2\.pt holds latents that are not finite"):
        source.clip("train", 0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FAR_ENV_CACHE", str(folder))
    assert cache_dir() == folder
    return folder


@pytest.fixture
def examined(monkeypatch):
    """Names of the files whose headers are read."""
    names, examine = [], index.examine
    monkeypatch.setattr(index, "examine", lambda recording: (names.append(recording.path.name), examine(recording))[1])
    return names


def test_headers_are_read_once_until_a_file_changes(tmp_path, cache, examined):
    data = tmp_path / "data"
    for i in range(3):
        write_video(data / f"{i}.mp4", 16)
    (data / "x.mp4").write_text("no video")
    first = UCF101(data, num_frames=16)
    assert sorted(examined) == ["0.mp4", "1.mp4", "2.mp4", "x.mp4"]
    examined.clear()
    again = UCF101(data, num_frames=16)
    assert not examined and again.skipped == first.skipped and names(again, "test") == names(first, "test")
    write_video(data / "1.mp4", 12)
    changed = UCF101(data, num_frames=16)
    assert examined == ["1.mp4"] and "has 12 frames" in changed.skipped[data / "1.mp4"]
    examined.clear()
    (file,) = (cache / "index").iterdir()
    file.write_text("{damaged")
    assert UCF101(data, num_frames=16).skipped == changed.skipped and len(examined) == 4, "a damaged cache is written again"
    examined.clear()
    assert UCF101(data, num_frames=16).skipped == changed.skipped and not examined


def test_the_same_file_read_as_other_data_is_another_entry(tmp_path, cache):
    path = write_episode(tmp_path / "a.npz", 20)
    for recording, expected in ((Recording(path), None), (Recording(path, path), 20), (Recording(path), None)):
        (info,) = Index(tmp_path).info([recording])
        assert (info.frames, info.actions) == (20, expected)


def test_without_a_writable_cache_headers_are_read_every_time(tmp_path, monkeypatch, examined):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAR_ENV_CACHE", str(tmp_path / "file"))
    write_video(tmp_path / "data" / "a.avi", 16)
    for _ in range(2):
        assert UCF101(tmp_path / "data", num_frames=16).num_clips("test") == 1
    assert examined == ["a.avi", "a.avi"]


def test_what_was_read_before_ctrl_c_is_stored(tmp_path, cache, monkeypatch):
    recordings = [Recording(write_video(tmp_path / "data" / f"{i}.avi", 16)) for i in range(3)]
    examine = index.examine

    def stopped(recording):
        if recording == recordings[2]:
            raise KeyboardInterrupt
        return examine(recording)

    monkeypatch.setattr(index, "examine", stopped)
    with pytest.raises(KeyboardInterrupt):
        Index(tmp_path / "data").info(recordings)
    monkeypatch.setattr(index, "examine", lambda recording: pytest.fail("read again"))
    assert [info.frames for info in Index(tmp_path / "data").info(recordings[:2])] == [16, 16]


def test_an_episode_is_indexed_by_its_headers_alone_and_checked_when_it_is_read(tmp_path, monkeypatch):
    """The compressed pictures are damaged; only reading them shows it."""
    video = np.random.default_rng(0).integers(0, 256, (80, 64, 64, 3), dtype=np.uint8)
    path = write_episode(tmp_path / "a.npz", 80, video=video)
    with zipfile.ZipFile(path) as file:
        (entry,) = (entry for entry in file.infolist() if entry.filename == "video.npy")
    content = bytearray(path.read_bytes())
    middle = entry.header_offset + entry.compress_size // 2
    content[middle : middle + 4] = bytes(4)
    path.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "_read", lambda *_: pytest.fail("pictures were read"))
        source = DMLab(tmp_path, "far", num_frames=72)
        assert source.num_clips("test") == 1
    with pytest.raises(VideoError, match=r"a\.npz cannot be read as an \.npz file"):
        source.clip("test", 0)


def test_a_frame_that_the_decoder_conceals_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.avi", 40)
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    for place in range(third, 2 * third, 40):
        content[place] ^= 0xFF
    path.write_bytes(content)
    source = UCF101(tmp_path, "far", num_frames=40)
    with pytest.raises(VideoError, match=r"a\.avi is damaged"):
        source.clip("test", 0)


def check(capsys, *args):
    status = cli.main(["data", "check", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_data_check_reports_what_is_usable(ucf, capsys):
    (ucf / "video" / "empty.mp4").touch()
    write_video(ucf / "video" / "short.mp4", 9)
    cut = ucf / "video" / "Class" / "test11.avi"
    content = write_video(cut, 40).read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3])
    status, out, _ = check(capsys, ucf, "--quick", "--dataset", "bair")
    assert status == 2 and "read as bair, clips of 30 frames" in out and "damaged: 1 files; 35 others were not decoded" in out
    status, out, err = check(capsys, ucf)
    assert status == 2 and err.strip() == "far-env: error: 2 of 36 files are damaged; the report names them"
    assert "36 files, read as ucf101 (guessed" in out and "clips of 16 frames" in out
    assert "list for train: train03.json" in out and "list for test: test03.json" in out
    assert "lengths: 9 to 40 frames, median 16; 1 too short" in out
    assert "protocol far: 19 train, 2 validation, 2 test clips" in out
    (line,) = [line for line in out.splitlines() if line.startswith("protocol benchmark")]
    assert sum(int(word) for word in line.split() if word.isdigit()) == 33, "neither the short nor the damaged ones"
    assert "damaged: 2 files; all others were decoded completely" in out
    assert "empty.mp4 is empty" in out and "test11.avi" in out
    assert check(capsys, ucf, "--dataset", "bair")[0] == 2, "the one file that is long enough is damaged"


def test_data_check_reads_episodes_actions_and_latents(tmp_path, latent_folder, minecraft, capsys):
    status, out, _ = check(capsys, latent_folder / "videos", "--frames", "20")
    assert status == 0 and "3 files, read as dmlab (guessed" in out and "actions: with 3 files" in out
    status, out, _ = check(capsys, latent_folder / "latents", "--frames", "20")
    assert status == 0 and "3 files, read as dmlab" in out, "the actions beside the latents are not counted as files"
    assert "protocol far: 2 train, 1 validation, 0 test clips" in out and "protocol benchmark: no usable video" in out
    status, out, _ = check(capsys, minecraft / "data", "--frames", "16")
    assert status == 0 and "4 files, read as minecraft" in out and "actions: with 4 files" in out


def test_data_check_decodes_files_once(ucf, cache, capsys, monkeypatch):
    first = check(capsys, ucf)[:2]
    monkeypatch.setattr(index, "decode_completely", lambda *_: pytest.fail("read again"))
    assert check(capsys, ucf)[:2] == first


def test_data_check_fails_where_nothing_is_usable(tmp_path, capsys):
    assert "does not exist" in check(capsys, tmp_path / "nowhere")[2]
    assert check(capsys, tmp_path)[0] == 2
    write_video(tmp_path / "a.mp4", 8)
    status, out, err = check(capsys, tmp_path)
    assert status == 2 and "1 too short" in out
    assert err.strip().endswith("can be used for clips of 16 frames") and "Traceback" not in err
    assert check(capsys, tmp_path, "--frames", "8")[0] == 0
    assert "did you mean 'bair'" in check(capsys, tmp_path, "--dataset", "bear")[2]
    assert "at least 1 frame, got 0" in check(capsys, tmp_path, "--frames", "0")[2]


def test_an_archive_beside_a_video_of_its_name_is_no_episode(minecraft):
    recordings = find_recordings(minecraft)
    assert [recording.path.name for recording in recordings] == [f"{i}.mp4" for i in range(4)]
    assert all(recording.actions == recording.path.with_suffix(".npz") for recording in recordings)
