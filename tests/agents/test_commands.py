"""The commands of agents: help without heavy imports, any working directory, and files that obey the umask."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from far_env.agents import checkpoints, commands
from far_env.agents.config import NetworkConfig
from far_env.agents.network import RetentionNetwork

SMALL = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)
COMMANDS = ("train", "export", "publish", "push", "sweep", "regret", "learning_curves", "reproduce")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_no_torch(name, tmp_path):
    code = (
        "import sys\n"
        "from far_env.agents import commands\n"
        "try:\n"
        f"    commands.{name}(['--help'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = {'torch', 'stable_baselines3', 'diffusers', 'matplotlib', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage: far-env " + name.replace("_", "-") in result.stdout


def test_every_command_has_a_help_line():
    for name in COMMANDS:
        line = getattr(commands, name).__doc__.split("\n")[0]
        assert line[0].isupper() and line.endswith(".") and len(line) < 60


def test_the_collection_lists_shipped_policies_and_accepts_run_folders(tmp_path, monkeypatch):
    assert checkpoints.names() and all(map(checkpoints.accepts, checkpoints.names()))
    assert not checkpoints.accepts("recent_fill") and not checkpoints.accepts(str(tmp_path / "nothing"))
    old = os.umask(0o022)
    try:
        checkpoints.save_scorer(RetentionNetwork(SMALL), SMALL, {"trained_on": "x"}, tmp_path)
    finally:
        os.umask(old)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {
        "policy.safetensors": "0o644",
        "policy.json": "0o644",
    }
    assert checkpoints.accepts(str(tmp_path))
    facts = checkpoints.facts(str(tmp_path))
    assert facts["family"] == "learned" and facts["tier"] == "M" and facts["note"] == "trained on x"
    policy, (network, _) = checkpoints.load(str(tmp_path)), checkpoints.load_scorer(tmp_path)
    assert policy.scorer.weights.keys() == network.state_dict().keys() and network.config == SMALL


def test_old_keys_of_a_saved_scorer_are_named(tmp_path):
    checkpoints.save_scorer(RetentionNetwork(SMALL), SMALL, {}, tmp_path)
    path = tmp_path / checkpoints.CONFIG_FILE
    path.write_text(path.read_text().replace("signals", "statistics"))
    with pytest.raises(ValueError, match=r"policy\.json: network: the key 'statistics' was renamed; use 'signals'"):
        checkpoints.load(str(tmp_path))
    path.write_text(path.read_text().replace("statistics", "surroundings"))
    with pytest.raises(ValueError, match=r"policy\.json: network: the option 'surroundings' was removed; delete it"):
        checkpoints.load(str(tmp_path))


def test_tables_are_listed_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands.reproduce([])
    assert "headline" in capsys.readouterr().out and not any(tmp_path.iterdir())
