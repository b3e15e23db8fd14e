"""Files of a repository on the hub: one commit, verified, resumed; what can go wrong is one sentence each."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import pytest

from far_env import hub as far_hub
from far_env.hub import HubError, Unreachable, fetch, list_files, push, snapshot, split_name
from far_env.io import locked
from tests.loopback_hub import TOKEN, git_sha1

CONTENT = os.urandom(50_000)
FILES = {"policy.json": b"{}", "weights.safetensors": CONTENT, "frames/0.png": b"picture", "../outside.txt": b"no"}


@pytest.fixture
def quick(monkeypatch):
    """Pauses are counted, not made."""
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def test_a_listing_pins_the_commit_and_names_the_hashes(hub):
    first = hub.add("me/it", FILES)
    second = hub.add("me/it", {**FILES, "policy.json": b"{} "})
    assert list_files("me/it").commit == second != first
    files = list_files("me/it", revision=first).files
    assert files["policy.json"].git_sha1 == git_sha1(b"{}") and files["policy.json"].sha256 is None
    assert files["weights.safetensors"].size == len(CONTENT) and files["weights.safetensors"].git_sha1 is None


def test_a_connection_that_breaks_is_resumed_where_it_broke(hub, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    hub.add("me/it", FILES)
    hub.breaks["weights"] = 2
    fetch(list_files("me/it"), "weights.safetensors", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == CONTENT and not (tmp_path / "w.part").exists()
    starts = [int(ranges.removeprefix("bytes=").removesuffix("-")) for ranges in hub.fetched("weights") if ranges]
    assert len(starts) == 2 and 0 < starts[0] < starts[1] < len(CONTENT)


def test_a_redirect_to_another_host_is_followed_and_gets_no_token(hub, monkeypatch, tmp_path):
    hub.add("me/it", FILES, private=True)
    hub.redirects = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    (tmp_path / "w.part").write_bytes(CONTENT[:10])
    fetch(list_files("me/it"), "weights.safetensors", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == CONTENT
    assert hub.fetched("elsewhere") == ["bytes=10-"] and not hub.leaked


def test_a_stopped_download_is_resumed_by_the_next_call(hub, tmp_path):
    hub.add("me/it", FILES)
    (tmp_path / "w.part").write_bytes(CONTENT[:12_345])
    fetch(list_files("me/it"), "weights.safetensors", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == CONTENT
    assert hub.fetched("weights") == ["bytes=12345-"]


@pytest.mark.parametrize("name", ["weights.safetensors", "policy.json"])
def test_another_hash_is_refused_and_nothing_is_kept(hub, tmp_path, name):
    hub.add("me/it", FILES)
    hub.corrupt.add(name)
    with pytest.raises(HubError, match=rf"{name} of me/it arrived with .*SHA-.* instead of .*: the transfer was damaged"):
        fetch(list_files("me/it"), name, tmp_path / "w")
    assert not list(tmp_path.glob("w*"))


def test_a_busy_hub_is_waited_for_as_long_as_it_asks(hub, quick, tmp_path, capsys):
    hub.add("me/it", FILES)
    hub.busy["/api/models/me/it"] = ["7", "3"]
    assert list_files("me/it").files
    assert quick == [7, 3] and "the hub is busy (429); trying again in 7 s" in capsys.readouterr().err
    hub.busy["resolve"] = ["2"]
    fetch(list_files("me/it"), "policy.json", tmp_path / "p")
    assert (tmp_path / "p").exists() and sum(quick) >= 12
    hub.busy["/api/models/me/it"] = ["100000"]
    with pytest.raises(HubError, match=r"is busy and asks to wait \(429\); give the same command again in 100,000 s"):
        list_files("me/it")


def test_a_full_disk_is_one_sentence(hub, tmp_path, monkeypatch):
    hub.add("me/it", FILES)
    listing = list_files("me/it")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(ValueError, match=r"cannot write .*w\.part: No space left on device"):
        fetch(listing, "weights.safetensors", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_missing_private_and_gated_repositories_say_what_to_do(hub, monkeypatch):
    hub.add("me/secret", FILES, private=True)
    hub.add("me/terms", FILES, gated=True)
    hub.add("me/it", FILES)
    for repository in ("me/nothing", "me/secret"):
        with pytest.raises(
            HubError, match=rf"{repository} is not on {hub.url}, or is private: .*set HF_TOKEN to a token that may"
        ):
            list_files(repository)
    with pytest.raises(HubError, match=r"me/terms is only given to those who accept its terms: do that on .* and set HF_TOKEN"):
        list_files("me/terms")
    with pytest.raises(HubError, match="me/it has no revision v2; give a branch, a tag or a commit of it"):
        list_files("me/it", revision="v2")
    with pytest.raises(HubError, match=r"holds no file policy\.yaml at commit"):
        fetch(list_files("me/it"), "policy.yaml", None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert list_files("me/secret").files and list_files("me/terms").files
    with pytest.raises(HubError, match="the token in use may not"):
        list_files("me/nothing")


@pytest.mark.parametrize("name", ["hub:me", "hub:me/it@", "hub:me/it/more", "hub:", "hub:me/it@a b"])
def test_names_of_another_form_are_refused(name):
    with pytest.raises(HubError, match="the form is hub:user/name or hub:user/name@revision"):
        split_name(name)


def test_a_snapshot_holds_what_is_needed_and_works_without_a_network(hub, monkeypatch, capsys):
    commit = hub.add("me/it", FILES)
    kept = snapshot("hub:me/it", ("policy.json",), ("frames/*", "*outside*"))
    assert kept.commit == commit and kept.name == f"hub:me/it@{commit}"
    assert sorted(str(path.relative_to(kept.folder)) for path in kept.folder.rglob("*")) == [
        "frames",
        "frames/0.png",
        "policy.json",
    ]
    with pytest.raises(HubError, match=r"lacks config\.json; it holds .*policy\.json"):
        snapshot("hub:me/it", ("config.json",))
    newer = hub.add("me/it", {"policy.json": b"{ }"})
    assert snapshot("hub:me/it", ("policy.json",), ("frames/*", "*outside*")) == kept, "one commit for the whole process"
    far_hub.snapshot.cache_clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("hub:me/it", f"hub:me/it@{commit}"):
        assert snapshot(name, ("policy.json",), ("frames/*", "*outside*")) == kept
    assert "the hub is not reached; commit" in capsys.readouterr().err
    for name in ("hub:me/other", f"hub:me/it@{newer}"):
        with pytest.raises(Unreachable, match=f"{name} is not in the cache, and .* cannot be fetched from http://127.0.0.1:9"):
            snapshot(name, ("policy.json",))


def test_what_another_process_resolved_meanwhile_is_kept(hub, monkeypatch):
    old, new = hub.add("me/it", FILES), hub.add("me/it", {"policy.json": b"{ }"})

    def listed_while_another_fetches_the_old_commit(repository, revision):
        listing = list_files(repository, revision=revision)
        if revision is None:
            far_hub.snapshot.__wrapped__(f"hub:me/it@{old}", ("policy.json",))
        return listing

    monkeypatch.setattr(far_hub, "list_files", listed_while_another_fetches_the_old_commit)
    place = snapshot("hub:me/it", ("policy.json",)).folder.parent
    assert json.loads((place / "revisions.json").read_text()) == {old: old, "main": new}


def test_two_processes_do_not_write_the_same_place(hub):
    hub.add("me/it", FILES)
    place = snapshot("hub:me/it", ("policy.json",)).folder.parent
    before = (place / "revisions.json").read_text()
    newer = hub.add("me/it", {"policy.json": b"{ }"})
    far_hub.snapshot.cache_clear()
    with locked(place), pytest.raises(ValueError, match=f"another process is writing {place}"):
        snapshot("hub:me/it", ("policy.json",))
    assert (place / "revisions.json").read_text() == before
    assert snapshot("hub:me/it", ("policy.json",)).commit == newer
    far_hub.snapshot.cache_clear()
    with locked(place):  # nothing is left to write
        assert snapshot("hub:me/it", ("policy.json",)).commit == newer


def test_a_push_makes_one_commit_and_removes_what_an_earlier_one_left(hub, monkeypatch, tmp_path):
    for name in ("policy.json", "weights.safetensors"):
        (tmp_path / name).write_bytes(FILES[name])
    files = {name: tmp_path / name for name in ("policy.json", "weights.safetensors")}
    with pytest.raises(HubError, match="pushing to me/it needs a token that may write: set HF_TOKEN"):
        push("me/it", files, "first")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="does not let this token write to me/it"):
        push("me/it", files, "first")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = push("me/it", files, "first", private=True)
    assert hub.repos["model", "me/it"].private and hub.files("me/it") == {name: FILES[name] for name in files}
    assert list_files("me/it").commit == commit
    hub.files("me/it")["notes.txt"] = b"mine"
    push("me/it", {"policy.json": tmp_path / "policy.json"}, "second", ours=("*.safetensors", "*.json"))
    assert hub.files("me/it") == {"policy.json": b"{}", "notes.txt": b"mine"}


def test_offline_mode_is_named(hub):
    script = "from far_env.hub import list_files\ntry:\n    list_files('me/it')\nexcept ValueError as error:\n    print(error)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True
    )
    assert result.stdout.strip() == "me/it cannot be fetched because HF_HUB_OFFLINE is set"
