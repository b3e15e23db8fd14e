"""What several tests of agents need."""

from __future__ import annotations

import pytest

from far_env.agents import checkpoints
from far_env.agents.checkpoints import scorer_folder
from far_env.agents.config import AgentTraining, NetworkConfig, PPOSettings
from far_env.agents.publish import publish_run
from far_env.agents.trainer import train


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
