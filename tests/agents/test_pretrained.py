"""Shipped policies: their names, their model cards, and the equality of their exported files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil

import pytest
import torch

from far_env.agents import checkpoints, commands, publish
from far_env.agents.checkpoints import PRETRAINED, load_scorer, scorer_folder
from far_env.agents.config import AgentTraining, NetworkConfig
from far_env.cli import run_guarded
from far_env.config import from_dict, load_yaml
from far_env.evaluation.evaluate import evaluate
from far_env.host.weights import load_host
from far_env.policies import load_policy, policy_facts
from far_env.rollout.play import play
from far_env.workloads import make_workload

NAMES = checkpoints.names()


def table_of(run):
    """The one table of a run's results."""
    (table,) = json.loads((run / checkpoints.RESULTS_FILE).read_text())["tables"]
    return table


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """An empty folder in place of that of the shipped policies."""
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_a_policy_is_shipped_and_no_name_is_that_of_a_baseline():
    from far_env import baselines

    assert "pretrained/general" in NAMES
    assert not set(NAMES) & set(baselines.names())


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_what_the_files_say(name):
    folder = scorer_folder(name)
    network, facts = load_scorer(folder)
    settings = load_yaml(AgentTraining, folder / checkpoints.SETTINGS_FILE)
    card = (folder / publish.CARD_FILE).read_text()
    digest = hashlib.sha256((folder / checkpoints.WEIGHTS_FILE).read_bytes()).hexdigest()
    parameters = sum(value.numel() for value in network.state_dict().values())
    for said in (f"# {name}\n", facts["trained_on"], facts["host"], facts["commit"], digest, f"{parameters:,} parameters"):
        assert said in card
    config = from_dict(NetworkConfig, facts["network"], "policy.json")
    assert config == settings.network
    assert ("cannot be exported" in card) == bool(config.signals) == ("far-env export" not in card)
    trained_on = facts["trained_on"].replace(", ", ",")
    for said in (f"{settings.workload},budget {settings.budget}", f"seed {settings.seed}"):
        assert said.replace(", ", ",") in trained_on
    assert policy_facts(name)["sha256"] == digest and facts["trained_on"] in policy_facts(name)["note"]
    for said in facts["host"].split(", "):
        host = load_host(said.split(" ")[0], "cpu")
        assert said == f"{host.name} ({host.weights_hash})", "the host has changed since; train and publish again"


@pytest.mark.parametrize("name", NAMES)
def test_cards_have_the_words_of_the_template(name):
    """The facts and the measured tables of the card, put into the template again."""
    folder = scorer_folder(name)
    card = (folder / publish.CARD_FILE).read_text()
    host, trained_on = load_scorer(folder)[1]["host"], load_scorer(folder)[1]["trained_on"]
    facts = {
        "trained_on": trained_on,
        "host": host,
        "tested": re.search(r"- Test: (\d+ test clips)", card)[1],
        "place": re.search(rf"- Host: {re.escape(host)}, (.*)\.\n", card)[1],
        "command": re.search(r"- Command: `(.*)`; all", card)[1],
        "time": re.search(r"- Time: (.*)\.\n", card)[1],
        "commit": re.search(r"- Made by: commit (\w+), torch", card)[1],
        "torch": re.search(r"- Made by: commit \w+, torch (.*)\.\n", card)[1],
        "parameters": re.search(r"- Weights: ([\d,]+) parameters", card)[1],
        "sha256": re.search(r"SHA-256 (\w{64})\.", card)[1],
    }
    measured = card.split("## Measured quality\n\n")[1].split("\n- Intervals are")[0]
    settings = load_yaml(AgentTraining, folder / checkpoints.SETTINGS_FILE)
    assert publish.card_text(name, settings, facts, measured) == card


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_file_decides_as_the_policy(name, tmp_path):
    if policy_facts(name)["tier"] != "M":
        pytest.skip("it is not of tier M, and policies that read signals are not exported")
    commands.export([name, "--out", str(tmp_path / "policy.py")])
    settings = load_yaml(AgentTraining, scorer_folder(name) / checkpoints.SETTINGS_FILE)
    workload = make_workload(settings.workload.split(",")[0].strip(), host=settings.host, device="cpu")
    workload = dataclasses.replace(workload, num_predict=min(workload.num_predict, 11))
    clips = [workload.clips.clip("test", i) for i in (0, 1)]
    policies = [load_policy(name), load_policy(str(tmp_path / "policy.py"))]
    (original, decisions), (exported, others) = (play(workload, clips, [42, 43], policy, 4) for policy in policies)
    kept = [[(d.step, d.kept) for d in row] for row in decisions]
    assert kept == [[(d.step, d.kept) for d in row] for row in others] and kept[0]
    assert torch.equal(original.generated(range(2)), exported.generated(range(2)))


def test_a_published_run_is_the_run(finished, directory, tiny_workload):
    folder = publish.publish_run(finished, "mine", directory)
    assert checkpoints.names() == ["pretrained/mine"] and scorer_folder("pretrained/mine") == folder
    before, after = load_scorer(finished)[0].state_dict(), load_scorer(folder)[0].state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    card = (folder / publish.CARD_FILE).read_text()
    scores = table_of(finished)["policies"]["learned"]["psnr"]
    assert f"| pan | 4 | pretrained/mine | {scores['mean']:.2f} [{scores['low']:.2f}, {scores['high']:.2f}] |" in card
    assert "32 decisions of PPO" in card and re.search(r"- Time: \d+\.\d minutes\.", card) and "of imitation" not in card
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.yaml", "policy.json", "policy.safetensors"}
    result = evaluate(tiny_workload, 4, {"pretrained/mine": load_policy("pretrained/mine")}, [0], metrics=["psnr"])
    assert result.scores["pretrained/mine"]["psnr"].shape == (1, 1)


def test_a_run_with_several_tables_shows_them_all(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    table = table_of(run)
    (run / checkpoints.RESULTS_FILE).write_text(json.dumps({"tables": [table, table | {"workload": "cuts", "budget": 8}]}))
    card = (publish.publish_run(run, "mine", tmp_path / "pretrained") / publish.CARD_FILE).read_text()
    assert "| pan | 4 | pretrained/mine |" in card and "| cuts | 8 | pretrained/mine |" in card
    assert "- pan 4, cuts 8: 2 test clips" in card


def test_runs_without_a_recorded_time_have_that_of_their_logs(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    sessions = json.loads((run / "run.json").read_text())
    assert sessions[0].pop("training_seconds") > 0
    (run / "run.json").write_text(json.dumps(sessions))
    card = publish.publish_run(run, "mine", tmp_path / "pretrained") / publish.CARD_FILE
    assert "minutes of PPO; imitation was not timed" in card.read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pretrained/generl", "unknown pretrained policy 'pretrained/generl'; did you mean 'pretrained/general'"),
        ("pretrained/", "unknown pretrained policy 'pretrained/'"),
        ("pretrained/../runs", "unknown pretrained policy"),
        ("nothing_like_it", "no policy .*pretrained/general"),
    ],
)
def test_errors_about_unknown_names_suggest_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        load_policy(name)


def test_damaged_policies_and_unfinished_runs_are_one_sentence(finished, directory, tmp_path, capsys):
    folder = publish.publish_run(finished, "mine", directory)
    weights = (folder / checkpoints.WEIGHTS_FILE).read_bytes()
    (folder / checkpoints.WEIGHTS_FILE).write_bytes(weights[:1000])
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        load_policy(f"{PRETRAINED}mine")
    (folder / checkpoints.CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"policy\.json is damaged"):
        load_policy(f"{PRETRAINED}mine")

    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ValueError, match="lower-case letters, digits and hyphens, got 'Pan_1'"):
        publish.publish_run(run, "Pan_1", directory)
    (run / checkpoints.RESULTS_FILE).write_text(json.dumps({"tables": [table_of(run) | {"weights": "c0ffee00"}]}))
    with pytest.raises(ValueError, match=r"made with host .*c0ffee00\), the policy with"):
        publish.publish_run(run, "other", directory)
    (run / checkpoints.RESULTS_FILE).unlink()
    assert run_guarded("far-env", lambda: commands.publish([str(run), "other"])) == 2
    assert "only a finished run can be published" in capsys.readouterr().err
    assert not (directory / "other").exists()
