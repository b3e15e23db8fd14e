"""Progress: lines in a log at an interval, their content, and a bar on a terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from far_env import progress as module
from far_env.progress import ProgressLines, show_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_a_log_has_a_line_every_ten_seconds_and_one_at_the_end(clock):
    log = io.StringIO()
    with ProgressLines(total=2000, description="PPO", unit="decisions", file=log) as bar:
        for _ in range(20):
            clock(3)
            bar.set_postfix(psnr="20.5")
            bar.update(100)
    assert log.getvalue().splitlines() == [
        "PPO: 400/2,000 decisions, 12 s, 48 s left, 33.3 decisions/s, psnr 20.5",
        "PPO: 800/2,000 decisions, 24 s, 36 s left, 33.3 decisions/s, psnr 20.5",
        "PPO: 1,200/2,000 decisions, 36 s, 24 s left, 33.3 decisions/s, psnr 20.5",
        "PPO: 1,600/2,000 decisions, 48 s, 12 s left, 33.3 decisions/s, psnr 20.5",
        "PPO: 2,000/2,000 decisions, 1:00, 33.3 decisions/s, psnr 20.5",
    ]


def test_an_iteration_is_counted_and_needs_no_total(clock):
    log = io.StringIO()
    assert list(ProgressLines(["a", "b"], description="x", file=log)) == ["a", "b"]
    assert log.getvalue() == "x: 2/2 it, 0.0 s\n"
    with ProgressLines(description="x", unit="clips", file=log) as bar:
        clock(4000)
        bar.update(3)
    assert log.getvalue().splitlines()[1:] == ["x: 3 clips, 1:06:40, 0.00075 clips/s"]


def test_nothing_is_written_if_disabled_or_if_nothing_was_done(clock):
    log = io.StringIO()
    with ProgressLines(total=3, disable=True, file=log) as bar:
        clock(60)
        bar.update(3)
    with ProgressLines(total=3, file=log):
        clock(60)
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar_and_a_log_lines(monkeypatch, capsys):
    with show_progress(total=2, description="work", unit="clips") as bar:
        bar.update(2)
    assert isinstance(bar, ProgressLines) and capsys.readouterr().err.startswith("work: 2/2 clips")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with show_progress(range(3), description="work") as bar:
        assert isinstance(bar, module.tqdm) and list(bar) == [0, 1, 2] and bar.total == 3


def test_resumed_work_counts_on_at_the_speed_of_this_session(clock):
    log = io.StringIO()
    with ProgressLines(total=100, initial=80, description="train", unit="steps", file=log) as bar:
        clock(10)
        bar.update(5)
        bar.write("left out clip 3")
    assert log.getvalue().splitlines() == ["train: 85/100 steps, 10 s, 30 s left, 0.5 steps/s", "left out clip 3"]


def test_work_shorter_than_its_delay_is_silent(clock):
    log = io.StringIO()
    with ProgressLines(range(3), description="read", delay=1, file=log) as bar:
        assert list(bar) == [0, 1, 2]
    assert log.getvalue() == ""
    for _ in ProgressLines(range(2), description="read", unit="files", delay=1, file=log):
        clock(0.75)
    assert log.getvalue() == "read: 2/2 files, 1.5 s, 1.33 files/s\n"
