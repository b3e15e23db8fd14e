"""Downloads of data sets: what they will take is said, shards are verified and unpacked completely or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile

import numpy as np
import pytest

from far_env import cli
from far_env.clips import download as downloads
from far_env.clips.data_folders import DownloadState, find_data
from far_env.clips.datasets import DMLab
from far_env.clips.download import download, download_plan, unpack
from far_env.clips.recordings import find_recordings
from far_env.hub import HubError
from tests.loopback_hub import TOKEN

FRAMES = 6


def episode(number: int) -> bytes:
    """An .npz file of FAR's DMLab."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, video=rng.integers(0, 256, (FRAMES, 64, 64, 3), dtype=np.uint8), actions=np.arange(FRAMES) % 4)
    return buffer.getvalue()


def archive(files: dict[str, bytes], *members: tarfile.TarInfo, mode: str = "w") -> bytes:
    """A tar archive of files, and of further members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


EPISODES = {f"training/{number}.npz": episode(number) for number in range(6)}
SHARDS = {f"shard-0000{part}.tar": archive(dict(list(EPISODES.items())[2 * part : 2 * part + 2])) for part in range(3)}
LIST = json.dumps([{"video_path": f"datasets/dmlab/{name}"} for name in EPISODES]).encode()


@pytest.fixture
def dmlab(hub):
    hub.add("guyuchao/DMLab", {**SHARDS, "dmlab_train.json": LIST, "README.md": b"card"}, "dataset")
    return hub


def contents(folder) -> set[str]:
    """The files that were unpacked."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*.npz")}


def work(folder) -> set[str]:
    """What is in the download's own folder."""
    return {path.name for path in (folder / ".download").iterdir()}


def test_a_data_set_is_fetched_said_beforehand_and_found_by_name(dmlab, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAR_ENV_DATA_DIR", str(tmp_path / "data"))
    size = sum(map(len, SHARDS.values())) + len(LIST)
    assert cli.main(["data", "download", "dmlab", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"3 shards and 1 lists to fetch, {size / 1e3:.1f} kB" in said and "are free" in said
    assert not (tmp_path / "data").exists()
    assert cli.main(["data", "download", "dmlab"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(said) and "unpacked 6 files" in out
    folder = tmp_path / "data" / "dmlab"
    assert contents(folder) == set(EPISODES) and work(folder) == {"state.json"}
    assert (folder / "training" / "3.npz").read_bytes() == EPISODES["training/3.npz"]
    monkeypatch.delenv("DMLAB_DATA_DIR", raising=False)
    source = DMLab(protocol="far", num_frames=FRAMES)
    assert source.folder == folder and source.num_clips("train") == 5
    assert cli.main(["data", "check", "--dataset", "dmlab", "--frames", str(FRAMES)]) == 0
    assert "6 files, read as dmlab" in capsys.readouterr().out
    before = len(dmlab.requests)
    assert cli.main(["data", "download", "dmlab"]) == 0
    assert "dmlab is complete" in capsys.readouterr().out and len(dmlab.requests) == before


def test_without_a_variable_the_cache_holds_the_data(dmlab, tmp_path):
    download(download_plan("dmlab"))
    assert find_data("dmlab") == tmp_path / "cache" / "data" / "dmlab"


def test_a_few_shards_can_be_taken_first_and_are_said_to_be_few(dmlab, caplog):
    assert download(download_plan("dmlab", 1)) == 2
    folder = find_data("dmlab")
    assert contents(folder) == {"training/0.npz", "training/1.npz"}
    assert "holds 1 of the 3 shards of guyuchao/DMLab: numbers are not those of the whole data set" in caplog.text
    assert download_plan("dmlab", 1) is None
    dmlab.add("guyuchao/DMLab", {"shard-00000.tar": b"another state of the repository"}, "dataset")
    plan = download_plan("dmlab", 3)
    assert plan.shards == ["shard-00001.tar", "shard-00002.tar"] and "1 are there" in plan.text()
    assert download(plan) == 4
    assert contents(folder) == set(EPISODES)


def test_what_a_stopped_download_left_is_not_used_and_is_continued(dmlab, monkeypatch):
    get = downloads.fetch

    def stop_at_the_second(listing, name, path):
        if "00001" in name:
            path.with_name(f"{path.name}.part").write_bytes(SHARDS[name][:1000])
            raise KeyboardInterrupt
        get(listing, name, path)

    monkeypatch.setattr(downloads, "fetch", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        download(download_plan("dmlab"))
    message = "download of dmlab to .* is not finished: 1 of 3 shards are there; far-env data download dmlab continues it"
    with pytest.raises(ValueError, match=message):
        DMLab(num_frames=FRAMES)
    monkeypatch.setattr(downloads, "fetch", get)
    rest = len(SHARDS["shard-00001.tar"]) + len(SHARDS["shard-00002.tar"])
    plan = download_plan("dmlab")
    assert plan.bytes_to_fetch == rest - 1000
    download(plan)
    assert contents(find_data("dmlab")) == set(EPISODES)
    assert dmlab.fetched("00000") == [None] and dmlab.fetched("00001") == ["bytes=1000-"]


def test_a_shard_with_another_hash_is_removed_and_the_others_stay(dmlab, capsys):
    dmlab.corrupt.add("shard-00001")
    assert cli.main(["data", "download", "dmlab"]) == 2
    assert "shard-00001.tar of guyuchao/DMLab arrived with SHA-256" in capsys.readouterr().err
    folder = downloads.data_dir() / "dmlab"
    assert contents(folder) == {"training/0.npz", "training/1.npz"} and work(folder) == {"state.json"}
    dmlab.corrupt.clear()
    assert cli.main(["data", "download", "dmlab"]) == 0
    assert contents(folder) == set(EPISODES)


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (member("../outside"), "which leaves the folder"),
        (member("training/../../outside"), "which leaves the folder"),
        (member("/tmp/outside"), "which leaves the folder"),
        (member("C:/outside"), "which leaves the folder"),
        (member("a", tarfile.SYMTYPE, "/etc"), "a link"),
        (member("a", tarfile.SYMTYPE, "training"), "a link"),
        (member("a", tarfile.LNKTYPE, "training/0.npz"), "a link"),
        (member("a", tarfile.CHRTYPE), "which is no plain file"),
        (member("a", tarfile.FIFOTYPE), "which is no plain file"),
        (member("a", tarfile.GNUTYPE_SPARSE), "a sparse file|cannot be unpacked"),
        (member(".download/state.json"), "which is the place of the download's own files"),
    ],
    ids=lambda value: f"{value.name} {value.type.decode()}" if isinstance(value, tarfile.TarInfo) else "",
)
def test_an_archive_with_anything_but_plain_files_inside_is_not_unpacked(dmlab, capsys, bad, reason, tmp_path):
    shard = archive({"training/good.npz": EPISODES["training/0.npz"]}, bad)
    dmlab.add("guyuchao/DMLab", {"shard-00000.tar": shard}, "dataset")
    assert cli.main(["data", "download", "dmlab"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and any(part in error for part in reason.split("|"))
    folder = downloads.data_dir() / "dmlab"
    assert not contents(folder) and not (tmp_path / "outside").exists()
    assert work(folder) <= {"state.json", "shard-00000.tar"}
    with pytest.raises(ValueError, match="is not finished: 0 of 1 shards"):
        find_data("dmlab")


@pytest.mark.parametrize(
    "content", [b"no archive", archive(EPISODES)[:5000], archive(EPISODES, mode="w:gz")], ids=["text", "short", "compressed"]
)
def test_a_damaged_or_compressed_archive_is_not_unpacked(tmp_path, content):
    (tmp_path / "shard.tar").write_bytes(content)
    with pytest.raises(HubError, match=r"shard\.tar cannot be unpacked: .*; nothing of it was"):
        unpack(tmp_path / "shard.tar", tmp_path / "data", tmp_path / "staging")
    assert os.listdir(tmp_path) == ["shard.tar"]


def test_a_disk_that_fills_up_leaves_nothing_half_unpacked(dmlab, monkeypatch, capsys):
    extract, count = tarfile.TarFile.extract, iter(range(9))

    def full(self, *args, **kwargs):
        if next(count) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        extract(self, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    assert cli.main(["data", "download", "dmlab"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    folder = downloads.data_dir() / "dmlab"
    assert contents(folder) == {"training/0.npz", "training/1.npz"}
    assert work(folder) == {"state.json", "shard-00001.tar"}, "what was fetched is kept"
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", dmlab.url)
    monkeypatch.setenv("FAR_ENV_CACHE", str(folder.parents[1]))
    assert cli.main(["data", "download", "dmlab"]) == 0
    assert contents(folder) == set(EPISODES) and len(dmlab.fetched("00001")) == 1


def test_too_little_space_is_said_before_anything_is_fetched(dmlab, monkeypatch, capsys):
    need = sum(map(len, SHARDS.values())) + len(LIST) + max(map(len, SHARDS.values()))
    monkeypatch.setattr(downloads, "_free", lambda _: need - 1)
    assert cli.main(["data", "download", "dmlab"]) == 2
    assert "dmlab needs up to" in (error := capsys.readouterr().err) and "take fewer with --max-shards" in error
    assert not dmlab.fetched("resolve")
    monkeypatch.setattr(downloads, "_free", lambda _: need)
    assert cli.main(["data", "download", "dmlab"]) == 0


def test_a_data_set_laid_out_in_another_way_is_one_sentence(hub, capsys):
    hub.add("guyuchao/BAIR", {"data/part-0.parquet": b"x"}, "dataset")
    assert cli.main(["data", "download", "bair"]) == 2
    error = capsys.readouterr().err
    assert "guyuchao/BAIR has no shard-*.tar (it holds data/part-0.parquet): it is laid out in another way" in error
    hub.add("guyuchao/UCF101", {"shard-0.tar": archive({"frames/0.png": b"x"})}, "dataset")
    assert cli.main(["data", "download", "ucf101"]) == 2
    assert "has neither a list nor a video there" in capsys.readouterr().err


def test_a_private_data_set_needs_a_token(hub, monkeypatch, capsys):
    hub.add("guyuchao/DMLab", SHARDS, "dataset", private=True)
    assert cli.main(["data", "download", "dmlab"]) == 2
    assert "set HF_TOKEN to a token that may" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["data", "download", "dmlab"]) == 0


def test_latents_are_found_where_there_are_no_videos(hub, tmp_path):
    import torch

    buffer = io.BytesIO()
    torch.save(torch.zeros(FRAMES, 4, 8, 8), buffer)
    files = {"dmlab_train.json": json.dumps([{"latent_path": "latents/0.pt"}]).encode()}
    hub.add("guyuchao/DMLab_Latent", {**files, "shard-0.tar": archive({"latents/0.pt": buffer.getvalue()})}, "dataset")
    download(download_plan("dmlab_latent"))
    assert find_data("dmlab") == tmp_path / "cache" / "data" / "dmlab_latent"
    assert DMLab(protocol="far", num_frames=FRAMES).num_clips("train") == 1


def test_what_cannot_be_meant_is_refused(hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FAR_ENV_DATA_DIR", str(tmp_path))
    for args, message in (
        (["download", "dmlap"], "unknown data set to download 'dmlap'; did you mean 'dmlab'"),
        (["download", "dmlab", "--max-shards", "0"], "--max-shards must be at least 1"),
        (["check"], "data check needs a folder, or with --dataset"),
        (["check", "--dataset", "dmlab"], f"dmlab is not in {tmp_path}; far-env data download fetches it"),
    ):
        assert cli.main(["data", *args]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "dmlab").mkdir()
    (tmp_path / "dmlab" / "0.npz").write_bytes(EPISODES["training/0.npz"])
    assert cli.main(["data", "download", "dmlab"]) == 2
    assert "holds files that were not downloaded by this command" in capsys.readouterr().err
    assert len(find_recordings(find_data("dmlab"))) == 1, "a folder that was put there is found"
    (tmp_path / "dmlab" / ".download").mkdir()
    (tmp_path / "dmlab" / ".download" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is damaged .*; delete .*\.download and download the data set again"):
        find_data("dmlab")


def test_the_state_says_what_is_there():
    state = DownloadState("a/b", "0" * 40, ["0", "1", "2"], 2, ["0", "1"])
    assert state.complete and state.partial
    assert not DownloadState("a/b", "0" * 40, ["0", "1"], 2, ["0"]).complete
