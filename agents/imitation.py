"""Imitation of the hindsight expert: what dropping each frame costs is collected, and the scorer learns which costs least.

The label of a decision is not one frame but the cost of every one, because many are equally good: the target is
softmax(−cost / temperature), the loss its cross-entropy under the scorer's softmax, plus the expected cost. Beside it the
network learns how similar every two frames really are, of which a policy receives only a part. Rounds of collecting with the
scorer and learning from all rounds are DAgger: Ross et al., arXiv 1011.0686.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from far_env.agents.budgets import deciding_budgets
from far_env.agents.checkpoints import load_scorer, scorer_folder
from far_env.agents.collection import BatchPlayer, collect, play_here
from far_env.agents.config import FRAMES, TOKENS, AgentTraining, ImitationSettings, NetworkConfig
from far_env.agents.expert_actors import ActorBatchPlayer
from far_env.agents.expert_data import load_expert_data
from far_env.agents.graph_decisions import Decisions, GraphDecisions, shuffled_batches
from far_env.agents.network import RetentionNetwork, deeper, make_network, network_with_weights, token_weights
from far_env.allocator import return_freed_memory
from far_env.host.training.muon import split_parameters
from far_env.io import read_json, write_json
from far_env.progress import show_progress
from far_env.tensor_files import load_tensors, save_tensors, save_weights
from far_env.workload import Workload

INDEX_FILE = "index.json"
FINETUNE_LR_SCALE = 0.3
"""Share of the learning rate for a scorer that has already learned."""
WARMUP = 0.05
"""Share of the batches in which the learning rate rises."""


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
        config = self.config
        with ActorBatchPlayer(config) if config.ray.actors else nullcontext(play_here) as player:
            network = imitate(
                config.imitation,
                config.network,
                self.workloads,
                self.budgets,
                self.folder,
                seed=config.seed,
                num_clips=config.train_clips,
                player=player,
            )
        return network.state_dict()


def imitation_loss(network: RetentionNetwork, decisions: Decisions, settings: ImitationSettings) -> Tensor:
    """Cross-entropy between softmax(−cost / temperature) and the scorer's softmax(−score) over the frames that may be dropped,
    plus ``expected_cost_weight`` times the expected cost in units of the temperature, plus ``similarity_weight`` times the mean
    squared error of the similarities of frames; means over decisions, and over pairs of frames.
    """
    scores, e = _scores(network, decisions)
    scores, costs = scores.float().flatten(1), decisions.costs.flatten(1)
    fixed = costs.isinf()
    extra = (costs - costs.amin(dim=1, keepdim=True)) / settings.temperature
    log_probs = (-scores).masked_fill(fixed, -1e9).log_softmax(dim=1)
    loss = -((-extra).softmax(dim=1) * log_probs.masked_fill(fixed, 0.0)).sum(dim=1).mean()
    expected_cost = (log_probs.exp() * extra.masked_fill(fixed, 0.0)).sum(dim=1).mean()
    both = (decisions.mask[:, :, None] & decisions.mask[:, None]).float()
    errors = (network.similarity(e)[..., 0].float() - decisions.similarity).square() * both
    return loss + settings.expected_cost_weight * expected_cost + settings.similarity_weight * errors.sum() / both.sum()


def imitation_step(
    network: RetentionNetwork,
    decisions: Decisions,
    settings: ImitationSettings,
    optimizers: Sequence[torch.optim.Optimizer],
    precision: torch.dtype,
) -> float:
    """One step of the optimisers on a batch, with matrix products in this precision; returns the loss before it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = imitation_loss(network, decisions, settings)
    network.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


@torch.no_grad()
def mean_regret(network: RetentionNetwork, decisions: Decisions) -> float:
    """How much the expected logarithmic error of the scorer's choices is above that of the best, mean over decisions."""
    scores, costs = _scores(network, decisions)[0].flatten(1), decisions.costs.flatten(1)
    chosen = scores.masked_fill(costs.isinf(), torch.inf).argmin(dim=1)
    regret = costs.gather(1, chosen[:, None])[:, 0] - costs.amin(dim=1)
    return float(regret.mean())


def _scores(network: RetentionNetwork, decisions: Decisions) -> tuple[Tensor, Tensor]:
    """Scores of the frames in each decision, in the shape of its costs, and the edges of each call, which is encoded once."""
    x, e = network.encode(decisions.nodes, decisions.edges, decisions.mask)
    return network.score(x[decisions.call], e[decisions.call], decisions.remaining), e


def imitate(
    settings: ImitationSettings,
    network_config: NetworkConfig,
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    folder: Path,
    *,
    seed: int,
    num_clips: int,
    player: BatchPlayer = play_here,
) -> RetentionNetwork:
    """Collect decisions part by part, each kept as files in ``folder``, and learn from all of them.

    First the expert acts on true frames, if there are clips for it; then, round by round, the scorer that has learned all
    before, on true frames or in rollouts. The clips of a part are shared out so that every workload has equally many frames,
    which take about equally long, and each clip is played under several of the budgets in turn. What is finished is not made
    again, so that a stopped run resumes where it stopped.

    The networks learn in the precision of the first workload's host.

    Args:
        num_clips: train clips to draw from; no clip comes twice before all have come.
        player: plays the rollouts in which decisions are collected.

    Raises:
        ValueError: if the folder contains decisions made with other settings, or a damaged file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_index(folder, settings, network_config, workloads, budgets, seed, num_clips)
    precision = workloads[0].host.dtype
    decisions: list[GraphDecisions] = []
    weights = None if settings.start is None else starting_weights(settings.start, network_config)
    planned = planned_parts(settings, workloads, budgets, seed=seed, num_clips=num_clips, memory=network_config.memory)
    scorer_paths = [folder / f"scorer_{number:02d}.ckpt" for number in range(len(planned))]
    last_to_learn = max((number for number, path in enumerate(scorer_paths) if not path.exists()), default=-1)
    for number, (parts, scorer_path) in enumerate(zip(planned, scorer_paths, strict=True)):
        actor = network_with_weights(network_config, weights) if number else None  # at first the expert decides
        for part in parts:
            path = part.path(folder, number)
            if not path.exists():
                found = collect(
                    part.workload,
                    part.clip_ids,
                    part.budgets,
                    actor=actor,
                    config=network_config,
                    true_frames=part.true_frames,
                    seed=int(np.random.default_rng((seed, number, 6)).integers(2**31)),
                    player=player,
                    parts=path.with_suffix(".parts"),
                )
                save_weights(vars(found), path)
            shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)
            if number <= last_to_learn:
                decisions.append(GraphDecisions(load_expert_data(path), network_config))
        checkpoint = folder / f"learning_{number:02d}.ckpt"
        if not scorer_path.exists():
            if decisions or weights is None:
                weights = fit(decisions, network_config, settings, seed, weights, checkpoint, precision).state_dict()
            save_tensors(scorer_path, dict(weights))
        checkpoint.unlink(missing_ok=True)
        return_freed_memory()
        weights = load_tensors(scorer_path)
    return network_with_weights(network_config, weights)


def starting_weights(name: str, config: NetworkConfig) -> dict[str, Tensor]:
    """The weights of a trained scorer for a network to begin with.

    Raises:
        ValueError: if there is no such scorer, or if its network is another, but for the memory and fewer layers.
    """
    network, _ = load_scorer(scorer_folder(name))
    same = replace(network.config, memory=config.memory, num_layers=config.num_layers) == config
    if not same or network.config.num_layers > config.num_layers or (config.memory, network.config.memory) == (FRAMES, TOKENS):
        raise ValueError(
            f"imitation.start: the network of {name} is not that of this run; give network the same settings, with as many "
            "layers or more"
        )
    if network.config.num_layers < config.num_layers:
        network = deeper(network, config.num_layers)
    if network.config.memory == config.memory:
        return network.state_dict()
    return token_weights(network, config)


@dataclass(frozen=True)
class Part:
    """Rollouts of one workload in which decisions are collected together.

    Attributes:
        kind: expert, true or rollouts: the expert decides on true frames, the scorer does, or it does in rollouts of the host.
        clip_ids: of the train split, one per rollout. budgets: one per rollout.
    """

    kind: str
    workload: Workload
    clip_ids: list[int]
    budgets: list[int]

    @property
    def true_frames(self) -> bool:
        """Whether no host generates frames because the clip's own are used."""
        return self.kind != "rollouts"

    def path(self, folder: Path, number: int) -> Path:
        """The file of the decisions if this part belongs to round ``number``, counted from 0, that of the expert."""
        return folder / f"{number:02d}_{self.kind}_{self.workload.name}.safetensors"


def planned_parts(
    settings: ImitationSettings,
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    *,
    seed: int,
    num_clips: int,
    memory: str = FRAMES,
) -> list[list[Part]]:
    """The parts of each round, those of the expert first; see `imitate`, whose arguments these are."""
    rounds = [("expert", settings.true_clips), *settings.collected_rounds]
    rates = np.array([1 / workload.num_frames for workload in workloads])
    shares = np.concatenate([[0], rates.cumsum() / rates.sum()])
    num_drawn = sum(count for _, count in rounds)
    rng = np.random.default_rng((seed, 4))
    order = [clip for _ in range(-(-num_drawn // num_clips)) for clip in rng.permutation(num_clips).tolist()]
    planned = []
    for kind, count in rounds:
        clips, order = order[:count], order[count:]
        ends = (shares * count).round().astype(int).tolist()
        parts = []
        for workload, begin, end in zip(workloads, ends, ends[1:], strict=False):
            of_workload = deciding_budgets(memory, workload, budgets)
            ids = [clip for clip in clips[begin:end] for _ in range(settings.budgets_per_clip)]
            if ids:
                parts.append(Part(kind, workload, ids, [of_workload[i % len(of_workload)] for i in range(len(ids))]))
        planned.append(parts)
    return planned


def last_round(
    config: AgentTraining, workloads: Sequence[Workload], budgets: Sequence[int], names: Sequence[str]
) -> list[tuple[int, Part]]:
    """The named workloads' parts of the last round, each with the round's number.

    Raises:
        ValueError: if the round has no clips of one of them.
    """
    drawn = {"seed": config.seed, "num_clips": config.train_clips, "memory": config.network.memory}
    planned = planned_parts(config.imitation, workloads, budgets, **drawn)
    parts = {part.workload.name: part for part in planned[-1]}
    if missing := [name for name in names if name not in parts]:
        raise ValueError(
            f"imitation_steps: the last round of imitation has no clips of {', '.join(missing)}; give it more clips, "
            "in imitation.rounds or imitation.true_clips"
        )
    return [(len(planned) - 1, parts[name]) for name in names]


def fit(
    parts: Sequence[GraphDecisions],
    network_config: NetworkConfig,
    settings: ImitationSettings,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
    checkpoint: Path | None = None,
    precision: torch.dtype = torch.float32,
) -> RetentionNetwork:
    """Train a scorer on the decisions; the same seed gives the same scorer.

    Args:
        start: weights to continue from, at `FINETUNE_LR_SCALE` of the learning rate; by default a new scorer learns.
        checkpoint: written after every pass; a stopped training resumes from it.
        precision: of matrix products; bfloat16 is faster on processors that have it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(network_config)
    learning_rate = settings.learning_rate
    if start is not None:
        network.load_state_dict(start)
        learning_rate *= FINETUNE_LR_SCALE
    num_decisions = sum(map(len, parts))
    epochs = settings.epochs if start is None else settings.round_epochs
    optimizers = make_optimizers(network, learning_rate)
    batches = sum(-(-len(part.calls) // settings.batch_size) for part in parts)
    schedules = {
        f"schedule of {name}": OneCycleLR(optimizer, learning_rate, epochs * batches, pct_start=WARMUP, cycle_momentum=False)
        for name, optimizer in optimizers.items()
    }
    states = {"network": network, **optimizers, **schedules}
    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = load_tensors(checkpoint)
        done = saved.pop("epochs")
        for name, state in saved.items():
            states[name].load_state_dict(state)
    description = f"imitate {num_decisions:,} decisions"
    with show_progress(total=epochs * num_decisions, description=description, unit="decisions") as bar:
        bar.update(done * num_decisions)
        for epoch in range(done, epochs):
            rng = np.random.default_rng((seed, 5, epoch))
            losses = []
            for part, indices in shuffled_batches(parts, settings.batch_size, rng):
                batch = part.batch(indices)
                losses.append(imitation_step(network, batch, settings, tuple(optimizers.values()), precision))
                for schedule in schedules.values():
                    schedule.step()
                bar.set_postfix(pass_=epoch + 1, loss=f"{np.mean(losses[-100:]):.4g}")
                bar.update(len(batch))
            if checkpoint is not None:
                save_tensors(checkpoint, {name: part.state_dict() for name, part in states.items()} | {"epochs": epoch + 1})
    return network.eval()


def make_optimizers(network: RetentionNetwork, learning_rate: float) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices between the layers that read the inputs and
    those that write the outputs, which learn several times faster with it; AdamW for the rest.
    """
    ends = ("embed_nodes", "embed_edges", "embed_remaining", "embed_share", "head", "similarity")
    matrices, others = split_parameters(network, lambda name, p: p.ndim == 2 and not name.startswith(ends))
    return {
        "muon": torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.01),
    }


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
    index: dict[str, Any] = {
        "workloads": [workload.name for workload in workloads],
        "hosts": [workload.host.weights_hash for workload in workloads],
        "feedback": [workload.feedback for workload in workloads],
        "budgets": list(budgets),
        "seed": seed,
        "train_clips": num_clips,
        "network": {**asdict(network_config), "signals": list(network_config.signals)},
        "settings": {**asdict(settings), "rounds": list(settings.rounds)},
    }
    path = folder / INDEX_FILE
    if path.exists() and read_json(path, "choose another run folder") != index:
        raise ValueError(f"{folder} contains decisions made with other settings (see {INDEX_FILE}); choose another run folder")
    write_json(path, index)
