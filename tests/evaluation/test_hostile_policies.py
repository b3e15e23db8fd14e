"""Policy files that do harm: the other policies of an evaluation go on, the limits hold, and no process is left."""

from __future__ import annotations

import json
import os
import time

import pytest

from benchmarks.drills.policies import HOSTILE, Hostile, running
from far_env import cli
from far_env.contract import RolloutState
from far_env.errors import PolicyError
from far_env.evaluation.report import warnings
from far_env.evaluation.results_folder import load
from far_env.policy_process import PolicyProcess

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no os.fork, which the files call")
SOUND = Hostile("pass", None)


@pytest.fixture
def evaluate(tiny_host_folder, tmp_path, capsys):
    """``far-env evaluate`` with these policies: status, the numbers and the standard error."""

    def run(policies, *args):
        table = tmp_path / "table.json"
        common = ["--host", str(tiny_host_folder), "--device", "cpu", "--metrics", "psnr", "--json", str(table)]
        status = cli.main(["evaluate", "--policies", policies, "--clips", "2", *common, *args])
        return status, json.loads(table.read_text()) if table.exists() else None, capsys.readouterr().err

    return run


def ask(policy):
    return policy.build_temporal_cache_plan([], RolloutState(1, 0.1, 4), {"max_frames": 3, "capacity_mb": 0.1})


@pytest.mark.parametrize("name", HOSTILE)
def test_the_other_policies_go_on(evaluate, tmp_path, name):
    hostile, told = HOSTILE[name], tmp_path / "told"
    path = str(hostile.write(tmp_path / "policy.py", told))
    start = time.monotonic()
    status, table, err = evaluate(f"{path},recent_fill", "--policy-seconds", str(hostile.limit))
    assert time.monotonic() - start < 60 and running(told) == []
    assert table["policies"]["recent_fill"]["psnr"]["n"] == 2
    if hostile.says is None:
        assert (status, table["failed"]) == (0, {}) and path in table["policies"]
        return
    assert status == 2 and list(table["policies"]) == ["recent_fill"] and list(table["failed"]) == [path]
    assert hostile.says in table["failed"][path]
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"far-env: error: no row {path} for pan 4: ") and hostile.says in last and "Traceback" not in err


def test_the_end_of_a_process_is_noticed_at_once_though_its_child_holds_the_answers(tmp_path):
    told = tmp_path / "told"
    path = HOSTILE["forks twice, clears its environment"].write(tmp_path / "policy.py", told)
    with PolicyProcess(path, call_seconds=600) as policy:
        start = time.monotonic()
        with pytest.raises(PolicyError, match="ended its process with status 7"):
            ask(policy)
        assert time.monotonic() - start < 60 and len(told.read_text().split()) == 2
        with pytest.raises(PolicyError, match=r"has been ended \(it ended its process with status 7\)"):
            ask(policy)
    assert running(told) == []


def test_a_failed_policy_is_tried_again_and_the_others_are_kept(evaluate, tmp_path):
    path, told, out = tmp_path / "policy.py", tmp_path / "told", tmp_path / "results"
    HOSTILE["raises"].write(path, told)
    both = f"{path},recent_fill,full_history"
    assert evaluate(both, "--out", str(out), "--budget", "2,4")[0] == 2
    results = load(out)
    assert list(results.settings.failed[str(path)]) == ["pan 2", "pan 4"]
    assert {record.policy for record in results.records} == {"recent_fill", "full_history"}
    assert any(f"{path} was left out on pan 2: policy {path} on clip 0" in sentence for sentence in warnings(results))
    kept = (out / "records.jsonl").read_bytes()

    evaluate("random", "--out", str(out))
    assert list(load(out).settings.failed) == [str(path)], "another policy does not change why this one failed"
    SOUND.write(path, told)
    status, table, _ = evaluate(both, "--out", str(out), "--budget", "2,4")
    assert status == 0 and all(list(cell["failed"]) == [] and str(path) in cell["policies"] for cell in table["tables"])
    assert load(out).settings.failed == {} and (out / "records.jsonl").read_bytes().startswith(kept)
    path.write_text(path.read_text() + "# changed\n")
    status, _, err = evaluate(both, "--out", str(out))
    assert status == 2 and "the content of policy" in err, "its episodes are of the file as it was"


def test_a_policy_that_fails_under_one_budget_has_its_other_rows(evaluate, tmp_path):
    path = Hostile("if budget['max_frames'] < 4: raise ValueError('too few')", "").write(tmp_path / "p.py", tmp_path / "told")
    status, table, err = evaluate(f"{path},recent_fill", "--budget", "2,4")
    small, large = table["tables"]
    assert status == 2 and str(path) not in small["policies"] and str(path) in large["policies"]
    assert list(small["failed"]) == [str(path)] and large["failed"] == {}
    assert err.strip().splitlines()[-1].startswith(f"far-env: error: no row {path} for pan 2: ")


def test_an_evaluation_of_failing_policies_alone_is_one_sentence(evaluate, tmp_path):
    path = HOSTILE["raises"].write(tmp_path / "policy.py", tmp_path / "told")
    status, table, err = evaluate(str(path), "--budget", "2,4")
    last = err.strip().splitlines()[-1]
    assert (status, table) == (2, None) and last.startswith("far-env: error: policy") and "enough of this" in last
