"""Files and folders: whole or not at all, with the permissions that the umask grants."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from far_env.io import CACHE_VARIABLE, cache_dir, disk_errors, locked, make_run_dir, write_text


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_text_files_have_the_permissions_of_the_umask(tmp_path, umask):
    write_text(tmp_path / "notes.txt", "−")
    assert (tmp_path / "notes.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "−"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_text(tmp_path / "notes.txt", "before")

    def full(self, text, **options):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match=r"cannot write .*notes\.txt: No space left on device"):
        write_text(tmp_path / "notes.txt", "after")
    assert (tmp_path / "notes.txt").read_text() == "before" and os.listdir(tmp_path) == ["notes.txt"]


def test_a_file_in_the_way_of_a_run_folder_is_one_sentence(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"the folder .*run cannot be written"):
        make_run_dir(tmp_path / "run")


def test_without_a_home_the_cache_says_which_variable_to_set(monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(ValueError, match=f"set {CACHE_VARIABLE}"):
        cache_dir()


def test_what_a_killed_process_left_behind_is_removed_by_the_next_write(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (f"notes.txt.{ended.pid}.part", f"notes.txt.{os.getppid()}.part", f"other.txt.{ended.pid}.part"):
        (tmp_path / name).touch()
    write_text(tmp_path / "notes.txt", "whole")
    running, of_another_file = f"notes.txt.{os.getppid()}.part", f"other.txt.{ended.pid}.part"
    assert sorted(os.listdir(tmp_path)) == sorted(["notes.txt", running, of_another_file])


def test_a_folder_has_one_holder_and_a_killed_one_does_not_block_it(tmp_path):
    code = "\n".join(
        [
            "from pathlib import Path",
            "from far_env.io import locked",
            f"with locked(Path({str(tmp_path)!r})):",
            "    print(flush=True)",
            "    input()",
        ]
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=f"another process is writing {tmp_path}; wait for it"), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path):
        pass


def test_errors_of_the_disk_are_sentences_and_others_are_not(tmp_path):
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}: No space left"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConnectionResetError), disk_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
