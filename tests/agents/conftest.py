"""What several tests of agents need."""

from __future__ import annotations

import pytest
import yaml

from far_env.agents import checkpoints, commands
from far_env.agents.checkpoints import scorer_folder
from far_env.agents.config import AgentTraining, NetworkConfig, PPOSettings
from far_env.agents.publish import publish_run
from far_env.agents.trainer import train
from far_env.cli import run_guarded


@pytest.fixture(scope="session")
def finished(tiny_host_folder, tmp_path_factory):
    """A short run's folder."""
    config = AgentTraining(
        ppo=PPOSettings(total_timesteps=32, num_envs=4, n_steps=8, batch_size=16, n_epochs=1),
        network=NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2),
        host=str(tiny_host_folder),
        device="cpu",
        run_dir=str(tmp_path_factory.mktemp("runs") / "run"),
        train_clips=4,
        validation_clips=2,
        test_clips=2,
        table=("recent_fill",),
    )
    train(config)
    return scorer_folder(config.run_dir)


@pytest.fixture
def shipped(finished, tmp_path_factory, monkeypatch):
    """That run's policy as the only one that is shipped, under the name pretrained/general."""
    folder = tmp_path_factory.mktemp("pretrained")
    publish_run(finished, "general", folder)
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", folder)


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
