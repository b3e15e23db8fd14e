"""PPO in the retention environment: weights to start from in, the weights that were best on validation clips out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from far_env.agents.budgets import deciding_budgets
from far_env.agents.config import TOKENS, AgentTraining, PPOSettings
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.agents.eviction_policy import EvictionPolicy
from far_env.agents.expert_data import load_expert_data
from far_env.agents.graph_decisions import GraphDecisions
from far_env.agents.imitation import last_round
from far_env.agents.rollout_actors import ActorVecEnv, groups_of, make_env, reward_options
from far_env.agents.token_env import ReductionVecEnv
from far_env.agents.training_callbacks import (
    ImitationBetweenUpdates,
    TrainingProgress,
    ValidationCheckpoint,
    Weights,
    host_hashes,
)
from far_env.agents.training_logs import log_writers
from far_env.distributed.cluster import connected
from far_env.envs.token_env import TokenRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.tensor_files import load_tensors
from far_env.workload import Workload

CHECKPOINT_FILE = "checkpoint.ckpt"


class ResumablePPO(MaskablePPO):
    """MaskablePPO whose logged iterations continue after a resume."""

    def dump_logs(self, iteration: int = 0) -> None:
        """Log with the number of updates that all timesteps so far make."""
        super().dump_logs(self.num_timesteps // (self.n_steps * self.n_envs))


@dataclass(frozen=True)
class PPOStage:
    """A training stage: PPO in environments of one class, until ``settings.total_timesteps``.

    Args:
        name: displayed with the stage's progress.
        settings: of this stage.
        env_class: `FrameRetentionVectorEnv`, or `far_env.agents.surrogate.SurrogateVectorEnv`.
        folder: for checkpoint and logs.
        imitated: folder of the run's imitation, for ``settings.imitation_steps``.
    """

    name: str
    config: AgentTraining
    workloads: Sequence[Workload]
    budgets: Sequence[int]
    settings: PPOSettings
    env_class: type[FrameRetentionVectorEnv]
    folder: Path
    imitated: Path

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
        with self._environment() as environment:
            model = self._make_model(environment)
            validation = ValidationCheckpoint(self.config, self.chosen_workloads, self.budgets, self.settings, path)
            if saved is not None:
                validation.restore(model, saved)
            elif start is not None:
                model.policy.scorer.load_state_dict(start)
            model.set_logger(Logger(str(self.folder), log_writers(self.folder, model.num_timesteps, validation.logged)))
            display = TrainingProgress(self.name, total, self.config.reward.metric, validation)
            try:
                callbacks = [*self._imitation(), validation, display]
                model.learn(total - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
            finally:
                model.logger.close()
        return validation.best_weights

    @contextmanager
    def _environment(self) -> Iterator[VecEnv]:
        """All rows of the stage, in this process or in actors."""
        config = self.config
        if config.network.memory == TOKENS:
            yield ReductionVecEnv(self.make_token_envs(), config.network)
            return
        if not config.ray.actors:
            yield EvictionVecEnv(self.make_envs(), config.network)
            return
        workloads = self.chosen_workloads
        example = EvictionVecEnv(
            [make_env(config, each, self.budgets, self.env_class, 1) for each in workloads], config.network
        )
        with connected(config.ray) as ray:
            environment = ActorVecEnv(ray, example, self.env_class, config, self.settings, workloads)
            try:
                yield environment
            finally:
                environment.close()

    def _imitation(self) -> list[ImitationBetweenUpdates]:
        """The callback that imitates between updates, if there is one."""
        config, steps = self.config, self.settings.imitation_steps
        if not steps:
            return []
        others = self.settings.other_workload_names(config.workload_names)
        paths = [part.path(self.imitated, number) for number, part in last_round(config, self.workloads, self.budgets, others)]
        decisions = [GraphDecisions(load_expert_data(path), config.network) for path in paths]
        return [ImitationBetweenUpdates(decisions, config.imitation, steps, config.seed)]

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
        """Make the vector environments of the stage's groups, with equal shares of its environments.

        Raises:
            ValueError: on a reward or signals that these environments do not have.
        """
        workloads = {workload.name: workload for workload in self.chosen_workloads}
        groups = groups_of(self.settings, list(workloads))
        return [make_env(self.config, workloads[name], self.budgets, self.env_class, rows) for name, rows in groups]

    def make_token_envs(self) -> list[TokenRetentionEnv]:
        """Make the environments of a token memory, with equal shares of the stage's for each workload."""
        workloads = {workload.name: workload for workload in self.chosen_workloads}
        chosen = [workloads[name] for name, rows in groups_of(self.settings, list(workloads)) for _ in range(rows)]
        options = reward_options(self.config)
        return [TokenRetentionEnv(workload, deciding_budgets(TOKENS, workload, self.budgets), **options) for workload in chosen]

    def observation_bytes(self, envs: Sequence[FrameRetentionVectorEnv]) -> int:
        """Bytes of the observation of one row."""
        parts = EvictionVecEnv(envs, self.config.network).observation_space.spaces.values()
        return sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in parts)

    def _make_model(self, environment: VecEnv) -> ResumablePPO:
        """A new model that acts in this environment."""
        options = asdict(self.settings)
        learning_rate, epsilon = options.pop("learning_rate"), options.pop("adam_epsilon")
        for not_in_sb3 in ("total_timesteps", "num_envs", "critic_warmup_updates", "imitation_steps", "groups", "workload"):
            options.pop(not_in_sb3)
        return ResumablePPO(
            EvictionPolicy,
            VecMonitor(environment),
            policy_kwargs={
                "network": self.config.network,
                "bfloat16": self.chosen_workloads[0].host.dtype == torch.bfloat16,
                "optimizer_kwargs": {"eps": epsilon},
            },
            learning_rate=lambda remaining: learning_rate * remaining,
            seed=self.config.seed,
            device="cpu",
            verbose=0,
            **options,
        )
