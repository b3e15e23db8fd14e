"""Sharing on the hub: what is pushed can be used by its name, at one commit, offline too, and without any code of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from far_env import cli
from far_env import hub as far_hub
from far_env.agents import checkpoints, commands
from far_env.agents.checkpoints import load_scorer, save_scorer
from far_env.agents.config import NetworkConfig
from far_env.agents.network import RetentionNetwork
from far_env.agents.push import push_folder
from far_env.contract import SIGNALS
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.results_folder import load
from far_env.host.weights import load_host
from far_env.hub import HubError
from far_env.policies import load_policy, policy_facts
from tests.loopback_hub import TOKEN


@pytest.fixture
def token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def offline(monkeypatch):
    """No hub answers from now on, and nothing is remembered but what is on the disk."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    far_hub.snapshot.cache_clear()


def test_a_pushed_run_is_a_policy_by_name_at_its_commit(token, finished, tiny_workload, tmp_path, monkeypatch, capsys):
    assert cli.run_guarded("far-env", lambda: commands.push([str(finished), "--to", "hub:me/pan"])) == 0
    files = token.files("me/pan")
    commit = token.repos["model", "me/pan"].commit_id(1)
    assert f"pushed; hub:me/pan@{commit} is" in capsys.readouterr().out
    assert sorted(files) == ["README.md", "config.yaml", "policy.json", "policy.py", "policy.safetensors", "results.json"]
    scores = json.loads(files["results.json"])["tables"][0]["policies"]["learned"]["psnr"]
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: far-env\n---\n\n# hub:me/pan\n")
    assert f"| pan | 4 | hub:me/pan | {scores['mean']:.2f} [" in card and "far-env export hub:me/pan --out policy.py" in card

    token.add("me/pan", {**files, "policy.safetensors": b"another"})
    name = f"hub:me/pan@{commit}"
    state, before = (load_scorer(folder)[0].state_dict() for folder in (checkpoints.scorer_folder(name), finished))
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    assert policy_facts(name)["source"] == name
    evaluate_grid(
        [tiny_workload],
        [4],
        {name: load_policy(name)},
        range(1),
        metrics=["psnr"],
        out=tmp_path / "results",
        policy_facts={name: policy_facts(name)},
    )
    assert load(tmp_path / "results").settings.policies[name]["source"] == name
    assert not token.fetched("policy.py"), "code is not fetched"
    offline(monkeypatch)
    assert load_policy(name) is not None
    assert cli.run_guarded("far-env", lambda: commands.export([name, "--out", str(tmp_path / "policy.py")])) == 0
    text = (tmp_path / "policy.py").read_text()
    assert text.replace(f"source: {name}\n", "").splitlines() == files["policy.py"].decode().splitlines()
    with pytest.raises(ValueError, match="hub:me/other is not in the cache"):
        load_policy("hub:me/other")


@pytest.mark.usefixtures("shipped")
def test_a_branch_is_recorded_as_the_commit_that_it_was(token, monkeypatch):
    push_folder("pretrained/general", "hub:me/shipped")
    commit = token.repos["model", "me/shipped"].commit_id(1)
    card = token.files("me/shipped")["README.md"].decode()
    assert "pretrained/general" not in card and "hub:me/shipped" in card
    assert policy_facts("hub:me/shipped")["source"] == f"hub:me/shipped@{commit}"
    token.add("me/shipped", {})
    assert load_policy("hub:me/shipped") is not None, "one process uses one commit"
    offline(monkeypatch)
    assert policy_facts("hub:me/shipped")["source"] == f"hub:me/shipped@{commit}"


def test_a_policy_that_needs_signals_has_no_exported_file_and_says_why(token, tmp_path, capsys):
    config, folder = NetworkConfig(signals=tuple(SIGNALS)[:1]), tmp_path / "signals"
    folder.mkdir()
    save_scorer(RetentionNetwork(config), config, {"host": "nothing"}, folder)
    token.add("me/signals", {path.name: path.read_bytes() for path in folder.iterdir()})
    assert cli.run_guarded("far-env", lambda: commands.export(["hub:me/signals", "--out", str(tmp_path / "p.py")])) == 2
    assert f"this policy needs {config.signals[0]}, which the benchmark does not provide" in capsys.readouterr().err
    assert not (tmp_path / "p.py").exists()


def test_a_pushed_host_is_a_host_by_name(token, tiny_host_folder, monkeypatch):
    name = push_folder(str(tiny_host_folder), "hub:me/host", private=True)
    assert token.repos["model", "me/host"].private
    assert sorted(token.files("me/host")) == ["README.md", "autoencoder.safetensors", "config.json", "transformer.safetensors"]
    here, there = load_host(tiny_host_folder, "cpu"), load_host("hub:me/host", "cpu")
    assert there.name == name and there.weights_hash == here.weights_hash
    assert all(torch.equal(a, b) for a, b in zip(here.transformer.parameters(), there.transformer.parameters(), strict=True))
    offline(monkeypatch)
    assert load_host(name, "cpu") is there
    with pytest.raises(HubError, match=r"me/host at commit .* lacks policy\.json, policy\.safetensors; it holds README\.md"):
        monkeypatch.setenv("HF_ENDPOINT", token.url)
        load_policy("hub:me/host")


def test_pushed_results_are_reported_by_name(token, tiny_workload, tmp_path):
    out = tmp_path / "results"
    evaluate_grid(
        [tiny_workload], [4], {"recent_fill": load_policy("recent_fill")}, range(2), metrics=["psnr"], out=out, show_clips=1
    )
    (out / "frames" / "notes.pkl").write_bytes(b"not pushed")
    push_folder(str(out), "hub:me/results")
    files = token.files("me/results")
    assert {"README.md", "evaluation.json", "records.jsonl", "frames/tiny_pan/truth_c0.png"} < set(files)
    assert not any(name.endswith(".pkl") for name in files)
    mean = sum(record.metrics["psnr"] for record in load(out).records) / 2
    assert f"| tiny_pan | 4 | recent_fill | {mean:.2f} | 2 |" in files["README.md"].decode()
    assert cli.main(["report", "hub:me/results", "--out", str(tmp_path / "report.html")]) == 0
    assert cli.main(["report", str(out), "--out", str(tmp_path / "local.html")]) == 0
    fetched = load("hub:me/results").folder
    assert load("hub:me/results").records == load(out).records
    pages = [(tmp_path / page).read_text() for page in ("report.html", "local.html")]
    assert pages[0].replace(fetched.name, "results") == pages[1], "but for the name of the folder"


def test_what_cannot_be_pushed_is_one_sentence(hub, token, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / checkpoints.RESULTS_FILE).unlink()
    for args, message in (
        ([str(tmp_path), "--to", "hub:me/it"], "has nothing to push; give a folder with one of: policy (policy.json), host"),
        ([str(run), "--to", "hub:me/it"], "only a finished run can be published"),
        ([str(finished), "--to", "me/it"], "'me/it' is no repository; the form is hub:user/name"),
        ([str(finished), "--to", "hub:me/it@main"], "a push makes a new commit; give hub:me/it without @main"),
        (["pretrained/generl", "--to", "hub:me/it"], "did you mean 'pretrained/general'"),
    ):
        assert cli.run_guarded("far-env", lambda args=args: commands.push(args)) == 2
        assert message in capsys.readouterr().err
    assert not hub.repos
