"""Files that are valid but unusual: cut without re-encoding, of changing size, with foreign metadata, and sidecars."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from far_env import cli
from far_env.clips.check import check_data
from far_env.clips.datasets import UCF101, DMLab, Minecraft
from far_env.clips.recordings import find_lists, find_recordings, read_list
from far_env.clips.video import VideoError, check_frames, count_frames, crop_centre, read_frames, to_pixels
from tests.clips.test_video import write_episode, write_video
from tests.damage import assert_sentence

NEEDS_PYAV_15 = pytest.mark.skipif(
    int(av.__version__.split(".")[0]) < 15, reason="PyAV before 15 copies streams without extradata"
)
SPLITS = ("train", "validation", "test")


def write_long(path, num_frames=60, **options):
    """An H.264 video with one keyframe, frame t being grey 4·t."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(num_frames), "sc_threshold": "0", "crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for t in range(num_frames):
            picture = np.full((64, 96, 3), 4 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def mux_cut(long, path, first):
    """Shift timestamps so that the video begins at frame ``first``, as ``ffmpeg -ss … -c copy`` does."""
    with av.open(str(long)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        offset = int(first / stream.average_rate / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts -= offset
                packet.dts -= offset
                packet.stream = copied
                target.mux(packet)
    return path


def edit(long, path, first, last):
    """Let the edit list of a video of `write_long` show the frames first … last-1."""
    content = bytearray(long.read_bytes())
    at = content.index(b"elst") + 8
    entries, _, media_time = struct.unpack(">III", content[at : at + 12])
    assert entries == 1
    content[at + 4 : at + 12] = struct.pack(">II", 40 * (last - first), media_time + 512 * first)  # in 1/1000 and 1/12800 s
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "cut", [pytest.param(mux_cut, marks=NEEDS_PYAV_15), lambda long, path, first: edit(long, path, first, 60)]
)
@pytest.mark.parametrize(("first", "count"), [(40, 20), (1, 59), (59, 1)])
def test_a_losslessly_cut_video_has_the_frames_that_it_shows(tmp_path, cut, first, count):
    (tmp_path / "data").mkdir()
    path = cut(write_long(tmp_path / "long.mp4"), tmp_path / "data" / "cut.mp4", first)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 60, "the header counts what is stored"
    assert count_frames(path) == count
    check_frames(path)
    frames = np.stack(read_frames(path, 0, count))
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 4 * np.arange(first, 60), atol=4)
    report = check_data(tmp_path / "data", "ucf101", count)
    assert not report.damaged and report.usable and f"lengths: {count} to {count} frames" in report.text()
    assert UCF101(tmp_path / "data", num_frames=count).clip("test", 0).frames.shape == (count, 3, 64, 64)


def test_a_video_whose_edit_list_hides_both_ends_has_the_frames_that_it_shows(tmp_path):
    path = edit(write_long(tmp_path / "long.mp4"), tmp_path / "v.mp4", 20, 40)
    assert abs(count_frames(path) - 20) <= 2, "up to the frames that the decoder reorders"
    check_frames(path)
    first = read_frames(path, 0, count_frames(path))[0]
    np.testing.assert_allclose(first.mean(), 4 * 20, atol=4)


def test_a_cut_video_that_is_truncated_is_damaged(tmp_path):
    """With the index in front of the pictures, the header survives."""
    long = write_long(tmp_path / "long.mp4", movflags="faststart")
    path = edit(long, tmp_path / "v.mp4", 0, 59)
    check_frames(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(VideoError, match=r"v\.mp4"):
        check_frames(path)


def write_sizes(path, sizes, num_frames=8):
    """A motion JPEG video whose frames t are grey 8·t, the given (width, height) taking turns of ``num_frames``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        (stream.width, stream.height), stream.pix_fmt = sizes[0], "yuvj420p"
        number = 0
        for width, height in sizes:
            for _ in range(num_frames):
                picture = np.full((height, width, 3), 8 * number, dtype=np.uint8)
                picture[:, : width // 4] = 250
                encoded = io.BytesIO()
                Image.fromarray(picture).save(encoded, "JPEG", quality=95)
                packet = av.Packet(encoded.getvalue())
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
                container.mux(packet)
                number += 1
    return path


@pytest.mark.parametrize("protocol", ["benchmark", "far"])
@pytest.mark.parametrize("suffix", ["avi", "mp4"])
def test_every_frame_is_resized_from_its_size(tmp_path, suffix, protocol):
    sizes = [(96, 64), (64, 128), (96, 64)]
    path = write_sizes(tmp_path / f"v.{suffix}", sizes)
    assert [frame.shape for frame in read_frames(path, 6, 4)] == [(64, 96, 3)] * 2 + [(128, 64, 3)] * 2
    report = check_data(tmp_path, "ucf101", 24)
    assert not report.damaged and report.usable
    frames = UCF101(tmp_path, protocol, num_frames=24).clip("test", 0).frames
    assert frames.shape == (24, 3, 64, 64)
    if protocol == "far":
        for number, frame in enumerate(read_frames(path, 0, 24)):
            np.testing.assert_array_equal(frames[number], crop_centre([frame], 64)[0])
    else:
        for number in range(24):  # each by a graph of its own
            np.testing.assert_array_equal(frames[number], to_pixels(read_frames(path, number, 1, 64))[0])
    np.testing.assert_allclose(frames[:, :, :, 40:].mean(axis=(1, 2, 3)) * 255, 8 * np.arange(24), atol=4)


def test_joined_videos_of_different_sizes_are_read(tmp_path):
    """H.264 streams concatenated in one file, each with its parameter sets."""
    parts = []
    for width, height in ((96, 64), (128, 96)):
        with av.open(str(tmp_path / "part.h264"), "w", format="h264") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for t in range(10):
                picture = np.full((height, width, 3), 20 * t, dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        parts.append((tmp_path / "part.h264").read_bytes())
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "v.mp4"  # the content decides how a file is read, not its name
    path.write_bytes(b"".join(parts))
    assert count_frames(path) == 20
    assert {frame.shape for frame in read_frames(path, 0, 20)} == {(64, 96, 3), (96, 128, 3)}
    assert not check_data(tmp_path / "data", "ucf101", 20).damaged
    frames = UCF101(tmp_path / "data", num_frames=20).clip("test", 0).frames
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)) * 255, 20 * np.tile(np.arange(10), 2), atol=5)


def test_metadata_that_are_not_utf8_do_not_matter(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "cafXXXX"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for t in range(16):
            picture = np.full((64, 64, 3), 8 * t, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"cafXXXX", b"caf\xe9\xff\xfeX"))
    assert count_frames(path) == 16 and len(read_frames(path, 0, 16)) == 16
    check_frames(path)


def litter(folder):
    """Files that a Mac, a network drive and an editor add beside each file of a folder, and a folder named like a video."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
        for hidden in (".cache", "__MACOSX", "@eaDir"):
            copy = folder / hidden / path.relative_to(folder).parent / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (folder / "previews.mp4").mkdir()
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


def clip_names(source):
    return {split: [source.path(split, i) for i in range(source.num_clips(split))] for split in SPLITS}


@pytest.mark.parametrize("protocol", ["benchmark", "far"])
@pytest.mark.parametrize("kind", [UCF101, DMLab, Minecraft])
def test_hidden_files_and_sidecars_change_nothing(tmp_path, kind, protocol):
    for i in range(12):
        if kind is DMLab:
            write_episode(tmp_path / f"{i:02d}.npz", 20, actions=np.full(20, i % 4))
            continue
        write_video(tmp_path / "videos" / f"{i:02d}.mp4", 20)
        np.savez(tmp_path / "videos" / f"{i:02d}.npz", actions=np.full(20, i % 4))
    before, report = clip_names(kind(tmp_path, protocol, num_frames=16)), check_data(tmp_path).text()
    litter(tmp_path)
    source = kind(tmp_path, protocol, num_frames=16)
    assert clip_names(source) == before and not source.skipped
    assert check_data(tmp_path).text() == report
    if kind is not UCF101:
        number = int(source.path("test", 0).stem)
        assert set(source.clip("test", 0).actions) == {number % 4}


def test_lists_and_latents_are_found_without_their_sidecars(tmp_path):
    for i in range(4):
        torch.save(torch.zeros(20, 4, 8, 8), tmp_path / f"{i}.pt")
        np.savez(tmp_path / f"{i}.npz", actions=np.zeros(20, dtype=np.int64))
    entries = [{"latent_path": f"datasets/{i}.pt", "action_path": f"datasets/{i}.npz"} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    before = clip_names(DMLab(tmp_path, "far", num_frames=16))
    litter(tmp_path)
    mixed = [entry | {"latent_path": name} for entry in entries for name in (f"datasets/._{entry['latent_path'][9:]}",)]
    written = [part for pair in zip(mixed, entries, strict=True) for part in pair]
    written.append({"latent_path": "__MACOSX/datasets/0.pt"})
    (tmp_path / "train.json").write_text(json.dumps(written))
    assert find_lists(tmp_path, ()) == {"train": tmp_path / "train.json"}
    assert [recording.path.name for recording in read_list(tmp_path / "train.json")] == ["0.pt", "1.pt", "2.pt", "3.pt"]
    source = DMLab(tmp_path, "far", num_frames=16)
    assert clip_names(source) == before and not source.skipped


def test_a_data_folder_may_itself_be_hidden(tmp_path):
    write_video(tmp_path / ".data" / "a.mp4", 16)
    (recording,) = find_recordings(tmp_path / ".data")
    assert recording.path.name == "a.mp4"
    assert UCF101(tmp_path / ".data", num_frames=16).num_clips("test") == 1


def test_a_folder_of_sidecars_alone_holds_no_video(tmp_path):
    write_video(tmp_path / "__MACOSX" / "a.mp4", 16)
    (tmp_path / "._a.mp4").touch()
    with pytest.raises(ValueError, match=r"holds no \.mp4, \.avi or \.npz file"):
        find_recordings(tmp_path)


def test_sidecars_within_an_archive_do_not_matter(tmp_path):
    path = write_episode(tmp_path / "a.npz", 20)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/._video.npy", b"\x00\x05\x16\x07")
    assert count_frames(path) == 20 and len(read_frames(path, 0, 20)) == 20


def test_data_check_fails_when_files_are_damaged(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", 20)
    assert cli.main(["data", "check", str(tmp_path)]) == 0
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:700])
    capsys.readouterr()
    assert cli.main(["data", "check", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "damaged: 1 files" in captured.out
    assert captured.err.strip().endswith("1 of 2 files are damaged; the report names them")


def test_a_video_whose_codec_is_unknown_is_refused_in_one_sentence(tmp_path):
    write_video(tmp_path / "a.avi", 16)
    content = (tmp_path / "a.avi").read_bytes()
    assert content.count(b"FMP4") == 2, "in the headers of the stream and of its format"
    (tmp_path / "a.avi").write_bytes(content.replace(b"FMP4", b"zzzz"))
    for function, *arguments in ((count_frames,), (check_frames,), (read_frames, 2, 10)):
        with pytest.raises(VideoError, match="its codec is unknown") as caught:
            function(tmp_path / "a.avi", *arguments)
        assert_sentence(caught.value, tmp_path / "a.avi")
