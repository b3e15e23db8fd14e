"""Short forms of `benchmarks.drills`: commands that are killed, meet a full disk or run twice at once lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.drills.process import Process
from benchmarks.drills.state import differences, folder_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork, by which drills start commands")
ROOT = Path(__file__).parents[2]


def drills(*args: str) -> list[list[str]]:
    """Rows of the table: drill and command in words, tried, survived, lost."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.drills", *args]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return [line.split() for line in result.stdout.splitlines()[1:]]


def test_no_command_loses_anything_to_a_kill_or_a_full_disk():
    rows = drills("--kills", "1", "--disks", "1", "--others", "0")
    assert len(rows) == 2 * 9 and {tuple(row[-3:]) for row in rows} == {("1", "1", "0")}


def test_two_processes_moved_folders_other_users_and_clocks_lose_nothing():
    rows = drills("--kills", "0", "--disks", "0", "surrogate PPO", "evaluation", "recording")
    assert len(rows) == 3 * 4 and {tuple(row[-3:]) for row in rows} == {("1", "1", "0")}


def test_a_drill_notices_what_is_lost(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"clip": 1, "decision_ms": 2.0}\n')
    (tmp_path / "policy.py").write_text("x = 1\n")
    before = folder_state(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"clip": 1, "decision_ms": 3.0}\n')
    assert differences(folder_state(tmp_path), before) == []
    (tmp_path / "records.jsonl").write_text('{"clip": 1, "decision_ms": 3.0}\n' * 2)
    (tmp_path / "policy.py").unlink()
    (tmp_path / "policy.py.12.part").touch()
    assert differences(folder_state(tmp_path), before) == [
        "missing: policy.py; superfluous: policy.py.12.part; different: records.jsonl"
    ]


def test_a_killed_process_is_told_from_one_that_ended(tmp_path):
    assert Process(["--help"], tmp_path / "help").ended() == 0
    assert "far-env COMMAND" in (tmp_path / "help").read_text()
    assert Process(["--help"], tmp_path / "help", signal.pause).ended(0.1) is None
    refused = Process(["evaluat"], tmp_path / "none")
    assert refused.ended() == 2 and refused.refusal() == []
