"""Imitation of the hindsight expert: DAgger collects decisions with what each alternative would cost; the scorer learns them.

The label of a decision is not one set of frames but the best few with their costs, because many sets are equally good:
the target is softmax(−cost / temperature), the loss its cross-entropy under the budgeted-subset distribution.
For comparison, labels can be future utilities of single frames (`agents.utility`): then the alternatives are the frames, and
the scorer's probabilities those of drawing one.
Dataset aggregation: Ross et al., arXiv 1011.0686.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from agents import seen
from agents.adapters import observed_rows
from agents.memory import HistoryMemory
from agents.network import RetentionNetwork
from agents.oracle import best_cover, coverage, pixel_error_scale
from agents.subset import BudgetedSubset
from agents.utility import denoising_losses
from far_env.config import require_positive, write_text
from far_env.contract import unknown_name
from far_env.episodes import ROW_FEATURES, right_aligned
from far_env.host.sampler import FrameSampler
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import content_key
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workloads import Workload

INDEX_FILE = "index.json"
LABELS = ("coverage", "future_utility")
ALWAYS_POSITIVE = 100.0
"""Added to logits that rank frames but were not taught how many are worth a place."""


@dataclass(frozen=True)
class ImitationSettings:
    """How the scorer learns from the expert before PPO (if at all)."""

    rounds: int = 0
    """Of collecting and learning; in the first the expert acts, then the scorer. 0 for none."""
    label: str = "coverage"
    """"coverage": what sets of frames leave uncovered of the clip's true rest; or "future_utility", of single frames."""
    clips_per_round: int = 256
    candidates: int = 8
    """Sets per decision whose costs are noted."""
    temperature: float = 1e-3
    """In units of mean squared pixel error per predicted frame, or of the squared error of velocities for future_utility."""
    regret: float = 0.0
    """Weight of what the scorer's own choice among the alternatives is expected to cost, in temperatures, beside the
    cross-entropy: which mistakes matter."""
    epochs: int = 30
    """Over all decisions so far, from a fresh scorer in every round."""
    batch_size: int = 256
    learning_rate: float = 2e-3
    """At the start; falls by a cosine to zero."""

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(unknown_name("label", self.label, LABELS))
        if self.regret < 0:
            raise ValueError(f"the weight of regret cannot be negative, got {self.regret}")
        require_positive(self, "clips_per_round", "candidates", "temperature", "epochs", "batch_size", "learning_rate")


@dataclass(frozen=True)
class Decisions:
    """Decisions and what their alternatives cost; histories are right-aligned like the environment's.

    Attributes:
        frames: float32 (D, slots, columns), mask: float32 (D, slots), budget: float32 (D, 3): observations.
        max_frames: int64 (D,).
        sets: bool (D, candidates, slots), the frames that each alternative keeps; the best comes first. For future_utility
            each is one frame.
        costs: float32 (D, candidates): expected squared error per predicted frame, or of velocities for future_utility;
            infinite where there is no alternative.
    """

    frames: Tensor
    mask: Tensor
    budget: Tensor
    max_frames: Tensor
    sets: Tensor
    costs: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    @staticmethod
    def join(parts: Sequence[Decisions]) -> Decisions:
        """All of them, one after the other."""
        return Decisions(*(torch.cat([getattr(part, name) for part in parts]) for name in Decisions.__dataclass_fields__))


@torch.no_grad()
def collect(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    *,
    actor: RetentionNetwork | None,
    memory: bool,
    candidates: int,
    statistics: Sequence[str] = (),
    label: str = "coverage",
    slots: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Decisions:
    """Roll train clips out and note the expert's opinion at every decision that matters.

    Args:
        clip_ids: of the train split.
        budgets: one per clip.
        actor: who decides; None lets the expert itself decide.
        memory: whether observations carry what a `HistoryMemory` recalls.
        statistics: whose columns (`agents.seen.columns`) they carry as well.
        label: see `ImitationSettings`; with future_utility every older frame is a candidate.
        candidates: alternatives noted per decision.
        slots: rows of an observation; by default as many as an environment with these budgets has.
    """
    slots = max(workload.num_context, *budgets) + 1 if slots is None else slots
    sampler = None
    if label == "future_utility":
        candidates, sampler = slots - 1, FrameSampler(workload.host.transformer, workload.num_steps)
        if workload.actions or workload.guidance > 1:
            raise ValueError(f"labels of future utility need a host without actions and guidance; {workload.name} has them")
    records: list[tuple] = []
    for first in tqdm(range(0, len(clip_ids), batch_size), desc="collect", disable=not progress, dynamic_ncols=True):
        chosen = slice(first, first + batch_size)
        records += _play(
            workload, clip_ids[chosen], budgets[chosen], actor, memory, candidates, tuple(statistics), sampler, slots
        )
    columns = [np.stack(column) for column in zip(*records, strict=True)]
    return Decisions(*(torch.from_numpy(column) for column in columns))


def _play(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    actor: RetentionNetwork | None,
    memory: bool,
    candidates: int,
    statistics: tuple[str, ...],
    sampler: FrameSampler | None,
    slots: int,
) -> list[tuple]:
    clips = [workload.clips.clip("train", clip_id) for clip_id in clip_ids]
    host, context = workload.host, workload.num_context
    frames = torch.stack([torch.from_numpy(clip.frames[: workload.num_frames]) for clip in clips]).to(host.device)
    truth = host.autoencoder.encode(frames.to(host.dtype))[:, context:]
    scale = pixel_error_scale(frames, truth) / workload.num_predict
    batch = RolloutBatch(workload, len(clips), statistics=statistics)
    batch.begin(range(len(clips)), clips, [BENCHMARK_SEED + clip_id for clip_id in clip_ids])
    memories = [HistoryMemory() if memory else None for _ in clips]
    records = []
    for step in range(workload.num_predict - 1):
        batch.advance(range(len(clips)))
        full = [row for row in range(len(clips)) if batch.history_length(row) > budgets[row]]
        if not full:
            continue
        features = batch.features(full)
        features[..., 3] /= 1 + features[..., 3]
        histories, lengths = batch.history(full)
        found = batch.statistics(full) if statistics else []
        for place, row in enumerate(full):
            length, budget = int(lengths[place]), budgets[row]
            future = histories[place, :length], truth[row, step], truth[row, step + 1 :]
            if sampler is None:
                cover = coverage(*future)
                alternatives = [(scale * cover.cost(kept), kept) for kept in best_cover(cover, budget, candidates)]
            else:
                noise_key = content_key("future utility", clip_ids[row], step)
                losses = denoising_losses(sampler, future[0][:-1], *future[1:], noise_key).tolist()
                alternatives = sorted((loss, [index]) for index, loss in enumerate(losses))
            told = {name: right_aligned(name, found[place][name], slots) for name in statistics}
            columns = seen.columns(told, statistics) if told else np.zeros((slots, 0), dtype=np.float32)
            own = len(ROW_FEATURES) + HistoryMemory.WIDTH * memory
            record = _empty_record(slots, own + columns.shape[1], candidates)
            shown = slice(slots - length, slots)
            record[0][shown, :own] = observed_rows(features[place, :length].tolist(), step, memories[row])
            record[0][shown, 0] *= length / slots
            record[0][:, own:] = columns
            record[1][shown] = 1
            record[2][:] = budget / slots, step / workload.num_predict, length / slots
            record[3][...] = budget
            for index, (cost, kept) in enumerate(alternatives):
                record[4][index, slots - length + np.array(kept)] = True
                record[5][index] = cost
            records.append(record)
        kept_sets = _acted(records[-len(full) :], actor)
        for record, mask, row in zip(records[-len(full) :], kept_sets, full, strict=True):
            offset = slots - int(record[1].sum())
            ids = (np.flatnonzero(mask) - offset).tolist()
            batch.retain(row, ids)
            if memories[row] is not None:
                memories[row].keep(ids)
    return records


def _empty_record(slots: int, width: int, candidates: int) -> tuple[np.ndarray, ...]:
    """One row of `Decisions`, of zeros and no alternatives."""
    return (
        np.zeros((slots, width), dtype=np.float32),
        np.zeros(slots, dtype=np.float32),
        np.zeros(3, dtype=np.float32),
        np.zeros((), dtype=np.int64),
        np.zeros((candidates, slots), dtype=bool),
        np.full(candidates, np.inf, dtype=np.float32),
    )


def _acted(records: list[tuple], actor: RetentionNetwork | None) -> np.ndarray:
    """Keep masks (D, slots): the expert's best sets (with the best single frames), or the actor's most probable ones."""
    if actor is None:
        masks = []
        for _, _, _, max_frames, sets, _ in records:
            own = sets[0].copy()
            for single in sets[1:]:
                if own[:-1].sum() < max_frames - 1:
                    own |= single
            own[-1] = True
            masks.append(own)
        return np.stack(masks)
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*records, strict=True)]
    decisions = Decisions(*columns)
    return _distribution(actor, decisions).mode().numpy().astype(bool)


def _distribution(network: RetentionNetwork, decisions: Decisions) -> BudgetedSubset:
    logits = network(decisions.frames, decisions.mask, decisions.budget)
    forced = torch.zeros_like(decisions.mask, dtype=torch.bool)
    forced[:, -1] = True
    free = (decisions.mask > 0) & ~forced
    return BudgetedSubset(logits, free, forced, decisions.max_frames)


def imitation_loss(
    network: RetentionNetwork, decisions: Decisions, temperature: float, regret: float = 0.0, label: str = "coverage"
) -> Tensor:
    """Mean over decisions of the cross-entropy between softmax(−cost / temperature) and the scorer's sets, or, for
    future_utility, the softmax of its logits over the older frames.

    To it is added, ``regret`` times, the mean over alternatives of (cost − lowest cost) / temperature under the scorer's
    probabilities, shared among the alternatives alone.
    """
    missing = decisions.costs.isinf()
    extra = (decisions.costs - decisions.costs[:, :1]) / temperature
    if label == "future_utility":
        logits = network(decisions.frames, decisions.mask, decisions.budget)
        older = decisions.sets.any(dim=1)
        single = logits.masked_fill(~older, -torch.inf).log_softmax(dim=1).masked_fill(~older, 0.0)
        log_probs = (decisions.sets * single[:, None]).sum(dim=2)
    else:
        distribution = _distribution(network, decisions)
        log_probs = torch.stack([distribution.log_prob(kept) for kept in decisions.sets.unbind(dim=1)], dim=1)
    loss = -((-extra).softmax(dim=1) * log_probs.masked_fill(missing, 0.0)).sum(dim=1)
    if regret:
        chosen = log_probs.masked_fill(missing, -torch.inf).softmax(dim=1)
        loss = loss + regret * (chosen * extra.masked_fill(missing, 0.0)).sum(dim=1)
    return loss.mean()


def imitate(
    settings: ImitationSettings,
    size: dict[str, int],
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    folder: Path,
    *,
    seed: int,
    num_clips: int,
) -> RetentionNetwork:
    """Collect decisions round by round, each kept as a file in ``folder``, and learn from all of them.

    In round 0 the expert acts, later the scorer that has learned the rounds before. The clips of a round are shared evenly
    among the workloads, and each is played under one of the budgets in turn. A round whose file is there is not collected
    again, so a stopped run goes on where it stopped.

    Args:
        size: arguments of `RetentionNetwork`.
        num_clips: train clips to draw from; no clip comes twice before all have come.

    Raises:
        ValueError: if the folder holds decisions made with other settings, or a damaged file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_index(folder, settings, size, workloads, budgets, seed, num_clips)
    rng = np.random.default_rng((seed, 4))
    order = np.concatenate(
        [rng.permutation(num_clips) for _ in range(-(-settings.rounds * settings.clips_per_round // num_clips))]
    )
    slots = max(*(workload.num_context for workload in workloads), *budgets) + 1
    parts: list[Decisions] = []
    for number in range(settings.rounds):
        path = folder / f"round_{number:03d}.safetensors"
        if not path.exists():
            actor = fit(Decisions.join(parts), size, settings, seed) if parts else None
            clips = order[number * settings.clips_per_round : (number + 1) * settings.clips_per_round].tolist()
            found = Decisions.join(
                [
                    collect(
                        workload,
                        own,
                        [budgets[i % len(budgets)] for i in range(len(own))],
                        actor=actor,
                        memory=bool(size.get("memory", False)),
                        candidates=settings.candidates,
                        statistics=size.get("statistics", ()),
                        label=settings.label,
                        slots=slots,
                    )
                    for index, workload in enumerate(workloads)
                    if (own := clips[index :: len(workloads)])
                ]
            )
            temporary = path.with_suffix(".part")
            save_file({name: getattr(found, name) for name in Decisions.__dataclass_fields__}, temporary)
            temporary.replace(path)
        parts.append(_load(path))
    return fit(Decisions.join(parts), size, settings, seed)


def _check_index(folder: Path, settings: ImitationSettings, *rest: object) -> None:
    """Note what the decisions in a folder were made with, or refuse one that was made otherwise."""
    size, workloads, budgets, seed, num_clips = rest
    about = {
        "workloads": [workload.name for workload in workloads],
        "hosts": [workload.host.weights_hash for workload in workloads],
        "budgets": list(budgets),
        "seed": seed,
        "train_clips": num_clips,
        "network": {**size, "statistics": list(size.get("statistics", ()))},
        "settings": {key: value for key, value in asdict(settings).items() if key != "rounds"},
    }
    path = folder / INDEX_FILE
    if path.exists() and json.loads(path.read_text()) != about:
        raise ValueError(f"{folder} holds decisions made with other settings (see {INDEX_FILE}); choose another run folder")
    write_text(path, json.dumps(about, indent=2) + "\n")


def _load(path: Path) -> Decisions:
    try:
        return Decisions(**load_file(path))
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to collect this round again") from error


def fit(decisions: Decisions, size: dict[str, int], settings: ImitationSettings, seed: int) -> RetentionNetwork:
    """A fresh scorer that has learned the decisions; the same seed gives the same scorer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RetentionNetwork(**size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    batches = -(-len(decisions) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    with tqdm(range(settings.epochs), desc="imitate", dynamic_ncols=True) as bar:
        for _ in bar:
            losses = []
            for rows in torch.randperm(len(decisions), generator=generator).split(settings.batch_size):
                part = Decisions(*(getattr(decisions, name)[rows] for name in Decisions.__dataclass_fields__))
                loss = imitation_loss(network, part, settings.temperature, settings.regret, settings.label)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses):.4g}")
    if settings.label == "future_utility":
        network.head.bias.data += ALWAYS_POSITIVE
    return network.eval()
