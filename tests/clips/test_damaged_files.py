"""Damaged videos, episodes, latents and lists are read correctly or refused in one sentence; nothing in them is executed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from far_env.clips.arrays import read_actions
from far_env.clips.check import check_data
from far_env.clips.datasets import UCF101, DMLab
from far_env.clips.latents import check_latents, count_latents, read_latents
from far_env.clips.recordings import read_list
from far_env.clips.video import VideoError, check_frames, count_frames, read_frames
from tests.clips.test_odd_files import write_long
from tests.clips.test_video import write_episode, write_video
from tests.damage import Code, assert_sentence, damaged, write_code


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One file of each kind that videos, episodes and latents come in."""
    folder = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(0)
    write_video(folder / "a.mp4", 16)
    write_video(folder / "a.avi", 16)
    write_long(folder / "b.mp4", 16)
    write_episode(folder / "a.npz", 16, video=rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8))
    np.savez(folder / "b.npz", video=rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8), actions=np.arange(16) % 4)
    torch.save(torch.randn(16, 4, 8, 8), folder / "a.pt")
    return folder


def refused(path, function, *args):
    """The result of ``function(path, *args)``, or None if it refuses the file in one sentence."""
    try:
        return function(path, *args)
    except VideoError as error:
        assert_sentence(error, path)
        return None


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "b.mp4"])
def test_a_hundred_damaged_videos(originals, tmp_path, name):
    """These formats have no checksums, so pictures may become others; their number, type and dimensions hold."""
    path, content = tmp_path / name, (originals / name).read_bytes()
    refusals = 0
    for seed in range(100):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        count = refused(path, count_frames)
        refused(path, check_frames)
        frames = refused(path, read_frames, 2, 10)
        refusals += frames is None
        assert count is None or count >= 0
        if frames is not None:
            assert len(frames) == 10 and all(frame.dtype == np.uint8 and frame.shape[2:] == (3,) for frame in frames)
    assert refusals >= 10


@pytest.mark.parametrize("name", ["a.npz", "b.npz"])
def test_a_hundred_damaged_episodes(originals, tmp_path, name):
    path, content = tmp_path / name, (originals / name).read_bytes()
    with np.load(originals / name) as arrays:
        video, actions = arrays["video"], arrays["actions"]
    refusals = 0
    for seed in range(100):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        refused(path, count_frames)
        for function, args, expected in ((read_frames, (0, 16), video), (read_actions, (4,), actions)):
            frames = refused(path, function, *args)
            refusals += frames is None
            if frames is not None:
                np.testing.assert_array_equal(np.stack(frames), expected)
    assert refusals > 50


def test_a_hundred_damaged_latents(originals, tmp_path):
    path, content = tmp_path / "a.pt", (originals / "a.pt").read_bytes()
    expected = torch.load(originals / "a.pt", weights_only=True)
    refusals = 0
    for seed in range(100):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        refused(path, count_latents)
        refused(path, check_latents)
        latents = refused(path, read_latents, 0, 16)
        refusals += latents is None
        assert latents is None or torch.equal(latents, expected), f"seed {seed}: loaded with other values"
    assert refusals > 80


def write_header(path, header: bytes):
    """An .npz file whose array ``video`` is this header alone, without values."""
    import zipfile

    padded = header + b" " * (-(len(header) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("video.npy", b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 64, 64, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (-16, 64, -64, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (16, 64, 64, 3), ",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (16, 64, 64, 3), }",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (16.0, 64, 64, 3), }",
        b"__import__('os').mkdir('executed')",
        b"[" * 5000,
        b"\xff\xfe",
        b"",
    ],
)
def test_wrong_headers_of_arrays_are_refused_without_allocating_memory(tmp_path, header, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_header(tmp_path / "a.npz", header)
    for function in (count_frames, check_frames, lambda path: read_frames(path, 0, 16)):
        with pytest.raises(VideoError) as error:
            function(tmp_path / "a.npz")
        assert_sentence(error.value, tmp_path / "a.npz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_nothing_in_a_data_folder_is_executed(tmp_path, kind):
    write_code(tmp_path / "a.pt", tmp_path / "executed", kind)
    np.savez(tmp_path / "b.npz", video=np.array([Code(tmp_path / "executed")], dtype=object))
    np.savez(tmp_path / "c.npz", video=np.zeros((16, 64, 64, 3), dtype=np.uint8), actions=np.array([{}] * 16, dtype=object))
    (tmp_path / "train.json").write_text(json.dumps([{"latent_path": "a.pt"}, {"video_path": "b.npz"}]))
    report = check_data(tmp_path, "dmlab", 16)
    assert len(report.damaged) == 3 and not (tmp_path / "executed").exists()
    assert all(str(tmp_path) in reason for reason in report.damaged)


def test_a_hundred_damaged_lists(tmp_path):
    entries = [{"video_path": f"datasets/ucf101/v_{i}.mp4", "label": i, "action_path": f"a/{i}.npz"} for i in range(4)]
    path, content = tmp_path / "train03.json", json.dumps(entries, indent=1).encode()
    refusals = 0
    for seed in range(100):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        try:
            read_list(path)
        except ValueError as error:
            assert_sentence(error, path)
            refusals += 1
    assert refusals > 30


@pytest.mark.parametrize("name", ["\0", "a\0b.mp4", "\ud800.mp4", 7, ["a.mp4"], {"a": 1}])
def test_entries_that_name_no_file_are_refused(tmp_path, name):
    (tmp_path / "train03.json").write_text(json.dumps([{"video_path": "a.mp4"}, {"video_path": name}]))
    with pytest.raises(ValueError, match=r"train03\.json, entry 1: needs the name of a file"):
        UCF101(tmp_path, "far", num_frames=16)


@pytest.mark.parametrize("name", ["x" * 5000 + ".mp4", "a/" * 3000 + "b.mp4", "/", "..", "train03.json", "line\nbreak.mp4"])
def test_entries_whose_files_cannot_be_there_are_skipped_with_the_reason(tmp_path, name):
    write_video(tmp_path / "good.mp4", 16)
    (tmp_path / "train03.json").write_text(json.dumps([{"video_path": "good.mp4"}, {"video_path": name}]))
    source = UCF101(tmp_path, "far", num_frames=16)
    assert source.num_clips("train") == 1 and source.num_clips("validation") == 0 and len(source.skipped) == 1


def test_a_list_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "train03.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"train03\.json cannot be read as JSON"):
        UCF101(tmp_path, "far", num_frames=16)


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = write_episode(tmp_path / "a.npz", 20)
    try:
        path.rename(tmp_path / "caf\udce9.npz")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes names in UTF-8 alone")
    assert DMLab(tmp_path, num_frames=16).clip("test", 0).frames.shape == (16, 3, 64, 64)
