"""The command ``far-env reproduce``: its tables against their records, resuming, training from scratch, errors."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import trim_mean

from far_env import provenance
from far_env.agents import checkpoints, commands, trainer
from far_env.agents import reproduce as module
from far_env.agents.config import AgentTraining
from far_env.agents.reproduce import HEADING, put_section
from far_env.agents.results_tables import load_tables
from far_env.cli import run_guarded
from far_env.config import load_yaml, parse
from far_env.evaluation import batches
from far_env.evaluation.results_folder import load
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

    def run(*args, tables=tables, agents=None, **more):
        content = {"tables": tables, "agents": {} if agents is None else agents, **more}
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


def test_rules_are_tuned_by_as_many_rollouts_as_the_learned_policy_was_validated_by():
    tables, agents = load_tables(CONFIGS / "results.yaml")
    tuned = [part for table in tables.values() for part in table.parts if part.tune]
    assert {workload for part in tuned for workload in part.workloads} >= {"pan", "cuts", "orbit", "maze_retrieval"}
    for part in tuned:
        assert {*part.tune} < {*part.policies}, "the default form is there too"
        config = parse(AgentTraining, shlex.split(agents["pretrained/general"]), "train_agent.py", "")
        for workload in part.workloads:
            validated = config.validation_rollouts[workload]
            assert validated in (0, part.tune_rollouts), (workload, validated)


def test_validation_rollouts_are_those_that_a_training_plays():
    """22 updates that validate before every fifth and at the end: 0, 5, 10, 15, 20 and 22; 84 clips of each of two worlds."""
    arguments = "--workload pan,cuts,orbit --validation-clips 84 --validate-every 5 --ppo.workload pan,cuts --ppo.num-envs 64"
    arguments += " --ppo.n-steps 40 --ppo.total-timesteps 56320"
    config = parse(AgentTraining, shlex.split(arguments), "train_agent.py", "")
    assert config.validation_rollouts == {"pan": 6 * 84, "cuts": 6 * 84, "orbit": 0}


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
        (lambda t: t["small"]["parts"][0].update(first_clip=-1), "seeds and first_clip at least 0"),
        (
            lambda t: t["small"]["parts"][0].update(interventions=["swpa"]),
            "unknown intervention 'swpa'; did you mean 'swap'",
        ),
        (lambda t: t["small"]["parts"][0].update(tune=["recent_fill"]), "part 1: baseline recent_fill has no parameters"),
        (
            lambda t: t["small"]["parts"][0].update(tune=["scene_tracker"], tune_rollouts=15),
            "part 1: 2 forms are tuned by 16 rollouts or more, got 15",
        ),
        (
            lambda t: t["small"]["parts"][0].update(interventions=["swap"], intervention_clips=0),
            "part 1: intervention_clips must be at least 1, got 0",
        ),
        (
            lambda t: t["small"].update(runs={"two": ["random"]}),
            "small: runs: two needs a list of two or more",
        ),
        (
            lambda t: t["small"].update(runs={"random": ["uniform", "packcache"]}),
            "the reference random is a row of several",
        ),
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
    refused(reproduce("other"), "no policy 'runs/mine'")
    refused(reproduce("other", agents={"runs/mine": "--run-dir runs/x"}), "runs/mine is trained into runs/x")
    refused(reproduce("all"), "unknown table 'all'", "--all measures all of them")
    refused(reproduce("small", "--all"), "give either --all or names, not also small")
    refused(reproduce("--all", agents={"runs/mine": 3}), "runs/mine needs the arguments of train_agent.py as text, got 3")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "RESULTS.md").exists()


def test_a_table_begins_with_the_clip_that_is_asked_for(reproduce, tmp_path, tables):
    part = tables["small"]["parts"][0] | {"budgets": [4], "clips": 2, "seeds": [42], "policies": ["recent_fill", "random"]}
    content = {"small": tables["small"] | {"parts": [part, part | {"workloads": ["cuts"], "first_clip": 1}]}}
    assert reproduce("small", tables=content, first_clip=2048)[0] == 0
    records = [record for path in (tmp_path / "runs/reproduce/small").glob("*/") for record in load(path).records]
    assert {(r.workload, r.clip) for r in records} == {("pan", 2048), ("pan", 2049), ("cuts", 1), ("cuts", 2)}
    text = (tmp_path / "RESULTS.md").read_text()
    assert "- pan 4: 2 test clips from 2048 on, noise" in text and "- cuts 4: 2 test clips from 1 on, noise" in text
    content["small"]["parts"] = [part | {"first_clip": 4095}]
    refused(reproduce("small", tables=content), "the table small cannot be measured: clip id 4096 is out of range")


def test_a_table_holds_interventions_tuned_forms_and_rows_of_runs(reproduce, tmp_path, tables):
    part = tables["small"]["parts"][0] | {"clips": 2, "seeds": [42]}
    policies = ["recent_fill", "scene_tracker", "two"]
    first = part | {"budgets": [3, 4], "policies": policies, "tune": ["scene_tracker"], "tune_rollouts": 11}
    second = part | {"budgets": [4], "policies": policies, "interventions": ["swap", "noise"], "intervention_clips": 1}
    runs = {"two": ["random_mid:seed=1", "random_mid:seed=2"]}
    content = {"small": tables["small"] | {"parts": [first, second], "reference": "recent_fill", "runs": runs, "robust": False}}
    status, out, _ = reproduce(tables=content)
    assert status == 0
    assert reproduce("small", tables=content)[0] == 0
    text = (tmp_path / "RESULTS.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| workload"))
    assert "PSNR swap dB" in head and "PSNR noise dB" in head and "validation rollouts" in head and "IQM" not in head
    labels = {(row[1], label) for row in rows(text) for label in row[2].split(" = ")}
    tuned = {(budget, f"scene_tracker tuned on pan {budget}") for budget in ("3", "4")}
    assert labels == {(budget, name) for budget in ("3", "4") for name in policies} | tuned
    assert "- two: mean over 2 training runs: random_mid:seed=1, random_mid:seed=2." in text

    lines = [json.loads(line) for path in tmp_path.rglob("records.jsonl") for line in path.read_text().splitlines()]
    frames = [
        len(line["psnr_per_frame"]) * len([name for name in line["metrics"] if name.startswith("psnr")]) for line in lines
    ]
    counted = int(out.split()[1].replace(",", ""))
    shared, not_beside = 2 * 4, 2 * 3  # episodes of both parts, and those of a default form that is among the better half
    assert 0 <= counted - sum(frames) <= (shared + not_beside) * 11
    disturbed = [line for line in lines if "psnr_swap" in line["metrics"]]
    assert {line["clip"] for line in disturbed} == {0} and "; interventions on the first 1 clips." in text
    (row,) = [row for row in rows(text) if row[2] == "two" and row[6]]
    swapped = [line["metrics"]["psnr_swap"] for line in disturbed if line["policy"] in runs["two"]]
    assert float(row[6].split()[0]) == pytest.approx(np.mean(swapped), abs=0.006)
    undisturbed = [line for line in lines if line["policy"] in runs["two"] and line["budget"] == 4 and line not in disturbed]
    assert float(row[3].split()[0]) == pytest.approx(np.mean([line["metrics"]["psnr"] for line in undisturbed]), abs=0.006)
    played = [json.loads(path.read_text()) for path in tmp_path.rglob("scene_tracker_pan_*.json")]
    assert {form["validation_rollouts"] for form in played} <= {*range(7, 12)}
    tuned_rows = [row for row in rows(text) if "tuned on" in row[2]]
    assert {row[-1].split()[-1] for row in tuned_rows} == {str(form["validation_rollouts"]) for form in played}


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
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(batches, "play", stopping)
    assert reproduce("--all", tables=content)[0] == 130
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## one" in text and "## two" not in text
    status, _, (remark,) = reproduce("--all", tables=content)
    assert status == 0 and remark.endswith("sections that are not of these tables and stay as they were: regret")
    assert len(calls) == 3 * 3 + 1, "three policies in three tables; the one that was stopped was begun again"
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
