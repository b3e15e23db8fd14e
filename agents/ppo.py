"""PPO in the retention environment: weights to start from in, the weights that were best on validation clips out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBufferSamples
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.agents.config import AgentTraining, PPOSettings
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.agents.eviction_policy import EvictionPolicy
from far_env.agents.training_callbacks import TrainingProgress, ValidationCheckpoint, Weights, host_hashes
from far_env.agents.training_logs import log_writers
from far_env.allocator import return_freed_memory
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.tensor_files import load_tensors
from far_env.workloads import Workload, deciding_budgets

CHECKPOINT_FILE = "checkpoint.ckpt"


class ResumablePPO(MaskablePPO):
    """MaskablePPO whose logged iterations continue after a resume."""

    def dump_logs(self, iteration: int = 0) -> None:
        """Log with the number of updates that all timesteps so far make."""
        super().dump_logs(self.num_timesteps // (self.n_steps * self.n_envs))

    def train(self) -> None:
        """Update the policy with the rollout buffer: the same numbers as the parent's, without its unused options.

        Scorer and critic share no weights. Each has its backward pass before the other's forward pass, so that the graph of
        one alone is in memory.
        """
        return_freed_memory()  # of the rollouts
        policy, logged = self.policy, defaultdict(list)
        policy.set_training_mode(True)
        self._update_learning_rate(policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)
        for _ in range(self.n_epochs):
            logged["approx_kl"].clear()  # that of the last epoch is logged
            for batch in self.rollout_buffer.get(self.batch_size):
                policy.optimizer.zero_grad()
                value_loss = F.mse_loss(batch.returns, policy.predict_values(batch.observations).flatten())
                (self.vf_coef * value_loss).backward()
                losses = self._scorer_losses(batch, clip_range, logged)
                loss = losses["policy_gradient_loss"] + self.ent_coef * losses["entropy_loss"]
                if loss.requires_grad:  # not while the critic learns alone
                    loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), self.max_grad_norm)
                policy.optimizer.step()
                for name, part in (losses | {"value_loss": value_loss}).items():
                    logged[name].append(part.item())
            self._n_updates += 1
        means = {name: np.mean(values) for name, values in logged.items()}
        for name, value in means.items():
            self.logger.record(f"train/{name}", value)
        explained = explained_variance(self.rollout_buffer.values.flatten(), self.rollout_buffer.returns.flatten())
        self.logger.record("train/loss", loss.item() + self.vf_coef * value_loss.item())
        self.logger.record("train/explained_variance", explained)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)

    def _scorer_losses(
        self, batch: MaskableDictRolloutBufferSamples, clip_range: float, logged: dict[str, list[float]]
    ) -> dict[str, Tensor]:
        """Clipped surrogate loss and negative entropy of a minibatch; its divergence and share of clipped ratios are logged."""
        distribution = self.policy.get_distribution(batch.observations, batch.action_masks)
        log_ratio = distribution.log_prob(batch.actions.long().flatten()) - batch.old_log_prob
        ratio, advantages = log_ratio.exp(), batch.advantages
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped = advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
        with torch.no_grad():
            logged["approx_kl"].append(((log_ratio.exp() - 1) - log_ratio).mean().item())
            logged["clip_fraction"].append(((ratio - 1).abs() > clip_range).float().mean().item())
        return {
            "policy_gradient_loss": -torch.min(advantages * ratio, clipped).mean(),
            "entropy_loss": -distribution.entropy().mean(),
        }


@dataclass(frozen=True)
class PPOStage:
    """A training stage: PPO in environments of one class, until ``settings.total_timesteps``.

    Args:
        name: displayed with the stage's progress.
        settings: of this stage.
        env_class: `FrameRetentionVectorEnv`, or `far_env.agents.surrogate.SurrogateVectorEnv`.
        folder: for checkpoint and logs.
    """

    name: str
    config: AgentTraining
    workloads: Sequence[Workload]
    budgets: Sequence[int]
    settings: PPOSettings
    env_class: type[FrameRetentionVectorEnv]
    folder: Path

    @property
    def chosen_workloads(self) -> list[Workload]:
        """The workloads of the stage."""
        names = self.settings.workload_names(self.config.workload_names)
        return [workload for workload in self.workloads if workload.name in names]

    def run(self, start: Weights | None) -> Weights:
        """Train, resuming from the stage's checkpoint if there is one.

        Args:
            start: weights of the scorer at the start of the stage; None for a new scorer.

        Returns:
            The scorer's weights that were best on validation clips.

        Raises:
            ValueError: if the checkpoint is damaged or was made with another host.
        """
        path, total = self.folder / CHECKPOINT_FILE, self.settings.total_timesteps
        saved = self._load(path) if path.exists() else None
        if saved is not None and saved["num_timesteps"] >= total:
            return saved["best_weights"]
        self.folder.mkdir(parents=True, exist_ok=True)
        envs = self.make_envs()
        model = self._make_model(envs)
        validation = ValidationCheckpoint(self.config, self.chosen_workloads, self.budgets, self.settings, envs, path)
        if saved is not None:
            validation.restore(model, saved)
        elif start is not None:
            model.policy.scorer.load_state_dict(start)
        model.set_logger(Logger(str(self.folder), log_writers(self.folder, model.num_timesteps, validation.logged)))
        display = TrainingProgress(self.name, total, self.config.reward.metric, validation)
        try:
            model.learn(total - model.num_timesteps, callback=[validation, display], reset_num_timesteps=False)
        finally:
            model.logger.close()
        return validation.best_weights

    def _load(self, path: Path) -> dict[str, Any]:
        """The checkpoint. Raises ValueError if it is damaged or was made with other hosts."""
        saved, hosts = load_tensors(path), host_hashes(self.chosen_workloads)
        if saved["hosts"] != hosts:
            raise ValueError(
                f"{path} was made with host {', '.join(saved['hosts'])}, this one is {', '.join(hosts)}; "
                "choose another run folder"
            )
        return saved

    def make_envs(self) -> list[FrameRetentionVectorEnv]:
        """Make one vector environment per workload of the stage, with equal shares of the stage's environments.

        Raises:
            ValueError: on a reward or signals that these environments do not have.
        """
        reward = self.config.reward
        return [
            self.env_class(
                self.settings.num_envs // len(self.chosen_workloads),
                workload,
                deciding_budgets(workload, self.budgets),
                reward={reward.metric: reward.sign * reward.scale},
                telescoping=reward.telescoping,
                num_clips=self.config.train_clips,
                signals=self.config.network.signals,
                autoreset_mode="SAME_STEP",
            )
            for workload in self.chosen_workloads
        ]

    def observation_bytes(self, envs: Sequence[FrameRetentionVectorEnv]) -> int:
        """Bytes of the observation of one row."""
        parts = EvictionVecEnv(envs, self.config.network).observation_space.spaces.values()
        return sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in parts)

    def _make_model(self, envs: Sequence[FrameRetentionVectorEnv]) -> ResumablePPO:
        """A new model that acts in these environments."""
        options = asdict(self.settings)
        learning_rate = options.pop("learning_rate")
        for not_in_sb3 in ("total_timesteps", "num_envs", "critic_warmup_updates", "workload"):
            options.pop(not_in_sb3)
        return ResumablePPO(
            EvictionPolicy,
            VecMonitor(EvictionVecEnv(envs, self.config.network)),
            policy_kwargs={"network": self.config.network},
            learning_rate=lambda remaining: learning_rate * remaining,
            seed=self.config.seed,
            device="cpu",
            verbose=0,
            **options,
        )
