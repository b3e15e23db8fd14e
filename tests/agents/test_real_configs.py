"""The configurations for data sets, each from videos to table: made videos, a tiny host, and smaller sizes, nothing else."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import numpy as np
import pytest

from far_env import cli, workloads
from far_env.agents import trainer
from far_env.agents.config import AgentTraining
from far_env.agents.dry_run import dry_run
from far_env.agents.trainer import train
from far_env.config import config_path, load_yaml
from far_env.host.autoencoder import Autoencoder
from far_env.host.far_long import FARLong
from far_env.host.weights import save_host
from far_env.workloads import WORKLOADS, make_workload
from tests.clips.test_video import write_video
from tests.conftest import TINY_DCAE, TINY_FAR_LONG, randomise

NAMES = ("ucf101_tight", "ucf101_medium", "dmlab_medium", "dmlab_long", "minecraft_long")
FRAMES = 12
"""Frames that are predicted where the workload predicts 156."""
SMALLER = {
    "imitation": {"true_clips": 2, "rounds": ["true 1"], "epochs": 1, "round_epochs": 1, "batch_size": 16},
    "surrogate": {"num_envs": 2, "n_steps": 2, "batch_size": 4, "n_epochs": 1},
    "ppo": {"total_timesteps": 4, "num_envs": 2, "n_steps": 2, "batch_size": 4, "n_epochs": 1},
}


def made_videos(kind, folder):
    """A folder of few videos, as the data set has them: with 4 more than the benchmark plays, or 4 in all."""
    folder.mkdir()
    if kind == "ucf101":
        for i in range(54):
            write_video(folder / f"{i:02d}.mp4", 17, 32, 32)
    elif kind == "minecraft":
        for i in range(12):
            write_video(folder / f"{i}.mp4", 144 + FRAMES, 32, 32)
            np.savez(folder / f"{i}.npz", actions=np.arange(144 + FRAMES) % 3)
    else:
        for i in range(24):
            video = np.full((144 + FRAMES, 8, 8, 3), 10 * i, dtype=np.uint8)
            video[:, : i + 1 : 2] = 250
            np.savez_compressed(folder / f"{i:02d}.npz", video=video, actions=np.arange(144 + FRAMES) % 3)
    return folder


def long_host(folder, frame_size):
    """A FAR-Long with actions."""
    transformer, autoencoder = FARLong(**TINY_FAR_LONG), Autoencoder(**TINY_DCAE, scaling_factor=0.8)
    randomise(transformer, 1)
    randomise(autoencoder, 2)
    configs = {"transformer": TINY_FAR_LONG, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(folder, transformer, autoencoder, configs, frame_size=frame_size, num_steps=1)
    return folder


def smaller(config, **changes):
    sections = {}
    for name, values in SMALLER.items():
        section = getattr(config, name)
        sizes = {**values, **({"total_timesteps": 4} if name == "surrogate" and section.total_timesteps else {})}
        sections[name] = dataclasses.replace(section, **sizes)
    return dataclasses.replace(config, **sections, device="cpu", precision="float32", **changes)


@pytest.fixture
def few_steps(monkeypatch):
    """Workloads with one ODE step, and the long ones with fewer frames to predict."""

    def made(name, **options):
        spec = WORKLOADS[name]
        if spec.num_predict < 156:
            return dataclasses.replace(make_workload(name, **options), num_steps=1)
        clips = partial(spec.clips.func, protocol="far", num_frames=spec.num_context + FRAMES)
        shorter = {**WORKLOADS, name: dataclasses.replace(spec, clips=clips)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workloads, "WORKLOADS", shorter)
            return dataclasses.replace(make_workload(name, **options), num_steps=1, num_predict=FRAMES)

    monkeypatch.setattr(trainer, "make_workload", made)


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_trains_from_videos_to_a_table(name, few_steps, tiny_host_folder, tmp_path, capsys):
    kind = name.partition("_")[0]
    host = tiny_host_folder if kind == "ucf101" else long_host(tmp_path / "host", 128 if kind == "minecraft" else 64)
    whole = load_yaml(AgentTraining, config_path(name))
    place = {"data_dir": str(made_videos(kind, tmp_path / "videos")), "host": str(host), "run_dir": str(tmp_path / "run")}
    config = smaller(whole, **place, test_clips=2, table=("recent_fill",))
    if kind == "ucf101":
        cost = dry_run(config, 1.0)
        assert not (tmp_path / "run").exists() and cost.stages[-1].counts.name == "table"
    train(config)
    text = capsys.readouterr()
    assert "train_clips is " in text.err and f"not {whole.train_clips}: there are no more" in text.err
    done = load_yaml(AgentTraining, tmp_path / "run" / "config.yaml")
    # Of 54 and 24 videos 50 and 20 are the test split; by FAR's protocol every tenth is test, the one after it validation.
    splits = {"dmlab_long": (18, 3), "minecraft_long": (8, 2)}.get(name, (3, 1))
    assert (done.train_clips, done.validation_clips) == splits
    results = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    budgets = [int(budget) for budget in str(whole.budget).split(",")]
    assert [table["budget"] for table in results] == budgets
    assert set(results[0]["policies"]) == {"recent_fill", "learned"}
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "policy.py")]) == 0


@pytest.mark.parametrize(("kind", "name", "played"), [("ucf101", "ucf101_tight", 50), ("dmlab", "dmlab_medium", 20)])
def test_the_benchmarks_own_clips_are_not_trained_on(kind, name, played, tiny_host_folder, tmp_path):
    """A folder with no more videos than the benchmark plays has none left to train on."""
    folder = made_videos(kind, tmp_path / "videos")
    for path in sorted(folder.iterdir())[played + 1 :]:
        path.unlink()
    host = tiny_host_folder if kind == "ucf101" else long_host(tmp_path / "host", 64)
    config = load_yaml(AgentTraining, config_path(name))
    config = dataclasses.replace(config, host=str(host), device="cpu", data_dir=str(folder), run_dir=str(tmp_path / "run"))
    expected = f"train has no clips: its {played} videos are clips that the benchmark plays, .* more than {played + 1} videos"
    with pytest.raises(ValueError, match=expected):
        train(config)
    assert not (tmp_path / "run").exists()


def test_fewer_clips_are_refused_unless_they_are_allowed(tiny_host_folder, tmp_path):
    folder = made_videos("ucf101", tmp_path / "videos")
    config = load_yaml(AgentTraining, config_path("ucf101_tight"))
    place = {"host": str(tiny_host_folder), "device": "cpu", "data_dir": str(folder), "run_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="train_clips is 4096, but ucf101_short_prediction/train has 3"):
        train(dataclasses.replace(config, **place, allow_fewer_clips=False))
    with pytest.raises(ValueError, match="validation_clips is 1, fewer than the 2 budgets that share them"):
        train(dataclasses.replace(config, **place, budget="4,8"))
