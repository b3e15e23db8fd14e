"""The command ``far-env reproduce``: its tables against their records, resuming, training from scratch, errors."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from far_env.agents import checkpoints, commands, trainer
from far_env.agents import reproduce as module
from far_env.agents.config import AgentTraining
from far_env.agents.reproduce import HEADING, load_tables, put_section
from far_env.cli import run_guarded
from far_env.config import load_yaml, parse
from far_env.evaluation import evaluate as evaluating
from far_env.evaluation.records import load
from far_env.evaluation.statistics import mean_interval
from far_env.policies import load_policy

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPING = [field.name for field in dataclasses.fields(AgentTraining) if field.name not in trainer.FREE_TO_CHANGE]


@pytest.fixture
def tables(tiny_host_folder):
    """Two small tables as the file would describe them."""
    pan = {"workloads": ["pan"], "budgets": [2, 4], "clips": 3, "seeds": [42, 7], "host": str(tiny_host_folder)}
    cuts = {"workloads": ["pan", "cuts"], "budgets": [4], "clips": 2, "host": str(tiny_host_folder)}
    return {
        "small": {
            "caption": "A small one.",
            "reference": "random",
            "parts": [pan | {"policies": ["random", "recent_fill", "full_history"]}],
        },
        "other": {"caption": "Another one.", "parts": [cuts | {"policies": ["recent_fill", "runs/mine"]}]},
    }


@pytest.fixture
def reproduce(tables, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder that holds the file of tables, and returns status, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()

    def run(*args, tables=tables, agents=None):
        content = {"tables": tables, "agents": {} if agents is None else agents}
        (tmp_path / "configs" / "results.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        options = ["--file", "configs/results.yaml", *(["--device", "cpu"] if args else [])]
        status = run_guarded("far-env", lambda: commands.reproduce([*options, *args]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err.strip().splitlines()[-1:]

    return run


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")][2:]


def refused(result, *fragments):
    status, _, (error,) = result
    assert status == 2 and error.startswith("far-env: error: ")
    for fragment in fragments:
        assert fragment in error


def test_the_published_tables_name_policies_that_exist_or_can_be_trained(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    tables, agents = load_tables(CONFIGS / "results.yaml")
    assert "headline" in tables
    for name in {name for table in tables.values() for name in table.policies} - set(agents):
        load_policy(name)
    for name, arguments in agents.items():
        config = parse(AgentTraining, shlex.split(arguments), "train_agent.py", "")
        if not name.startswith(checkpoints.PRETRAINED):
            assert config.run_dir == name
            continue
        shipped = load_yaml(AgentTraining, checkpoints.scorer_folder(name) / checkpoints.SETTINGS_FILE)
        differing = [key for key in SHAPING if getattr(config, key) != getattr(shipped, key)]
        assert not differing, f"{name} was trained with another {differing}"


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

    for workload, budget, name, psnr, _, difference in table:
        expected = mean_interval(scores(int(budget), name))
        assert (workload, psnr) == ("pan", f"{expected.mean:.2f} [{expected.low:.2f}, {expected.high:.2f}]")
        paired = mean_interval(scores(int(budget), name) - scores(int(budget), "random"))
        assert difference == ("" if name == "random" else f"{paired.mean:+.2f} [{paired.low:+.2f}, {paired.high:+.2f}]")
    facts = records[0].facts
    for said in (f"({facts['weights']})", "float32 on cpu", f"commit {facts['commit']}", facts["machine"], "42, 7 + clip id"):
        assert said in text
    assert re.search(
        r"- pan 2, pan 4: 3 test clips, .*\n- `far-env reproduce small`: \d+ s of evaluation, \d{4}-\d\d-\d\d\.", text
    )

    monkeypatch.setattr(evaluating, "play", lambda *_, **__: pytest.fail("played again"))
    assert reproduce("small")[0] == 0
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_a_table_holds_both_protocols_of_feedback(reproduce, tmp_path, tables):
    part = tables["small"]["parts"][0] | {"budgets": [4], "clips": 2, "seeds": [42], "policies": ["recent_fill", "random"]}
    both = {"small": tables["small"] | {"parts": [part, part | {"feedback": True}]}}
    assert reproduce("small", tables=both)[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    means = {}
    for folder in (path for path in (tmp_path / "runs/reproduce/small").iterdir() if path.is_dir()):
        for record in (records := load(folder).records):
            scores = [other.metrics["psnr"] for other in records if other.policy == record.policy]
            label = {"generated": "pan", "true": "pan (true frames fed back)"}[record.facts["feedback"]]
            means[label, record.policy] = f"{np.mean(scores):.2f}"
    assert means["pan", "random"] != means["pan (true frames fed back)", "random"]
    assert {(row[0], row[2]): row[3].split()[0] for row in rows(text)} == means
    assert len(re.findall(r"^- pan 4: 2 test clips, .* ODE steps; host", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^- pan 4: 2 test clips, .* ODE steps, true frames fed back; host", text, re.MULTILINE)) == 1


def test_a_table_holds_clips_of_several_splits(reproduce, tmp_path, tables):
    part = tables["small"]["parts"][0] | {"budgets": [4], "clips": 2, "seeds": [42], "policies": ["recent_fill", "random"]}
    both = {"small": tables["small"] | {"parts": [part, part | {"split": "validation"}]}}
    assert reproduce("small", tables=both)[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    means = {}
    for folder in (path for path in (tmp_path / "runs/reproduce/small").iterdir() if path.is_dir()):
        results = load(folder)
        label = {"test": "pan", "validation": "pan (validation)"}[results.settings.split]
        for name in ("recent_fill", "random"):
            scores = [record.metrics["psnr"] for record in results.records if record.policy == name]
            means[label, name] = f"{np.mean(scores):.2f}"
    assert means["pan", "random"] != means["pan (validation)", "random"]
    assert {(row[0], row[2]): row[3].split()[0] for row in rows(text)} == means
    assert "- pan 4: 2 test clips, " in text and "- pan 4: 2 validation clips, " in text
    bad = {"small": tables["small"] | {"parts": [part | {"split": "tset"}]}}
    refused(reproduce("small", tables=bad), "unknown split 'tset'; did you mean 'test'")


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
    original, calls = evaluating.play, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(evaluating, "play", stopping)
    assert reproduce("small")[0] == 130 and not (tmp_path / "RESULTS.md").exists()
    monkeypatch.setattr(evaluating, "play", original)
    assert reproduce("small")[0] == 0
    sessions = json.loads((tmp_path / "runs/reproduce/small/run.json").read_text())
    assert [session["episodes"] for session in sessions] == [12, 18], "two batches of three clips with two seeds, then three"


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["small"].update(captoin="x"), "small: unknown key 'captoin'; did you mean 'caption'?"),
        (lambda t: t["small"].pop("caption"), "small: Table.__init__() missing 1 required positional argument: 'caption'"),
        (lambda t: t["small"]["parts"][0].update(budget=4), "small, part 1: unknown key 'budget'; did you mean 'budgets'?"),
        (lambda t: t["small"]["parts"][0].update(budgets=["4"]), "small, part 1: budgets: expected int, got '4'"),
        (lambda t: t["small"]["parts"][0].update(policies=[]), "part 1: policies needs one or more names, got []"),
        (lambda t: t["small"]["parts"][0].update(workloads=["pam"]), "unknown workload 'pam'; did you mean 'pan'?"),
        (lambda t: t["small"]["parts"][0].update(clips=0), "clips and budgets must be at least 1"),
        (lambda t: t["small"].update(reference="packcache"), "the reference packcache is not among the policies"),
        (lambda t: t["small"].update(parts=[3]), "part 1: expected a mapping of settings, got int"),
        (lambda t: t.update({"All in": t["small"]}), "All in: a table's name is made of lower-case letters"),
        (lambda t: t["other"]["parts"][0]["policies"].append("pretrained/x"), "does not say how pretrained/x is trained"),
    ],
)
def test_bad_descriptions_name_the_place(reproduce, tables, change, message):
    change(tables)
    refused(reproduce("small"), "configs/results.yaml", message)


def test_bad_requests_are_one_sentence(reproduce, tmp_path):
    refused(reproduce("smal"), "unknown table 'smal'; did you mean 'small'?")
    refused(reproduce("small", "--clips", "0"), "clips must be above 0, got 0")
    refused(reproduce("small", "--file", "none.yaml"), "cannot read the configuration none.yaml")
    agents = {"runs/mine": "--run-dir runs/mine"}
    refused(
        reproduce("other", agents=agents), "no policy 'runs/mine'", "--from-scratch trains it with train_agent.py --run-dir"
    )
    refused(reproduce("all", agents={"runs/mine": 3}), "runs/mine needs the arguments of train_agent.py as text, got 3")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "RESULTS.md").exists()
