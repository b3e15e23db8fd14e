"""Callbacks between PPO's updates: validation, the checkpoint from which a stopped training resumes, and progress."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback

from far_env.agents.config import AgentTraining, ImitationSettings, PPOSettings
from far_env.agents.graph_decisions import GraphDecisions, shuffled_batches
from far_env.agents.imitation import imitation_step
from far_env.agents.network import RetentionNetwork
from far_env.agents.training_logs import TIMESTEPS, VALIDATED_AT
from far_env.agents.validation import validation_scores
from far_env.allocator import return_freed_memory
from far_env.progress import show_progress
from far_env.tensor_files import save_tensors
from far_env.workload import Workload

Weights = dict[str, torch.Tensor]


class ValidationCheckpoint(BaseCallback):
    """Before each rollout: validates on fixed clips, keeps the best scorer, and saves all that a resumed training needs.

    Stable-Baselines3's checkpoint contains neither random states nor environments, so a training resumed from it would differ
    from one that was not stopped. Here everything is saved before a rollout starts, as tensors and plain values.

    Args:
        settings: of this stage.
        path: of the checkpoint.

    Attributes:
        logged: decisions up to which the sessions before have logged; -1 if there were none.
    """

    def __init__(
        self,
        config: AgentTraining,
        workloads: Sequence[Workload],
        budgets: Sequence[int],
        settings: PPOSettings,
        path: Path,
    ) -> None:
        super().__init__()
        self.config, self.workloads, self.budgets, self.settings = config, workloads, budgets, settings
        self.path = path
        self.updates = -1
        self.best_score = -np.inf
        self.best_weights: Weights = {}
        self.last_score: float | None = None
        self.logged = -1

    def restore(self, model: MaskablePPO, saved: dict[str, Any]) -> None:
        """Return model, environments and random states to the state of a checkpoint."""
        model.policy.load_state_dict(saved["policy"])
        model.policy.optimizer.load_state_dict(saved["optimizer"])
        model.num_timesteps, model._n_updates = saved["num_timesteps"], saved["n_updates"]
        self.updates, self.best_score = saved["updates"] - 1, saved["best_score"]
        self.best_weights = saved["best_weights"]
        self.logged = saved["num_timesteps"]
        returns, lengths = saved.get("episode_infos", ([], []))
        infos = ({"r": np.float32(total), "l": length} for total, length in zip(returns, lengths, strict=True))
        model.ep_info_buffer = deque(infos, model._stats_window_size)
        model.ep_success_buffer = deque()
        # SB3 would reset the environment if it had no last observation.
        model._last_obs = {key: value.numpy() for key, value in saved["last_obs"].items()}
        model._last_episode_starts = saved["last_episode_starts"].numpy()
        monitor = model.env
        monitor.venv.load_env_states(saved["envs"])
        monitor.venv.load_state_dict(saved["graphs"])
        monitor.episode_returns = saved["episode_returns"].numpy()
        monitor.episode_lengths = saved["episode_lengths"].numpy()
        torch.set_rng_state(saved["torch_rng"])
        name, keys, position, has_gauss, gauss = saved["numpy_rng"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))

    def _on_rollout_start(self) -> None:
        self.updates += 1
        return_freed_memory()  # of the update before
        if self.updates % self.config.validate_every == 0:
            self._validate()
        self._log()
        self._save()
        self.model.policy.scorer.requires_grad_(self.updates >= self.settings.critic_warmup_updates)

    def _on_rollout_end(self) -> None:
        return_freed_memory()  # of the rollout; the update needs most

    def _on_training_end(self) -> None:
        self.updates += 1
        self._validate()
        self._log()
        self._save()

    def _on_step(self) -> bool:
        return True

    def _validate(self) -> None:
        scorer: RetentionNetwork = self.model.policy.scorer
        reward = self.config.reward
        scores = validation_scores(self.config, self.workloads, self.budgets, scorer)
        for (workload, budget), score in scores.items():
            if len(scores) > 1:
                self.logger.record(f"validation/{reward.metric}_{workload}_{budget}", score)
        self.last_score = float(np.mean(list(scores.values())))
        self.logger.record(f"validation/{reward.metric}", self.last_score)
        self.logger.record(VALIDATED_AT, self.num_timesteps, exclude="tensorboard")
        if reward.sign * self.last_score > self.best_score:
            self.best_score = reward.sign * self.last_score
            self.best_weights = {key: value.detach().clone() for key, value in scorer.state_dict().items()}

    def _log(self) -> None:
        """Write what was recorded since the last line, before the checkpoint; a resumed session does not write it again."""
        if self.num_timesteps == self.logged:
            self.logger.name_to_value.clear()
            self.logger.name_to_excluded.clear()
        elif self.logger.name_to_value:
            self.logger.record(TIMESTEPS, self.num_timesteps, exclude="tensorboard")
            self.logger.dump(self.num_timesteps)

    def _save(self) -> None:
        model, monitor = self.model, self.model.env
        name, keys, position, has_gauss, gauss = np.random.get_state()
        save_tensors(
            self.path,
            {
                "hosts": host_hashes(self.workloads),
                "policy": model.policy.state_dict(),
                "optimizer": model.policy.optimizer.state_dict(),
                "num_timesteps": model.num_timesteps,
                "n_updates": model._n_updates,
                "updates": self.updates,
                "best_score": float(self.best_score),
                "best_weights": self.best_weights,
                "envs": monitor.venv.env_states(),
                "graphs": monitor.venv.state_dict(),
                "last_obs": {key: torch.as_tensor(value) for key, value in model._last_obs.items()},
                "last_episode_starts": torch.as_tensor(model._last_episode_starts),
                "episode_infos": ([float(i["r"]) for i in model.ep_info_buffer], [int(i["l"]) for i in model.ep_info_buffer]),
                "episode_returns": torch.as_tensor(monitor.episode_returns),
                "episode_lengths": torch.as_tensor(monitor.episode_lengths),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": (name, torch.as_tensor(keys.astype(np.int64)), position, has_gauss, gauss),
            },
        )


class ImitationBetweenUpdates(BaseCallback):
    """After each update of the scorer: steps of imitation on decisions of other workloads, so that they are not forgotten.

    They are Adam's, with averages of their own, begun anew each time: imitation's gradients are much larger than PPO's, which
    would hardly move anything if it shared them.

    Args:
        parts: the decisions, some of each workload.
        steps: after each update.
    """

    def __init__(self, parts: Sequence[GraphDecisions], settings: ImitationSettings, steps: int, seed: int) -> None:
        super().__init__()
        self.parts, self.settings, self.steps, self.seed = parts, settings, steps, seed

    def _on_training_start(self) -> None:
        self.started_at = self.num_timesteps

    def _on_rollout_start(self) -> None:
        self._imitate()

    def _on_training_end(self) -> None:
        self._imitate()

    def _on_step(self) -> bool:
        return True

    def _imitate(self) -> None:
        policy = self.model.policy
        frozen = not next(policy.scorer.parameters()).requires_grad
        learning_rate = policy.optimizer.param_groups[0]["lr"]  # 0 in the last update
        # At the start of a session these steps were taken already: a checkpoint is written after them.
        if frozen or not learning_rate or self.num_timesteps == self.started_at:
            return
        rng = np.random.default_rng((self.seed, 7, self.num_timesteps))
        passes = (shuffled_batches(self.parts, self.settings.batch_size, rng) for _ in itertools.count())
        optimizer = torch.optim.Adam(policy.scorer.parameters(), lr=learning_rate)
        precision = torch.bfloat16 if policy.bfloat16 else torch.float32
        losses = [
            imitation_step(policy.scorer, part.batch(indices), self.settings, [optimizer], precision)
            for part, indices in itertools.islice(itertools.chain.from_iterable(passes), self.steps)
        ]
        self.logger.record("train/imitation_loss", float(np.mean(losses)))


class TrainingProgress(BaseCallback):
    """Shows the decisions of a stage with the last validation score.

    Args:
        description: the stage.
        total: its decisions.
        metric: of the validation.
        validation: holds the last score.
    """

    def __init__(self, description: str, total: int, metric: str, validation: ValidationCheckpoint) -> None:
        super().__init__()
        self.description, self.total, self.metric, self.validation = description, total, metric, validation

    def _on_training_start(self) -> None:
        # Counted from here, so that a resumed training's speed is that of its decisions.
        remaining = self.total - self.model.num_timesteps
        self.bar = show_progress(total=remaining, description=self.description, unit="decisions")

    def _on_step(self) -> bool:
        if self.validation.last_score is not None:
            self.bar.set_postfix(refresh=False, **{f"validation {self.metric}": f"{self.validation.last_score:.2f}"})
        self.bar.update(self.training_env.num_envs)
        return True

    def _on_training_end(self) -> None:
        self.bar.close()


def host_hashes(workloads: Sequence[Workload]) -> list[str]:
    """The hashes of the hosts' weights, each once."""
    return list(dict.fromkeys(workload.host.weights_hash for workload in workloads))
