"""Imitation of the hindsight expert: DAgger collects decisions with what each alternative would cost; the scorer learns them.

The label of a decision is not one set of frames but the best few with their costs, because many sets are equally good:
the target is softmax(−cost / temperature), the loss its cross-entropy under the budgeted-subset distribution.
Dataset aggregation: Ross et al., arXiv 1011.0686.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from far_env.agents.expert_data import ExpertData, choices, collect
from far_env.agents.network import RetentionNetwork
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from far_env.config import require_positive
from far_env.errors import unknown_name
from far_env.io import write_text
from far_env.tensor_files import load_tensors, save_tensors
from far_env.workloads import Workload

INDEX_FILE = "index.json"
TRUE_SCORER_FILE = "true_scorer.ckpt"
FINETUNE_LR_SCALE = 0.25
"""Share of the learning rate for a scorer that has already learned from true frames."""
LABELS = ("coverage", "future_utility")
ALWAYS_POSITIVE = 100.0
"""Added to logits that rank frames but were not taught how many are worth a place."""


@dataclass(frozen=True)
class ImitationSettings:
    """How the scorer learns from the expert before PPO (if at all)."""

    rounds: int = 0
    """Of collecting and learning; in the first the expert acts, then the scorer. 0 for none."""
    true_clips: int = 0
    """Clips in whose true frames decisions are collected beforehand, without rollouts, which is much faster. The first round's
    rollouts are then already decided by a scorer that has learned from them."""
    true_frame_replay_ratio: float = 0.0
    """How many of those are learned again together with the rounds', as a multiple of these; without any, some is forgotten."""
    label: str = "coverage"
    """"coverage": what sets of frames leave uncovered of the clip's true rest; or "future_utility", of single frames."""
    clips_per_round: int = 256
    candidates: int = 8
    """Sets per decision whose costs are noted."""
    temperature: float = 1e-3
    """In units of mean squared pixel error per predicted frame, or of the squared error of velocities for future_utility."""
    expected_cost_weight: float = 0.0
    """Weight of what the scorer's own choice among the alternatives is expected to cost, in temperatures, beside the
    cross-entropy: which mistakes matter."""
    epochs: int = 30
    """Over all decisions so far, in every round from a fresh scorer, or from the one that has learned from true frames."""
    batch_size: int = 256
    learning_rate: float = 2e-3
    """At the start; falls by a cosine to zero."""

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(unknown_name("label", self.label, LABELS))
        if self.true_clips and not self.rounds:
            raise ValueError("true_clips prepare for rounds: set rounds above 0 as well")
        if self.expected_cost_weight < 0:
            raise ValueError(f"the weight of regret cannot be negative, got {self.expected_cost_weight}")
        if self.true_frame_replay_ratio < 0 or (self.true_frame_replay_ratio and not self.true_clips):
            raise ValueError(
                "true_frame_replay_ratio must be 0 or more, and above 0 only with true_clips above 0; it is "
                f"{self.true_frame_replay_ratio}"
            )
        require_positive(self, "clips_per_round", "candidates", "temperature", "epochs", "batch_size", "learning_rate")


def imitation_loss(
    network: RetentionNetwork,
    decisions: ExpertData,
    temperature: float,
    expected_cost_weight: float = 0.0,
    label: str = "coverage",
) -> Tensor:
    """Mean over decisions of the cross-entropy between softmax(−cost / temperature) and the scorer's sets, or, for
    future_utility, the softmax of its logits over the older frames.

    ``expected_cost_weight`` times the mean over alternatives of (cost − lowest cost) / temperature is added, under the scorer's
    probabilities renormalised over the alternatives.
    """
    missing = decisions.costs.isinf()
    extra = (decisions.costs - decisions.costs[:, :1]) / temperature
    if label == "future_utility":
        logits = network(decisions.frames, decisions.mask, decisions.budget)
        older = decisions.sets.any(dim=1)
        single = logits.masked_fill(~older, -torch.inf).log_softmax(dim=1).masked_fill(~older, 0.0)
        log_probs = (decisions.sets * single[:, None]).sum(dim=2)
    else:
        distribution = choices(network, decisions)
        log_probs = torch.stack([distribution.log_prob(kept) for kept in decisions.sets.unbind(dim=1)], dim=1)
    loss = -((-extra).softmax(dim=1) * log_probs.masked_fill(missing, 0.0)).sum(dim=1)
    if expected_cost_weight:
        chosen = log_probs.masked_fill(missing, -torch.inf).softmax(dim=1)
        loss = loss + expected_cost_weight * (chosen * extra.masked_fill(missing, 0.0)).sum(dim=1)
    return loss.mean()


def imitate(
    settings: ImitationSettings,
    size: dict[str, Any],
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    folder: Path,
    *,
    seed: int,
    num_clips: int,
) -> RetentionNetwork:
    """Collect decisions round by round, each kept as a file in ``folder``, and learn from all of them.

    While nothing has been learned the expert acts, later the scorer that has learned all before: from the true frames first, if
    there are any, and from there on from the rollouts of all rounds. The clips of a round are shared evenly among the
    workloads, and each is played under one of the budgets in turn. A round whose file is there is not collected again, so a
    stopped run goes on where it stopped.

    Args:
        size: arguments of `RetentionNetwork`.
        num_clips: train clips to draw from; no clip comes twice before all have come.

    Raises:
        ValueError: if the folder holds decisions made with other settings, or a damaged file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_index(folder, settings, size, workloads, budgets, seed, num_clips)
    rng = np.random.default_rng((seed, 4))
    wanted = settings.true_clips + settings.rounds * settings.clips_per_round
    order = np.concatenate([rng.permutation(num_clips) for _ in range(-(-wanted // num_clips))]).tolist()
    first, order = order[: settings.true_clips], order[settings.true_clips :]
    slots = max(*(workload.num_context for workload in workloads), *budgets) + 1
    collecting = {
        "view": RetentionNetwork(**size).view,
        "candidates": settings.candidates,
        "label": settings.label,
        "sequential_eviction": bool(size.get("sequential_eviction", False)),
        "slots": slots,
    }
    start, prepared = None, None
    if first:
        path, known = folder / "true_frames.safetensors", folder / TRUE_SCORER_FILE
        if settings.true_frame_replay_ratio or not known.exists():
            prepared = _collected(path, workloads, budgets, first, actor=None, true_frames=True, **collecting)
        if not known.exists():
            save_tensors(known, fit(prepared, size, settings, seed).state_dict())
        start = load_tensors(known)

    def learned(parts: list[ExpertData]) -> RetentionNetwork:
        if settings.true_frame_replay_ratio:
            count = round(settings.true_frame_replay_ratio * sum(map(len, parts)))
            parts = [*parts, prepared.some(count, seed)]
        return fit(ExpertData.join(parts), size, settings, seed, start)

    parts: list[ExpertData] = []
    actor = None if start is None else fitted(size, start)
    for number in range(settings.rounds):
        path = folder / f"round_{number:03d}.safetensors"
        if parts and not path.exists():
            actor = learned(parts)
        clips = order[number * settings.clips_per_round : (number + 1) * settings.clips_per_round]
        parts.append(_collected(path, workloads, budgets, clips, actor=actor, **collecting))
    return learned(parts)


def _collected(
    path: Path, workloads: Sequence[Workload], budgets: Sequence[int], clips: list[int], **collecting: Any
) -> ExpertData:
    """The decisions of a file, which is written first if it is not there; clips are shared evenly."""
    if not path.exists():
        shares = [(workload, clips[index :: len(workloads)]) for index, workload in enumerate(workloads)]
        found = ExpertData.join(
            [
                collect(workload, own, [budgets[i % len(budgets)] for i in range(len(own))], **collecting)
                for workload, own in shares
                if own
            ]
        )
        temporary = path.with_suffix(".part")
        save_file({name: getattr(found, name) for name in ExpertData.__dataclass_fields__}, temporary)
        temporary.replace(path)
    return _load(path)


def _check_index(folder: Path, settings: ImitationSettings, *rest: object) -> None:
    """Note what the decisions in a folder were made with, or refuse one that was made otherwise."""
    size, workloads, budgets, seed, num_clips = rest
    about = {
        "workloads": [workload.name for workload in workloads],
        "hosts": [workload.host.weights_hash for workload in workloads],
        "budgets": list(budgets),
        "seed": seed,
        "train_clips": num_clips,
        "network": {**size, "signals": list(size.get("signals", ()))},
        "settings": {key: value for key, value in asdict(settings).items() if key != "rounds"},
    }
    path = folder / INDEX_FILE
    if path.exists() and json.loads(path.read_text()) != about:
        raise ValueError(f"{folder} holds decisions made with other settings (see {INDEX_FILE}); choose another run folder")
    write_text(path, json.dumps(about, indent=2) + "\n")


def _load(path: Path) -> ExpertData:
    try:
        return ExpertData(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to collect this round again") from error


def fitted(size: dict[str, Any], weights: Mapping[str, Tensor]) -> RetentionNetwork:
    """A scorer with these weights."""
    network = RetentionNetwork(**size)
    network.load_state_dict(weights)
    return network.eval()


def fit(
    decisions: ExpertData,
    size: dict[str, Any],
    settings: ImitationSettings,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
) -> RetentionNetwork:
    """A scorer that has learned the decisions; the same seed gives the same scorer.

    Args:
        start: weights to go on from, at a quarter of the learning rate; a fresh scorer by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RetentionNetwork(**size)
    learning_rate = settings.learning_rate
    if start is not None:
        network.load_state_dict(start)
        learning_rate *= FINETUNE_LR_SCALE
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(decisions) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    with tqdm(range(settings.epochs), desc="imitate", dynamic_ncols=True) as bar:
        for _ in bar:
            losses = []
            for rows in torch.randperm(len(decisions), generator=generator).split(settings.batch_size):
                part = decisions.rows(rows)
                loss = imitation_loss(network, part, settings.temperature, settings.expected_cost_weight, settings.label)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses):.4g}")
    if settings.label == "future_utility" and start is None:
        network.head.bias.data += ALWAYS_POSITIVE
    return network.eval()
