"""What a table of ``far-env reproduce`` may describe: the shipped descriptions, and each kind of part against its records."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from far_env.agents import checkpoints, trainer
from far_env.agents.config import AgentTraining
from far_env.agents.results_tables import load_tables
from far_env.config import load_yaml, parse
from far_env.evaluation.results_folder import load
from far_env.policies import load_policy
from tests.agents.reproduced import refused, rows

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPING = [field.name for field in dataclasses.fields(AgentTraining) if field.name not in trainer.FREE_TO_CHANGE]


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


def test_rules_are_tuned_by_no_fewer_rollouts_than_the_learned_policy_was_validated_by():
    tables, agents = load_tables(CONFIGS / "results.yaml")
    tuned = [part for table in tables.values() for part in table.parts if part.tune]
    assert {workload for part in tuned for workload in part.workloads} >= {"pan", "cuts", "orbit", "maze_retrieval"}
    for part in tuned:
        assert {*part.tune} < {*part.policies}, "the default form is there too"
        config = parse(AgentTraining, shlex.split(agents["pretrained/general"]), "train_agent.py", "")
        for workload in part.workloads:
            validated = config.validation_rollouts[workload]
            assert validated <= part.tune_rollouts, (workload, validated)


def test_validation_rollouts_are_those_that_a_training_plays():
    """22 updates that validate before every fifth and at the end: 0, 5, 10, 15, 20 and 22; 84 clips of each of two worlds."""
    arguments = "--workload pan,cuts,orbit --validation-clips 84 --validate-every 5 --ppo.workload pan,cuts --ppo.num-envs 64"
    arguments += " --ppo.n-steps 40 --ppo.total-timesteps 56320"
    config = parse(AgentTraining, shlex.split(arguments), "train_agent.py", "")
    assert config.validation_rollouts == {"pan": 6 * 84, "cuts": 6 * 84, "orbit": 0}


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
