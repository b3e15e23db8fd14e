"""Imitation of the hindsight expert: decisions are collected with the costs of their alternatives, and the scorer learns them.

The label of a decision is not one set of frames but the best few with their costs, because many sets are equally good:
the target is softmax(−cost / temperature), the loss its cross-entropy under the budgeted-subset distribution.
Rounds of collecting with the scorer and learning from all rounds are DAgger: Ross et al., arXiv 1011.0686.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from far_env.agents.config import AgentTraining, ImitationSettings, NetworkConfig
from far_env.agents.expert_data import ExpertData, collect, subset_distribution
from far_env.agents.network import RetentionNetwork, network_with_weights
from far_env.io import read_json, write_json
from far_env.progress import show_progress
from far_env.tensor_files import load_tensors, save_tensors, save_weights
from far_env.workloads import Workload

INDEX_FILE = "index.json"
TRUE_FRAMES_SCORER_FILE = "true_frames_scorer.ckpt"
SCORER_FILE = "scorer.ckpt"
FINETUNE_LR_SCALE = 0.25
"""Share of the learning rate for a scorer that has already learned from true frames."""


@dataclass(frozen=True)
class ImitationStage:
    """A training stage: imitation, with its decisions and scorers as files in ``folder``."""

    config: AgentTraining
    workloads: Sequence[Workload]
    budgets: Sequence[int]
    folder: Path

    def run(self, start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Imitate the expert, resuming from the stage's files; it is the first stage, so ``start`` is None.

        Returns:
            The scorer's weights.
        """
        config, path = self.config, self.folder / SCORER_FILE
        experiment = (config.imitation, config.network, self.workloads, self.budgets)
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_index(self.folder, *experiment, config.seed, config.train_clips)
        if path.exists() and (saved := load_tensors(path))["rounds"] == config.imitation.rounds:
            return saved["weights"]
        network = imitate(*experiment, self.folder, seed=config.seed, num_clips=config.train_clips)
        save_tensors(path, {"rounds": config.imitation.rounds, "weights": network.state_dict()})
        return network.state_dict()


def imitation_loss(
    network: RetentionNetwork, decisions: ExpertData, temperature: float, expected_cost_weight: float = 0.0
) -> Tensor:
    """Mean over decisions of the cross-entropy between softmax(−cost / temperature) and the scorer's distribution over sets.

    ``expected_cost_weight`` times the mean over alternatives of (cost − lowest cost) / temperature is added, under the scorer's
    probabilities renormalised over the alternatives.
    """
    missing = decisions.costs.isinf()
    extra = (decisions.costs - decisions.costs[:, :1]) / temperature
    distribution = subset_distribution(network, decisions)
    log_probs = torch.stack([distribution.log_prob(kept) for kept in decisions.sets.unbind(dim=1)], dim=1)
    loss = -((-extra).softmax(dim=1) * log_probs.masked_fill(missing, 0.0)).sum(dim=1)
    if expected_cost_weight:
        probabilities = log_probs.masked_fill(missing, -torch.inf).softmax(dim=1)
        loss = loss + expected_cost_weight * (probabilities * extra.masked_fill(missing, 0.0)).sum(dim=1)
    return loss.mean()


def imitate(
    settings: ImitationSettings,
    network_config: NetworkConfig,
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    folder: Path,
    *,
    seed: int,
    num_clips: int,
) -> RetentionNetwork:
    """Collect decisions round by round, each kept as a file in ``folder``, and learn from all of them.

    Until something has been learned the expert acts, later the scorer that has learned all before: from the true frames first,
    if there are any, and starting from it from the rollouts of all rounds. The clips of a round are shared evenly among the
    workloads, and each is played under one of the budgets, which alternate. A round whose file exists is not collected again,
    so that a stopped run resumes where it stopped.

    Args:
        num_clips: train clips to draw from; no clip comes twice before all have come.

    Raises:
        ValueError: if the folder contains decisions made with other settings, or a damaged file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_index(folder, settings, network_config, workloads, budgets, seed, num_clips)
    rng = np.random.default_rng((seed, 4))
    num_clips_used = settings.true_clips + settings.rounds * settings.clips_per_round
    order = np.concatenate([rng.permutation(num_clips) for _ in range(-(-num_clips_used // num_clips))]).tolist()
    true_clips, order = order[: settings.true_clips], order[settings.true_clips :]
    collecting = {
        "spec": RetentionNetwork(**asdict(network_config)).spec,
        "candidates": settings.candidates,
        "sequential_eviction": network_config.sequential_eviction,
        "slots": max(*(workload.num_context for workload in workloads), *budgets) + 1,
    }
    start, true_decisions = None, None
    if true_clips:
        path, scorer_path = folder / "true_frames.safetensors", folder / TRUE_FRAMES_SCORER_FILE
        if settings.true_frame_replay_ratio or not scorer_path.exists():
            true_decisions = _collected(path, workloads, budgets, true_clips, actor=None, true_frames=True, **collecting)
        if not scorer_path.exists():
            save_tensors(scorer_path, fit(true_decisions, network_config, settings, seed).state_dict())
        start = load_tensors(scorer_path)

    def learned(parts: list[ExpertData]) -> RetentionNetwork:
        if settings.true_frame_replay_ratio:
            count = round(settings.true_frame_replay_ratio * sum(map(len, parts)))
            parts = [*parts, true_decisions.sample(count, seed)]
        return fit(ExpertData.join(parts), network_config, settings, seed, start)

    parts: list[ExpertData] = []
    actor = None if start is None else network_with_weights(network_config, start)
    for number in range(settings.rounds):
        path = folder / f"round_{number:03d}.safetensors"
        if parts and not path.exists():
            actor = learned(parts)
        clips = order[number * settings.clips_per_round : (number + 1) * settings.clips_per_round]
        parts.append(_collected(path, workloads, budgets, clips, actor=actor, **collecting))
    return learned(parts)


def fit(
    decisions: ExpertData,
    network_config: NetworkConfig,
    settings: ImitationSettings,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
) -> RetentionNetwork:
    """Train a scorer on the decisions; the same seed gives the same scorer.

    Args:
        start: weights to continue from, at `FINETUNE_LR_SCALE` of the learning rate; by default a new scorer learns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RetentionNetwork(**asdict(network_config))
    learning_rate = settings.learning_rate
    if start is not None:
        network.load_state_dict(start)
        learning_rate *= FINETUNE_LR_SCALE
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(decisions) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    with show_progress(total=settings.epochs, description=f"imitate {len(decisions):,} decisions", unit="epochs") as bar:
        for _ in range(settings.epochs):
            losses = []
            for rows in torch.randperm(len(decisions), generator=generator).split(settings.batch_size):
                part = decisions.rows(rows)
                loss = imitation_loss(network, part, settings.temperature, settings.expected_cost_weight)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses):.4g}")
            bar.update()
    return network.eval()


def _collected(
    path: Path, workloads: Sequence[Workload], budgets: Sequence[int], clips: list[int], **collecting: Any
) -> ExpertData:
    """The decisions in a file, which is collected and written first if it does not exist; workloads share the clips evenly."""
    if not path.exists():
        shares = [(workload, clips[index :: len(workloads)]) for index, workload in enumerate(workloads)]
        collected = ExpertData.join(
            [
                collect(workload, ids, [budgets[i % len(budgets)] for i in range(len(ids))], **collecting)
                for workload, ids in shares
                if ids
            ]
        )
        save_weights({name: getattr(collected, name) for name in ExpertData.__dataclass_fields__}, path)
    return _load(path)


def _check_index(
    folder: Path,
    settings: ImitationSettings,
    network_config: NetworkConfig,
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    seed: int,
    num_clips: int,
) -> None:
    """Record the settings of the decisions in a folder. Raises ValueError if the folder contains decisions made with others."""
    index = {
        "workloads": [workload.name for workload in workloads],
        "hosts": [workload.host.weights_hash for workload in workloads],
        "budgets": list(budgets),
        "seed": seed,
        "train_clips": num_clips,
        "network": {**asdict(network_config), "signals": list(network_config.signals)},
        "settings": {key: value for key, value in asdict(settings).items() if key != "rounds"},
    }
    if any(workload.true_feedback for workload in workloads):  # older folders do not say that generated frames were fed back
        index["feedback"] = [workload.feedback for workload in workloads]
    path = folder / INDEX_FILE
    if path.exists() and read_json(path, "choose another run folder") != index:
        raise ValueError(f"{folder} contains decisions made with other settings (see {INDEX_FILE}); choose another run folder")
    write_json(path, index)


def _load(path: Path) -> ExpertData:
    try:
        return ExpertData(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to collect this round again") from error
