"""Evaluation by actors is that of one process, whatever is lost meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from far_env.cli import main
from far_env.evaluation.report import report_page
from far_env.evaluation.results_folder import load
from far_env.evaluation.session import Session

POLICY = """
import os
import time


class VideoTemporalKVPolicy:
    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        while os.path.exists(HOLD):
            time.sleep(0.05)
        count, budget = len(chunk_meta_list), int(budget_state["max_frames"])
        stay = {0, *range(count - budget + 1, count)} if count > budget else range(count)
        return TemporalCachePlan([ChunkDecision(i, "keep" if i in stay else "drop") for i in range(count)])
"""


@pytest.fixture(scope="module")
def command(tiny_host_folder, tmp_path_factory):
    """Arguments of an evaluation of 28 tasks; one policy is a file, which waits while there is a file ``hold`` beside it."""
    policy = tmp_path_factory.mktemp("policy") / "mine.py"
    policy.write_text(POLICY.replace("HOLD", repr(str(policy.with_name("hold")))))
    policies = f"recent_fill,random,full_history,{policy}"
    args = ["evaluate", "--policies", policies, "--workload", "pan,cuts", "--budget", "2,4", "--host", str(tiny_host_folder)]
    return [
        *args,
        "--clips",
        "4",
        "--batch-size",
        "2",
        "--metrics",
        "psnr,ssim",
        "--show-clips",
        "1",
        "--policy-seconds",
        "300",
        "--device",
    ]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The folder and the table of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(in_one_process(command, folder)) == 0
    return folder


def in_one_process(command, folder):
    """The arguments of the evaluation in one process."""
    return [*command, "cpu", "--out", str(folder), "--json", str(folder / "table.json")]


def by_actors(command, cluster, folder, actors=2):
    """The arguments of the same evaluation by actors."""
    ray = ["--ray", "--address", cluster.address, "--actors", str(actors)]
    return [*command, "auto", "--out", str(folder), "--json", str(folder / "table.json"), *ray]


def by_key(folder):
    """Records without what differs from run to run; two of one episode are an error of `load`."""
    records = {}
    for record in load(folder).records:
        records[record.key] = {key: value for key, value in vars(record).items() if key != "decision_ms"}
    return records


def table(folder):
    """The table without durations."""
    return re.sub(r'"(seconds|recent_fill|random|[^"]*mine.py)": [\d.]+', "", (folder / "table.json").read_text())


def pictures(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "frames").rglob("*.png"))}


def check_same(folder, alone):
    """The records to the last bit, the table, the pictures and the report."""
    records, expected = by_key(folder), by_key(alone)
    assert records == expected and len(records) == 2 * 4 * (2 * 3 + 1)
    assert table(folder) == table(alone) and '"mean"' in table(folder)
    assert pictures(folder) == pictures(alone) != {}
    pages = [re.sub(r'"ms":[\d.]+|"folder":"[^"]*"', "", report_page(load(place), progress=False)) for place in (folder, alone)]
    assert pages[0] == pages[1]


def test_actors_play_what_one_process_plays(command, alone, second_node, tmp_path, capsys):
    assert main(by_actors(command, second_node, tmp_path)) == 0
    check_same(tmp_path, alone)
    assert capsys.readouterr().err.count("evaluate: 616/616 frames") == 1, "one bar for all actors"


def after_first(monkeypatch, action):
    """Call ``action`` with the processes of the actors once the first task is kept."""
    from far_env.distributed import evaluation

    pids, check, keep = [], evaluation.check_same, Session.keep

    def remember(here, there):
        check(here, there)
        pids.append(there["pid"])

    def act(self, records):
        keep(self, records)
        if pids:
            action(list(pids))
            pids.clear()

    monkeypatch.setattr(evaluation, "check_same", remember)
    monkeypatch.setattr(Session, "keep", act)
    return pids


def test_a_killed_actor_loses_nothing(command, alone, second_node, tmp_path, monkeypatch, capsys):
    killed = []

    def kill(pids):
        if not killed:
            killed.extend(pids)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    after_first(monkeypatch, kill)
    assert main(by_actors(command, second_node, tmp_path)) == 0
    assert killed and "an actor was lost during" in capsys.readouterr().err
    check_same(tmp_path, alone)


def test_a_removed_machine_loses_nothing(command, alone, second_node, tmp_path, monkeypatch):
    removed = []

    def remove(pids):
        if not removed:
            removed.append(second_node.second)
            second_node.remove_node(second_node.second, allow_graceful=False)
            second_node.second = None

    after_first(monkeypatch, remove)
    assert main(by_actors(command, second_node, tmp_path)) == 0
    assert removed
    check_same(tmp_path, alone)


@pytest.mark.parametrize(("number", "resumed_by_actors"), [(signal.SIGKILL, True), (signal.SIGINT, False)])
def test_a_stopped_driver_goes_on(command, alone, cluster, tmp_path, number, resumed_by_actors):
    args = by_actors(command, cluster, tmp_path, actors=1)
    hold = Path(command[command.index("--policies") + 1].rpartition(",")[2]).with_name("hold")
    hold.touch()  # so that the driver cannot end before it is stopped
    driver = subprocess.Popen([sys.executable, "-m", "far_env.cli", *args], stderr=subprocess.PIPE, text=True)
    records = tmp_path / "records.jsonl"
    while driver.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.01)
    driver.send_signal(number)
    _, stderr = driver.communicate(timeout=60)
    hold.unlink()
    before = len(load(tmp_path).records)
    assert 0 < before < len(load(alone).records)
    assert driver.returncode == (130 if number == signal.SIGINT else -number), stderr
    if number == signal.SIGINT:
        assert "the same command resumes from there" in stderr and "Traceback" not in stderr
    lines = records.read_bytes()
    assert main(args if resumed_by_actors else in_one_process(command, tmp_path)) == 0
    assert records.read_bytes().startswith(lines[: lines.rfind(b"\n") + 1]), "what was finished is not played again"
    check_same(tmp_path, alone)


def test_a_policy_that_fails_is_left_out_as_in_one_process(command, cluster, tmp_path, capsys):
    policy = tmp_path / "fails.py"
    policy.write_text(
        POLICY.replace("        while os.path.exists(HOLD):", "        raise RuntimeError('no idea')\n        while True:")
    )
    args = list(command)
    args[args.index("--policies") + 1] = f"recent_fill,{policy}"
    errors = []
    for name, device in (("one", "cpu"), ("ray", "auto")):
        ray = ["--ray", "--address", cluster.address] if name == "ray" else []
        assert main([*args, device, "--out", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json"), *ray]) == 2
        errors.append([line for line in capsys.readouterr().err.splitlines() if "error: no row" in line])
    assert errors[0] == errors[1] and "no idea" in errors[0][0]
    settings = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "ray")]
    assert settings[0] == settings[1]
