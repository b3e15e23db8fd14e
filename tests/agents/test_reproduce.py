"""The command ``far-env reproduce``: a table against its records, resuming, training from scratch, one commit, errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy.stats import trim_mean

from far_env import provenance
from far_env.agents import checkpoints
from far_env.agents import reproduce as module
from far_env.agents.reproduce import HEADING, put_section
from far_env.evaluation import batches
from far_env.evaluation.results_folder import load
from far_env.evaluation.statistics import mean_interval
from tests.agents.reproduced import refused, rows


def test_a_table_is_its_records_and_a_second_run_plays_nothing(reproduce, tmp_path, monkeypatch):
    assert reproduce("small")[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith(HEADING) and "## small\n\nA small one.\n" in text
    (folder,) = (path for path in (tmp_path / "runs/reproduce/small").iterdir() if path.is_dir())
    records = load(folder).records
    table = rows(text)
    assert len(table) == 2 * 3 and len(records) == 3 * 2 * (2 * 2 + 1)

    def scores(budget, name):
        values = {(r.clip, r.seed): r.metrics["psnr"] for r in records if r.policy == name and r.budget in (budget, 9999)}
        return np.array([[values[clip, seed] for seed in (42, 7)] for clip in range(3)])

    for workload, budget, name, psnr, _, difference, iqm, better in table:
        expected = mean_interval(scores(int(budget), name))
        assert (workload, psnr) == ("pan", f"{expected.mean:.2f} [{expected.low:.2f}, {expected.high:.2f}]")
        paired = mean_interval(scores(int(budget), name) - scores(int(budget), "random"))
        assert difference == ("" if name == "random" else f"{paired.mean:+.2f} [{paired.low:+.2f}, {paired.high:+.2f}]")
        assert float(iqm.split()[0]) == pytest.approx(trim_mean(scores(int(budget), name).ravel(), 0.25), abs=0.006)
        is_better = (scores(int(budget), name) > scores(int(budget), "random")).mean()
        assert better == "" if name == "random" else float(better.split()[0]) == pytest.approx(is_better, abs=0.006)
    assert (
        "\n\n4 comparisons with random; clear of zero by Holm–Bonferroni at a family-wise 5 % (sign-flip p values): none.\n"
        in text
    )
    facts = records[0].facts
    for said in (f"({facts['weights']})", "float32 on cpu", f"commit {facts['commit']}", facts["machine"], "42, 7 + clip id"):
        assert said in text
    assert re.search(
        r"- pan 2, pan 4: 3 test clips, .*\n- `far-env reproduce small`: \d+ s of evaluation, \d{4}-\d\d-\d\d\.", text
    )

    monkeypatch.setattr(batches, "play", lambda *_, **__: pytest.fail("played again"))
    assert reproduce("small")[0] == 0
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_list_says_how_many_frames_each_table_generates(reproduce, tmp_path):
    status, text, _ = reproduce()
    assert status == 0 and not (tmp_path / "runs").exists() and not (tmp_path / "RESULTS.md").exists()
    assert text.splitlines() == ["small  330 frames  A small one.", "other   88 frames  Another one."]
    reproduce("small")
    lines = next((tmp_path / "runs/reproduce/small").glob("*/records.jsonl")).read_text().splitlines()
    assert sum(len(json.loads(line)["psnr_per_frame"]) for line in lines) == 330


def test_a_quick_look_states_its_clips_and_is_extended_to_the_whole_table(reproduce, tmp_path):
    reproduce("small", "--clips", "1")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "pan 4: 1 test clips" in text and "`far-env reproduce small --clips 1`" in text
    reproduce("small")
    assert "pan 4: 3 test clips" in (tmp_path / "RESULTS.md").read_text()
    sessions = json.loads((tmp_path / "runs/reproduce/small/run.json").read_text())
    assert [session["episodes"] for session in sessions] == [10, 20]


def test_a_stopped_table_is_resumed(reproduce, tmp_path, monkeypatch):
    original, calls = batches.play, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(batches, "play", stopping)
    assert reproduce("small")[0] == 130 and not (tmp_path / "RESULTS.md").exists()
    monkeypatch.setattr(batches, "play", original)
    assert reproduce("small")[0] == 0
    sessions = json.loads((tmp_path / "runs/reproduce/small/run.json").read_text())
    assert [session["episodes"] for session in sessions] == [18, 12], "full history and two policies, then the other budget"


@pytest.mark.usefixtures("shipped")
def test_from_scratch_trains_once_and_compares_the_run_folder(reproduce, tables, tiny_host_folder, tmp_path, monkeypatch):
    arguments = (
        f"--host {tiny_host_folder} --run-dir runs/again --ppo.total-timesteps 32 --ppo.num-envs 4 --ppo.n-steps 8 "
        "--ppo.batch-size 16 --network.width 16 --network.num-layers 1 --train-clips 4 --validation-clips 2 --test-clips 2 "
        "--table recent_fill"
    )
    mine = {"caption": "Learned.", "reference": "pretrained/general", "parts": tables["small"]["parts"]}
    mine["parts"] = [mine["parts"][0] | {"policies": ["pretrained/general", "recent_fill"], "clips": 1}]
    content = {"tables": {"learned": mine, **tables}, "agents": {"pretrained/general": arguments}}
    assert reproduce("learned", **content)[0] == 0
    shipped = (tmp_path / "RESULTS.md").read_text()
    assert {row[2] for row in rows(shipped)} == {"pretrained/general", "recent_fill"}
    trained_on = json.loads((checkpoints.PRETRAINED_DIR / "general" / "policy.json").read_text())["trained_on"]
    assert f"pretrained/general: trained on {trained_on} by `python train_agent.py {arguments}`" in shipped

    status, out, _ = reproduce("learned", "--from-scratch", **content)
    assert status == 0 and f"python train_agent.py {arguments}" in out
    text = (tmp_path / "RESULTS.md").read_text()
    assert {row[2] for row in rows(text)} == {"runs/again", "recent_fill"} and "PSNR − runs/again" in text
    assert "`far-env reproduce learned --from-scratch`" in text and "first 4 train clips" in text
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    assert reproduce("learned", "--from-scratch", **content)[0] == 0
    assert (tmp_path / "RESULTS.md").read_text() == text
    content["agents"] = {"pretrained/general": f"{arguments} --seed 1"}
    refused(reproduce("learned", "--from-scratch", **content), "runs/again holds a run with other settings (seed)")


def test_runs_that_are_not_there_are_trained_and_share_a_row(reproduce, tables, tiny_host_folder, tmp_path, monkeypatch):
    arguments = (
        f"--host {tiny_host_folder} --ppo.total-timesteps 32 --ppo.num-envs 4 --ppo.n-steps 8 --ppo.batch-size 16 "
        "--network.width 16 --network.num-layers 1 --train-clips 4 --validation-clips 2 --test-clips 2 --table recent_fill"
    )
    agents = {f"runs/seed{i}": f"{arguments} --seed {i} --run-dir runs/seed{i}" for i in range(2)}
    part = tables["small"]["parts"][0] | {"policies": ["two", "recent_fill", "scene_tracker"], "clips": 2, "seeds": [42]}
    content = {"seeds": {"caption": "Seeds.", "parts": [part], "runs": {"two": list(agents)}, "robust": False}}
    content["seeds"]["parts"] = [part | {"budgets": [4], "tune": ["scene_tracker"], "tune_rollouts": 11}]
    assert reproduce("seeds", tables=content, agents=agents)[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "- two: mean over 2 training runs: runs/seed0, runs/seed1." in text
    for i in range(2):
        assert (
            f"- runs/seed{i}: trained on pan, budget 4, first 4 train clips, seed {i} by `python train_agent.py {arguments}"
            in text
        )
    records = [
        r for path in (tmp_path / "runs/reproduce/seeds").glob("*/") if "tuned" not in path.name for r in load(path).records
    ]
    values = [r.metrics["psnr"] for r in records if r.policy in agents]
    (row,) = [row for row in rows(text) if row[2] == "two"]
    assert len(values) == 2 * 2 and float(row[3].split()[0]) == pytest.approx(np.mean(values), abs=0.006)
    assert row[-1] == "4 on pan", "one update: a validation before it and one at the end, each of two clips"
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    assert reproduce("seeds", tables=content, agents=agents)[0] == 0
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_other_tables_and_other_text_stay(reproduce, tmp_path):
    before = (
        "# Mine\n\nText.\n\n<!-- begin small -->\nold\n<!-- end small -->\n\nMore.\n\n<!-- begin x -->\n7\n<!-- end x -->\n"
    )
    (tmp_path / "RESULTS.md").write_text(before)
    assert reproduce("small", "--clips", "1")[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    head, tail = before.split("old")
    assert text.startswith(head) and text.endswith(tail) and "## small" in text and "old" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"RESULTS.md", "configs", "runs"}


def test_new_sections_come_last():
    text = put_section(put_section(HEADING, "a", "1"), "b", "2")
    assert text == f"{HEADING}\n<!-- begin a -->\n1\n<!-- end a -->\n\n<!-- begin b -->\n2\n<!-- end b -->\n"
    assert put_section(text, "a", "3") == text.replace("\n1\n", "\n3\n")


@pytest.mark.parametrize(
    "content",
    ["<!-- begin small -->", "<!-- end small --> <!-- begin small -->", 2 * "<!-- begin small --> <!-- end small -->"],
)
def test_broken_marks_are_refused_before_any_work(reproduce, tmp_path, content):
    (tmp_path / "RESULTS.md").write_text(content)
    refused(reproduce("small"), "needs <!-- begin small --> once and <!-- end small --> once after it")
    assert not (tmp_path / "runs").exists() and (tmp_path / "RESULTS.md").read_text() == content


def test_bad_requests_are_one_sentence(reproduce, tmp_path):
    refused(reproduce("smal"), "unknown table 'smal'; did you mean 'small'?")
    refused(reproduce("small", "--clips", "0"), "clips must be above 0, got 0")
    refused(reproduce("small", "--file", "none.yaml"), "cannot read the configuration none.yaml")
    refused(reproduce("other"), "no policy 'runs/mine'")
    refused(reproduce("other", agents={"runs/mine": "--run-dir runs/x"}), "runs/mine is trained into runs/x")
    refused(reproduce("all"), "unknown table 'all'", "--all measures all of them")
    refused(reproduce("small", "--all"), "give either --all or names, not also small")
    refused(reproduce("--all", agents={"runs/mine": 3}), "runs/mine needs the arguments of train_agent.py as text, got 3")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "RESULTS.md").exists()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """far-env as if it ran from another checkout, which has one commit; a function that runs git there."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "provenance.py").write_text("# of a test\n")
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))

    def git(*arguments):
        who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return git, folder


def test_all_tables_are_of_one_commit(reproduce, tables, tmp_path, checkout, monkeypatch):
    git, folder = checkout
    part = tables["small"]["parts"][0] | {"budgets": [4], "clips": 1, "seeds": [42]}
    content = {name: {"caption": f"{name}.", "reference": "random", "parts": [part]} for name in ("one", "two", "three")}
    (tmp_path / "RESULTS.md").write_text("# Mine\n\n<!-- begin regret -->\n7\n<!-- end regret -->\n")
    original, calls = batches.play, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(batches, "play", stopping)
    assert reproduce("--all", tables=content)[0] == 130
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## one" in text and "## two" not in text
    status, _, (remark,) = reproduce("--all", tables=content)
    assert status == 0 and remark.endswith("sections that are not of these tables and stay as they were: regret")
    assert len(calls) == 3 * 2 + 1, "full history and the others in three tables; the batch that was stopped was begun again"
    text = (tmp_path / "RESULTS.md").read_text()
    commit = provenance.git_commit()
    assert re.findall("commit (.*?),", text) == [commit] * 3 and text.count("`far-env reproduce --all`") == 3

    (folder / "provenance.py").write_text("# changed\n")
    refused(reproduce("--all", tables=content), "changes that are not committed (provenance.py); commit them first")
    git("commit", "-am", "second")
    message = f"holds episodes of commit {commit}, and this is commit {provenance.git_commit()}, so the tables would be mixed"
    refused(reproduce("--all", tables=content), "runs/reproduce/one/", message, "give another folder (--episodes), delete")
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert reproduce("one", tables=content)[0] == 0, "single tables may be of several commits, which they name"
    assert reproduce("--all", "--episodes", "runs/again", tables=content)[0] == 0
    assert set(re.findall("commit (.*?),", (tmp_path / "RESULTS.md").read_text())) == {provenance.git_commit()}

    shutil.rmtree(folder / ".git")
    refused(
        reproduce("--all", tables=content), "without its git repository (it was installed from a wheel", "clone the repository"
    )


def test_a_change_while_tables_are_measured_ends_it(reproduce, tables, tmp_path, checkout, monkeypatch):
    part = tables["small"]["parts"][0] | {"budgets": [4], "clips": 1, "seeds": [42]}
    content = {name: {"caption": f"{name}.", "reference": "random", "parts": [part]} for name in ("one", "two")}
    original = batches.play

    def editing(*args, **options):
        (checkout[1] / "provenance.py").write_text("# edited meanwhile\n")
        return original(*args, **options)

    monkeypatch.setattr(batches, "play", editing)
    refused(reproduce("--all", tables=content), "changes that are not committed (provenance.py)")
    assert not (tmp_path / "RESULTS.md").exists() and not (tmp_path / "runs/reproduce/two").exists()
