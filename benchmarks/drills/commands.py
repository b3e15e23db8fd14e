"""The commands under test, on a tiny host with random weights and with tiny settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Imported here, so that the forked processes need not import them.
import far_env.agents.export
import far_env.agents.trainer
import far_env.clips.recorder.run
import far_env.evaluation.host_training
import far_env.evaluation.plots
import far_env.evaluation.report
import far_env.evaluation.validate  # noqa: F401
from benchmarks.drills.process import Process
from benchmarks.drills.state import differences, folder_state
from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig, PPOSettings
from far_env.config import save_yaml
from far_env.host.autoencoder import Autoencoder
from far_env.host.far import FAR
from far_env.host.training.config import AutoencoderTraining, HostTraining, Source, TransformerTraining
from far_env.host.weights import save_host
from tests.clips.recorded_environments import WALK
from tests.conftest import TINY_DCAE, TINY_FAR, randomise


@dataclass(frozen=True)
class Command:
    """A command under test.

    Attributes:
        args: its arguments, given the folder it may write to.
        prints: whether its output is its result.
    """

    name: str
    args: Callable[[Path], list[str]]
    prints: bool = False

    def start(self, folder: Path, before: Callable[[], None] | None = None) -> Process:
        """Run it on a folder."""
        return Process(self.args(folder), folder / "output.txt" if self.prints else Path(os.devnull), before)

    def finish(self, folder: Path, expected: dict[str, object], before: Callable[[], None] | None = None) -> list[str]:
        """Run it to its end; returns what differs from the undisturbed outcome."""
        process = self.start(folder, before)
        if (status := process.ended()) != 0:
            return [f"status {status}: {process.errors()[-1500:]!r}"]
        return differences(folder_state(folder), expected)


def commands(place: Path) -> list[Command]:
    """The commands under test; what they need is made in ``place``."""
    host = place / "host"
    transformer, autoencoder = FAR(**TINY_FAR), Autoencoder(**TINY_DCAE, scaling_factor=0.8)
    randomise(transformer, 1)
    randomise(autoencoder, 2)
    configs = {"transformer": TINY_FAR, "autoencoder": {**TINY_DCAE, "scaling_factor": 0.8}}
    save_host(host, transformer, autoencoder, configs, frame_size=64, num_steps=2)
    skipped, ppo = PPOSettings(total_timesteps=0), PPOSettings(64, num_envs=4, n_steps=4, batch_size=16, n_epochs=2)
    imitation = ImitationSettings(true_clips=3, rounds=("true 3", "rollouts 3"), epochs=2, batch_size=16)
    stages = {
        "imitation": {"imitation": imitation, "ppo": skipped},
        "surrogate": {"surrogate": ppo, "ppo": skipped},
        "host": {"ppo": ppo},
    }
    for name, stage in stages.items():
        sizes = {"train_clips": 6, "validation_clips": 2, "validate_every": 2, "test_clips": 2, "table": ("recent_fill",)}
        network = NetworkConfig(width=16, edge_width=8)
        agent = AgentTraining(**stage, **sizes, network=network, host=str(host), device="cpu", resume=True)
        save_yaml(agent, place / f"{name}.yaml")
    training = HostTraining(
        AutoencoderTraining(TINY_DCAE, steps=6, batch_size=4, frames_per_clip=2),
        TransformerTraining(TINY_FAR, steps=12, clips_per_world=4, batch_size=2, min_contiguous=8),
        sources=(Source("pan"),),
        device="cpu",
        precision="float32",
        checkpoint_every=2,
        quality_clips=0,
    )
    save_yaml(training, place / "training.yaml")
    evaluate = ["evaluate", "--policies", "recent_fill,random,full_history", "--budget", "2,4", "--clips", "4"]
    evaluate += ["--batch-size", "2", "--metrics", "psnr,ssim", "--show-clips", "2", "--host", str(host), "--device", "cpu"]

    def train(name: str) -> Callable[[Path], list[str]]:
        return lambda folder: ["train", "--config", str(place / f"{name}.yaml"), "--run-dir", str(folder / "run")]

    def train_host(folder: Path) -> list[str]:
        folders = ["--run-dir", str(folder / "run"), "--output-dir", str(folder / "host")]
        return ["train-host", "--config", str(place / "training.yaml"), *folders]

    def record(folder: Path) -> list[str]:
        played = [
            "--env",
            WALK,
            "--behaviours",
            "sticky,scan",
            "--frames",
            "20",
            "--size",
            "32",
            "--env-options",
            "seconds=0.002",
        ]
        counts = ["--train-episodes", "6", "--validation-episodes", "2", "--test-episodes", "4"]
        return ["record", "--out", str(folder / "clips"), *played, *counts]

    material = place / "material"
    material.mkdir()
    for args in ([*evaluate, "--out", str(material / "results")], train("imitation")(material)):
        process = Process(args, Path(os.devnull))
        if process.ended() != 0:
            raise RuntimeError(process.errors())
    results, run = str(material / "results"), str(material / "run")
    return [
        Command("imitation", train("imitation")),
        Command("surrogate PPO", train("surrogate")),
        Command("host PPO", train("host")),
        Command("validation", lambda folder: ["validate", results, "--device", "cpu"], prints=True),
        Command("evaluation", lambda folder: [*evaluate, "--out", str(folder / "results")]),
        Command("export", lambda folder: ["export", run, "--out", str(folder / "policy.py")]),
        Command("host training", train_host),
        Command("recording", record),
        Command(
            "report",
            lambda folder: ["report", results, "--out", str(folder / "report.html"), "--plots", str(folder / "plots")],
        ),
    ]
