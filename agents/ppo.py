"""PPO in the retention environment: settings in, a run folder with a trained scorer out; stoppable and resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from far_env.agents.imitation import ImitationSettings, fitted, imitate
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_wrapper import AgentVecEnv
from far_env.agents.policies import AgentPolicy
from far_env.agents.subset_policy import SubsetPolicy
from far_env.agents.surrogate import SurrogateVectorEnv
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat, Logger, TensorBoardOutputFormat
from stable_baselines3.common.vec_env import VecMonitor

from far_env.config import require_positive
from far_env.envs.sb3 import JoinedVecEnv, SB3VecEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.evaluation.evaluate import evaluate
from far_env.metrics import LOWER_IS_BETTER
from far_env.tensor_files import load_tensors, save_tensors
from far_env.workloads import Workload, make_workload

CHECKPOINT_FILE = "checkpoint.ckpt"
SURROGATE_FOLDER = "surrogate"
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class NetworkSize:
    """The scorer, see `far_env.agents.network.RetentionNetwork`."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    memory: bool = False
    """Whether it remembers births, see `far_env.agents.memory.HistoryMemory`."""
    attention: bool = True
    """Whether rows see each other; without it each is scored alone."""
    surroundings: bool = False
    """Whether it also remembers how frames changed around each one, dropped ones too, and compares frames by it."""
    places: bool = False
    """Whether it also remembers which frames show the same place or shot, as far as changes tell."""
    path: bool = False
    """Whether it also remembers how far apart frames are along the camera's path, as far as changes tell."""
    signals: tuple[str, ...] = ()
    """What it may see beyond the benchmark's matrix, see `far_env.contract.SIGNALS`; such a scorer cannot be exported."""
    sequential_eviction: bool = False
    """Whether it drops frames one after the other where several have to go; such a scorer learns by imitation alone."""
    independent: bool = False
    """Whether each frame is decided by itself, and of too many the newest stay, where else sets never exceed the budget."""


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
    critic_warmup_updates: int = 0
    """The first so many updates teach the critic alone, so that it does not mislead a scorer that has already learned."""

    def __post_init__(self) -> None:
        if self.total_timesteps < 0 or self.critic_warmup_updates < 0:
            raise ValueError(
                "total_timesteps and critic_warmup_updates cannot be negative: "
                f"{self.total_timesteps}, {self.critic_warmup_updates}"
            )
        require_positive(self, "num_envs", "n_steps", "batch_size", "n_epochs", "learning_rate")


@dataclass(frozen=True)
class RewardSettings:
    """What an episode earns, see `far_env.envs.retention_env.FrameRetentionEnv`."""

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
    surrogate: PPOSettings = field(default_factory=lambda: PPOSettings(total_timesteps=0))
    """PPO before PPO, where the host only has a stand-in, which is much faster: see `far_env.agents.surrogate`."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    network: NetworkSize = field(default_factory=NetworkSize)
    reward: RewardSettings = field(default_factory=RewardSettings)
    workload: str = "pan"
    """One or more, separated by commas: episodes come from all of them in equal parts."""
    budget: int | str = 4
    """One or more, separated by commas: each episode draws one."""
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
        decisions = self.surrogate.total_timesteps + self.ppo.total_timesteps
        if decisions == 0 and self.imitation.rounds == 0:
            raise ValueError(
                "nothing would be learned: set imitation.rounds or the total_timesteps of surrogate or ppo above 0"
            )
        if self.network.sequential_eviction and decisions:
            raise ValueError(
                "network.sequential_eviction is for imitation alone: set the total_timesteps of surrogate and ppo to 0"
            )

    @property
    def clip_options(self) -> dict[str, str]:
        """Arguments of the workload's clip source."""
        given = {"data_dir": self.data_dir, "protocol": self.protocol}
        return {key: value for key, value in given.items() if value is not None}

    def make_workloads(self) -> list[Workload]:
        """What is trained on. Raises ValueError on an unknown name, or more environments than are shared evenly."""
        names = [name.strip() for name in self.workload.split(",")]
        for name, own in (("surrogate", self.surrogate), ("ppo", self.ppo)):
            if own.num_envs % len(names):
                raise ValueError(f"{name}.num_envs is {own.num_envs}, which {len(names)} workloads cannot share evenly")
        place = {"host": self.host, "device": self.device, "precision": self.precision}
        return [make_workload(name, **place, **self.clip_options) for name in names]


class ResumablePPO(MaskablePPO):
    """MaskablePPO whose logged iterations go on after a resume."""

    def dump_logs(self, iteration: int = 0) -> None:
        """Log with the number of updates that all timesteps so far make."""
        super().dump_logs(self.num_timesteps // (self.n_steps * self.n_envs))


def train_scorer(
    config: AgentTraining, workloads: Sequence[Workload], budgets: Sequence[int], run_dir: Path
) -> RetentionNetwork:
    """Imitate, practise with the stand-in and train with the host, as far as asked to; returns the best scorer by validation.

    A training that was stopped is finished.

    Raises:
        KeyboardInterrupt: on Ctrl-C; the last checkpoint stays in ``run_dir`` and ``resume`` goes on from it.
        ValueError: if the checkpoint is damaged or was made with another host.
    """
    experiment = (config, workloads, budgets)

    def practised() -> Weights | None:
        if config.surrogate.total_timesteps == 0:
            return imitated()
        return _learn(*experiment, config.surrogate, SurrogateVectorEnv, run_dir / SURROGATE_FOLDER, imitated)

    def imitated() -> Weights | None:
        return _imitated(*experiment, run_dir) if config.imitation.rounds else None

    if config.ppo.total_timesteps == 0:
        best = practised()
    else:
        best = _learn(*experiment, config.ppo, FrameRetentionVectorEnv, run_dir, practised)
    return fitted(asdict(config.network), best)


def _learn(
    config: AgentTraining,
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    ppo: PPOSettings,
    env_class: type[FrameRetentionVectorEnv],
    folder: Path,
    before: Callable[[], Weights | None],
) -> Weights:
    """PPO in environments of this class, until ``total_timesteps``; the weights that were best on validation clips.

    Args:
        ppo: its settings.
        folder: for checkpoint and logs.
        before: gives the weights to begin with, if any; not called where there is a checkpoint to go on from.
    """
    start = None if (folder / CHECKPOINT_FILE).exists() else before()
    folder.mkdir(parents=True, exist_ok=True)
    envs = [
        env_class(
            ppo.num_envs // len(workloads),
            workload,
            budgets,
            reward={config.reward.metric: config.reward.sign * config.reward.scale},
            relative_to=config.reward.relative_to,
            telescoping=config.reward.telescoping,
            num_clips=config.train_clips,
            signals=config.network.signals,
            autoreset_mode="SAME_STEP",
        )
        for workload in workloads
    ]
    settings = asdict(ppo)
    total, learning_rate = settings.pop("total_timesteps"), settings.pop("learning_rate")
    for own in ("num_envs", "critic_warmup_updates"):
        settings.pop(own)
    venv = VecMonitor(JoinedVecEnv([SB3VecEnv(env) for env in envs]))
    model = ResumablePPO(
        SubsetPolicy,
        AgentVecEnv(
            venv,
            [workload.num_predict for workload in workloads for _ in range(envs[0].num_envs)],
            RetentionNetwork(**asdict(config.network)).view,
        ),
        policy_kwargs={"network": asdict(config.network)},
        learning_rate=lambda remaining: learning_rate * remaining,
        seed=config.seed,
        device="cpu",
        verbose=0,
        **settings,
    )
    progress = Progress(config, workloads, budgets, ppo, envs, folder / CHECKPOINT_FILE)
    if progress.path.exists():
        progress.restore(model)
    elif start is not None:
        model.policy.scorer.load_state_dict(start)
    if model.num_timesteps < total:
        # One CSV per session: SB3's writer would begin the file again.
        csv = CSVOutputFormat(str(folder / f"progress_{model.num_timesteps:08d}.csv"))
        model.set_logger(Logger(str(folder), [csv, TensorBoardOutputFormat(str(folder))]))
        try:
            model.learn(total - model.num_timesteps, callback=progress, reset_num_timesteps=False, progress_bar=True)
        finally:
            model.logger.close()
    return progress.best_weights


def _imitated(config: AgentTraining, workloads: Sequence[Workload], budgets: Sequence[int], run_dir: Path) -> Weights:
    """Of the scorer that has learned from the expert."""
    network = imitate(
        config.imitation,
        asdict(config.network),
        workloads,
        budgets,
        run_dir / "decisions",
        seed=config.seed,
        num_clips=config.train_clips,
    )
    return network.state_dict()


class Progress(BaseCallback):
    """Between updates: validates on fixed clips, remembers the best scorer, and saves all that a resumed run needs.

    SB3's own checkpoint holds neither random states nor environments, so a run resumed from it would be another run. Here
    everything is saved before a rollout starts, as tensors and plain values.
    """

    def __init__(
        self,
        config: AgentTraining,
        workloads: Sequence[Workload],
        budgets: Sequence[int],
        ppo: PPOSettings,
        envs: Sequence[FrameRetentionVectorEnv],
        path: Path,
    ) -> None:
        super().__init__()
        self.config, self.workloads, self.budgets, self.ppo = config, workloads, budgets, ppo
        self.envs, self.path = envs, path
        self.updates = -1
        self.best_score = -np.inf
        self.best_weights: Weights = {}

    def restore(self, model: MaskablePPO) -> None:
        """Put model, environments and random states where the checkpoint left them."""
        saved = load_tensors(self.path)
        hosts = _hosts(self.workloads)
        if saved["hosts"] != hosts:
            raise ValueError(
                f"{self.path} was made with host {', '.join(saved['hosts'])}, this one is {', '.join(hosts)}; "
                "choose another run folder"
            )
        model.policy.load_state_dict(saved["policy"])
        model.policy.optimizer.load_state_dict(saved["optimizer"])
        model.num_timesteps, model._n_updates = saved["num_timesteps"], saved["n_updates"]
        self.updates, self.best_score = saved["updates"] - 1, saved["best_score"]
        self.best_weights = saved["best_weights"]
        for env, state in zip(self.envs, saved["envs"], strict=True):
            env.load_state_dict(state)
        # SB3 would reset the environment if it had no last observation.
        model._last_obs = {key: value.numpy() for key, value in saved["last_obs"].items()}
        model._last_episode_starts = saved["last_episode_starts"].numpy()
        model.env.load_state_dict(saved["memories"], model._last_obs)
        monitor = model.env.venv
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
        self.model.policy.scorer.requires_grad_(self.updates >= self.ppo.critic_warmup_updates)

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
        metric = self.config.reward.metric
        scores = validation_scores(self.config, self.workloads, self.budgets, scorer)
        for (name, budget), own in scores.items():
            if len(scores) > 1:
                self.logger.record(f"validation/{metric}_{name}_{budget}", own)
        score = float(np.mean(list(scores.values())))
        self.logger.record(f"validation/{metric}", score)
        if self.config.reward.sign * score > self.best_score:
            self.best_score = self.config.reward.sign * score
            self.best_weights = {key: value.detach().clone() for key, value in scorer.state_dict().items()}

    def _save(self) -> None:
        model, monitor = self.model, self.model.env.venv
        name, keys, position, has_gauss, gauss = np.random.get_state()
        save_tensors(
            self.path,
            {
                "hosts": _hosts(self.workloads),
                "policy": model.policy.state_dict(),
                "optimizer": model.policy.optimizer.state_dict(),
                "num_timesteps": model.num_timesteps,
                "n_updates": model._n_updates,
                "updates": self.updates,
                "best_score": float(self.best_score),
                "best_weights": self.best_weights,
                "envs": [env.state_dict() for env in self.envs],
                "memories": model.env.state_dict(),
                "last_obs": {key: torch.as_tensor(value) for key, value in model._last_obs.items()},
                "last_episode_starts": torch.as_tensor(model._last_episode_starts),
                "episode_returns": torch.as_tensor(monitor.episode_returns),
                "episode_lengths": torch.as_tensor(monitor.episode_lengths),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": (name, torch.as_tensor(keys.astype(np.int64)), position, has_gauss, gauss),
            },
        )


def validation_scores(
    config: AgentTraining, workloads: Sequence[Workload], budgets: Sequence[int], scorer: RetentionNetwork
) -> dict[tuple[str, int], float]:
    """(workload, budget) → the scorer's mean of the reward's metric on validation clips.

    Each clip is played under one of the budgets, so that several cost no more than one.
    """
    metric, scores = config.reward.metric, {}
    for workload in workloads:
        for index, budget in enumerate(budgets):
            clips = range(config.validation_clips)[index :: len(budgets)]
            policies = {"learned": AgentPolicy(scorer)}
            result = evaluate(workload, budget, policies, clips, split="validation", metrics=(metric,), progress=False)
            scores[workload.name, budget] = float(result.scores["learned"][metric].mean())
    return scores


def _hosts(workloads: Sequence[Workload]) -> list[str]:
    """Hashes of their weights, each once."""
    return list(dict.fromkeys(workload.host.weights_hash for workload in workloads))


def experiment_facts(config: AgentTraining, workloads: Sequence[Workload], budgets: Sequence[int]) -> dict[str, Any]:
    """What a trained scorer should say about itself."""
    worlds, allowed = ", ".join(workload.name for workload in workloads), ", ".join(map(str, budgets))
    return {
        "trained_on": f"{worlds}, budget {allowed}, first {config.train_clips} train clips, seed {config.seed}",
        "decisions": config.ppo.total_timesteps,
        "decisions_with_surrogate": config.surrogate.total_timesteps,
        "host": ", ".join(dict.fromkeys(f"{own.host.name} ({own.host.weights_hash})" for own in workloads)),
    }
