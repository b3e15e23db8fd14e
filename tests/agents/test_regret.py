"""Regret tables: paired with the best of all searches, and written where they belong."""

from __future__ import annotations

import re

import numpy as np
import pytest

from far_env.agents import commands
from far_env.agents.options import RegretOptions
from far_env.agents.regret import Bound, regret_table
from far_env.baselines import make
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.statistics import mean_interval
from far_env.workloads import make_workload


def test_regret_is_the_mean_gap_to_the_best_search_of_each_clip():
    bounds = {"1x1": Bound(np.array([30.0, 20.0]), 1.0, 0.1), "2x2": Bound(np.array([28.0, 26.0]), 3.5, 0.4)}
    lines = [line.split(" | ") for line in regret_table(bounds, {"rule": np.array([25.0, 25.0])}).splitlines()[2:]]
    assert [line[0].strip("| ") for line in lines] == ["best found", "search 2x2", "search 1x1", "rule"]
    assert [float(line[1].split()[0]) for line in lines] == [28.0, 27.0, 25.0, 25.0]
    assert [float(line[2].split()[0]) for line in lines[1:]] == [1.0, 3.0, 3.0]
    assert lines[1][3] == "3.5×" and lines[1][4].startswith("0.40")


def test_the_command_writes_a_section_with_what_was_measured(tiny_host_folder, tmp_path, capsys):
    results = tmp_path / "RESULTS.md"
    arguments = ["--host", str(tiny_host_folder), "--clips", "3", "--batch-size", "2", "--out", str(results)]
    arguments += ["--searches", "1x1", "2x2", "--policies", "recent_fill"]
    commands.regret(arguments)
    text = results.read_text()
    assert text.count("<!-- begin regret-pan-4 -->") == 1 and "3 test clips" in text and text.split("## ")[1] in text
    workload = make_workload("pan", host=str(tiny_host_folder))
    psnr = evaluate(workload, 4, {"own": make("recent_fill")}, range(3), metrics=("psnr",)).scores["own"]["psnr"]
    row = next(line for line in text.splitlines() if line.startswith("| recent_fill"))
    assert float(row.split(" | ")[1].split()[0]) == pytest.approx(mean_interval(psnr[:, 0]).mean, abs=0.006)
    costs = [float(cost) for cost in re.findall(r"([\d.]+)× \| [\d.]+ \|", text)]
    assert min(costs) == 1.0 and max(costs) > 1.5, "a search of width 1 rolls each clip out once"
    assert "wrote regret-pan-4" in capsys.readouterr().out


def test_searches_that_are_none_are_refused():
    with pytest.raises(ValueError, match="such as 3x3, got '3'"):
        RegretOptions(searches=("3",))
