"""PPO in the retention environment: settings in, a run folder with a trained scorer out; stoppable and resumable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecMonitor

from agents.adapters import AgentPolicy
from agents.imitation import ImitationSettings, imitate
from agents.memory_env import MemoryVecEnv
from agents.network import RetentionNetwork
from agents.subset_policy import SubsetPolicy
from far_env.config import require_positive
from far_env.evaluation.evaluate import evaluate
from far_env.host.training_loop import load_tensors, save_tensors
from far_env.metrics import LOWER_IS_BETTER
from far_env.sb3 import SB3VecEnv
from far_env.vector_env import FrameRetentionVectorEnv
from far_env.workloads import Workload

CHECKPOINT_FILE = "checkpoint.ckpt"


@dataclass(frozen=True)
class NetworkSize:
    """The scorer, see `agents.network.RetentionNetwork`."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    memory: bool = False
    """Whether it remembers births, see `agents.memory.HistoryMemory`."""


@dataclass(frozen=True)
class PPOSettings:
    """MaskablePPO's settings under SB3's names."""

    total_timesteps: int = 80_000
    """Decisions to learn from, over all environments; 0 leaves the scorer as imitation made it."""
    num_envs: int = 64
    n_steps: int = 20
    """Decisions per environment between updates."""
    batch_size: int = 256
    n_epochs: int = 4
    learning_rate: float = 1e-3
    """At the start; falls linearly to zero."""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.003
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    critic_updates: int = 0
    """The first so many updates teach the critic alone, so that it does not mislead a scorer that has already learned."""

    def __post_init__(self) -> None:
        if self.total_timesteps < 0 or self.critic_updates < 0:
            raise ValueError(
                f"total_timesteps and critic_updates cannot be negative: {self.total_timesteps}, {self.critic_updates}"
            )
        require_positive(self, "num_envs", "n_steps", "batch_size", "n_epochs", "learning_rate")


@dataclass(frozen=True)
class RewardSettings:
    """What an episode earns, see `far_env.env.FrameRetentionEnv`."""

    metric: str = "psnr"
    scale: float = 0.1
    """Factor on the metric, so that returns are of order one; LPIPS, which is better when lower, counts negatively."""
    relative_to: str | None = None
    telescoping: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "scale")

    @property
    def sign(self) -> int:
        """−1 where lower is better."""
        return -1 if self.metric in LOWER_IS_BETTER else 1


@dataclass(frozen=True)
class AgentTraining:
    """One experiment."""

    imitation: ImitationSettings = field(default_factory=ImitationSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    network: NetworkSize = field(default_factory=NetworkSize)
    reward: RewardSettings = field(default_factory=RewardSettings)
    workload: str = "pan"
    budget: int | str = 4
    host: str | None = None
    """"embedded", a released transformer or a host folder; by default the workload's own."""
    device: str = "auto"
    """Where the host runs; the scorer is small and stays on the CPU."""
    precision: str = "float32"
    """Of the host: float32, bfloat16 or auto."""
    seed: int = 0
    run_dir: str = "runs/agent"
    resume: bool = False
    """Go on with the run in run_dir if there is one."""
    train_clips: int = 4096
    """Episodes draw from the first so many clips of the train split."""
    validation_clips: int = 64
    validate_every: int = 5
    """Updates between validations; the scorer that is best by the reward's metric on validation clips is kept."""
    test_clips: int = 256
    """Clips of the final table."""
    table: tuple[str, ...] = ("recent_fill", "recent_window", "random", "full_history")
    """Policies that stand beside the learned one in it."""
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""
    protocol: str | None = None
    """How those videos become clips: benchmark or far."""

    def __post_init__(self) -> None:
        require_positive(self, "train_clips", "validation_clips", "validate_every", "test_clips")
        if self.ppo.total_timesteps == 0 and self.imitation.rounds == 0:
            raise ValueError("nothing would be learned: set imitation.rounds, ppo.total_timesteps or both above 0")

    @property
    def clip_options(self) -> dict[str, str]:
        """Arguments of the workload's clip source."""
        given = {"data_dir": self.data_dir, "protocol": self.protocol}
        return {key: value for key, value in given.items() if value is not None}


class ResumablePPO(MaskablePPO):
    """MaskablePPO whose logged iterations go on after a resume."""

    def dump_logs(self, iteration: int = 0) -> None:
        """Log with the number of updates that all timesteps so far make."""
        super().dump_logs(self.num_timesteps // (self.n_steps * self.n_envs))


def train_scorer(config: AgentTraining, workload: Workload, max_frames: int, run_dir: Path) -> RetentionNetwork:
    """Imitate, if asked to, then train until ``total_timesteps`` decisions; returns the best scorer by validation.

    A training that was stopped is finished.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the last checkpoint stays in ``run_dir`` and ``resume`` goes on from it.
        ValueError: if the checkpoint is damaged or was made with another host.
    """
    if config.ppo.total_timesteps == 0:
        return _imitated(config, workload, max_frames, run_dir)
    env = FrameRetentionVectorEnv(
        config.ppo.num_envs,
        workload,
        max_frames,
        reward={config.reward.metric: config.reward.sign * config.reward.scale},
        relative_to=config.reward.relative_to,
        telescoping=config.reward.telescoping,
        num_clips=config.train_clips,
        autoreset_mode="SAME_STEP",
    )
    settings = asdict(config.ppo)
    total, learning_rate = settings.pop("total_timesteps"), settings.pop("learning_rate")
    for own in ("num_envs", "critic_updates"):
        settings.pop(own)
    venv = VecMonitor(SB3VecEnv(env))
    model = ResumablePPO(
        SubsetPolicy,
        MemoryVecEnv(venv, workload.num_predict) if config.network.memory else venv,
        policy_kwargs={"network": asdict(config.network)},
        learning_rate=lambda remaining: learning_rate * remaining,
        seed=config.seed,
        device="cpu",
        verbose=0,
        **settings,
    )
    progress = Progress(config, workload, max_frames, run_dir / CHECKPOINT_FILE)
    if (run_dir / CHECKPOINT_FILE).exists():
        progress.restore(model, env)
    elif config.imitation.rounds:
        model.policy.scorer.load_state_dict(_imitated(config, workload, max_frames, run_dir).state_dict())
    if model.num_timesteps < total:
        # One CSV per session: SB3's writer would begin the file again.
        csv = CSVOutputFormat(str(run_dir / f"progress_{model.num_timesteps:08d}.csv"))
        model.set_logger(Logger(str(run_dir), [csv, TensorBoardOutputFormat(str(run_dir))]))
        model.learn(total - model.num_timesteps, callback=progress, reset_num_timesteps=False, progress_bar=True)
    network = RetentionNetwork(**asdict(config.network))
    network.load_state_dict(progress.best_weights)
    return network.eval()


def _imitated(config: AgentTraining, workload: Workload, max_frames: int, run_dir: Path) -> RetentionNetwork:
    """The scorer that has learned from the expert."""
    return imitate(
        config.imitation,
        asdict(config.network),
        workload,
        max_frames,
        run_dir / "decisions",
        seed=config.seed,
        num_clips=config.train_clips,
    )


class Progress(BaseCallback):
    """Between updates: validates on fixed clips, remembers the best scorer, and saves all that a resumed run needs.

    SB3's own checkpoint holds neither random states nor environments, so a run resumed from it would be another run. Here
    everything is saved before a rollout starts, as tensors and plain values.
    """

    def __init__(self, config: AgentTraining, workload: Workload, max_frames: int, path: Path) -> None:
        super().__init__()
        self.config, self.workload, self.max_frames, self.path = config, workload, max_frames, path
        self.updates = -1
        self.best_score = -np.inf
        self.best_weights: dict[str, torch.Tensor] = {}

    def restore(self, model: MaskablePPO, env: FrameRetentionVectorEnv) -> None:
        """Put model, environment and random states where the checkpoint left them."""
        saved = load_tensors(self.path)
        weights = self.workload.host.weights_hash
        if saved["host"] != weights:
            raise ValueError(
                f"{self.path} was made with host {saved['host']}, this one is {weights}; choose another run folder"
            )
        model.policy.load_state_dict(saved["policy"])
        model.policy.optimizer.load_state_dict(saved["optimizer"])
        model.num_timesteps, model._n_updates = saved["num_timesteps"], saved["n_updates"]
        self.updates, self.best_score = saved["updates"] - 1, saved["best_score"]
        self.best_weights = saved["best_weights"]
        env.load_state_dict(saved["env"])
        # SB3 would reset the environment if it had no last observation.
        model._last_obs = {key: value.numpy() for key, value in saved["last_obs"].items()}
        model._last_episode_starts = saved["last_episode_starts"].numpy()
        if isinstance(model.env, MemoryVecEnv):
            model.env.load_state_dict(saved["memories"], model._last_obs)
        monitor = _monitor_of(model)
        monitor.episode_returns = saved["episode_returns"].numpy()
        monitor.episode_lengths = saved["episode_lengths"].numpy()
        torch.set_rng_state(saved["torch_rng"])
        name, keys, position, has_gauss, gauss = saved["numpy_rng"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))

    def _on_rollout_start(self) -> None:
        self.updates += 1
        if self.updates % self.config.validate_every == 0:
            self._validate()
        self._save()
        self.model.policy.scorer.requires_grad_(self.updates >= self.config.ppo.critic_updates)

    def _on_training_end(self) -> None:
        self.updates += 1
        self._validate()
        self._save()
        # SB3 has written its last line before this.
        self.logger.dump(self.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def _validate(self) -> None:
        scorer: RetentionNetwork = self.model.policy.scorer
        result = evaluate(
            self.workload,
            self.max_frames,
            {"learned": AgentPolicy(scorer)},
            range(self.config.validation_clips),
            split="validation",
            metrics=(self.config.reward.metric,),
            progress=False,
        )
        score = float(result.scores["learned"][self.config.reward.metric].mean())
        self.logger.record(f"validation/{self.config.reward.metric}", score)
        if self.config.reward.sign * score > self.best_score:
            self.best_score = self.config.reward.sign * score
            self.best_weights = {key: value.detach().clone() for key, value in scorer.state_dict().items()}

    def _save(self) -> None:
        model, monitor = self.model, _monitor_of(self.model)
        env: FrameRetentionVectorEnv = monitor.venv.env
        name, keys, position, has_gauss, gauss = np.random.get_state()
        save_tensors(
            self.path,
            {
                "host": self.workload.host.weights_hash,
                "policy": model.policy.state_dict(),
                "optimizer": model.policy.optimizer.state_dict(),
                "num_timesteps": model.num_timesteps,
                "n_updates": model._n_updates,
                "updates": self.updates,
                "best_score": float(self.best_score),
                "best_weights": self.best_weights,
                "env": env.state_dict(),
                "memories": model.env.state_dict() if isinstance(model.env, MemoryVecEnv) else [],
                "last_obs": {key: torch.as_tensor(value) for key, value in model._last_obs.items()},
                "last_episode_starts": torch.as_tensor(model._last_episode_starts),
                "episode_returns": torch.as_tensor(monitor.episode_returns),
                "episode_lengths": torch.as_tensor(monitor.episode_lengths),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": (name, torch.as_tensor(keys.astype(np.int64)), position, has_gauss, gauss),
            },
        )


def _monitor_of(model: MaskablePPO) -> VecMonitor:
    """The monitor, which memory may be wrapped around."""
    return model.env.venv if isinstance(model.env, MemoryVecEnv) else model.env


def experiment_facts(config: AgentTraining, workload: Workload, max_frames: int) -> dict[str, Any]:
    """What a trained scorer should say about itself."""
    return {
        "trained_on": f"{workload.name}, budget {max_frames}, first {config.train_clips} train clips, seed {config.seed}",
        "decisions": config.ppo.total_timesteps,
        "host": f"{workload.host.name} ({workload.host.weights_hash})",
    }
