"""Decisions with what each alternative would cost: collected by rolling train clips out, or from the true clips themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from far_env.agents import observation_spec
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import ObservationSpec
from far_env.agents.oracle import Coverage, best_cover, coverage, pixel_error_scale
from far_env.agents.policies import choose, observed_rows, remaining_rows
from far_env.agents.subset_distribution import BudgetedSubset
from far_env.agents.utility import denoising_losses
from torch import Tensor
from tqdm.auto import tqdm

from far_env.clips.clip import Clip
from far_env.envs.episodes import right_aligned
from far_env.frame_meta import frame_features
from far_env.host.sampler import FrameSampler
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import content_key
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.signals import column_gaps, latent_cosines
from far_env.workloads import Workload

CHAIN_SIZES = 3
"""Drops that are noted of a cut made one by one."""
UNCUT_EVERY = 3
"""Steps of a true clip between decisions about a history of which nothing was dropped yet."""
EXPLORATION_PROBABILITY = 0.3
"""Share of decisions about true clips in which not the best but some noted alternative is chosen, so that histories vary."""


@dataclass(frozen=True)
class ExpertData:
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

    def rows(self, numbers: Tensor) -> ExpertData:
        """Those with these numbers."""
        return ExpertData(*(getattr(self, name)[numbers] for name in ExpertData.__dataclass_fields__))

    def some(self, count: int, seed: int) -> ExpertData:
        """So many of them at random, or all if there are fewer."""
        return self.rows(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])

    @staticmethod
    def join(parts: Sequence[ExpertData]) -> ExpertData:
        """All of them, one after the other."""
        return ExpertData(*(torch.cat([getattr(part, name) for part in parts]) for name in ExpertData.__dataclass_fields__))


class Histories(Protocol):
    """What collecting needs of rollouts, see `far_env.rollout.engine.RolloutBatch`."""

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next frame of each row."""

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents, padded at the end, and lengths."""

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of kept histories."""

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Of each row's history, by name."""

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these places of the row's history."""


class TrueHistories:
    """Histories of true frames, where no host generates any; see `Histories`.

    Args:
        latents: of whole clips (R, T, C, h, w).
        num_context: frames that each history begins with.
    """

    SIGNALS = ("lat_cos", "column_gap")
    """What true frames can tell of `far_env.contract.SIGNALS`: there is no host that could be watched."""

    def __init__(self, latents: Tensor, num_context: int) -> None:
        self.latents = latents
        self.num_context = num_context
        self.kept = [list(range(num_context)) for _ in latents]
        self.next = [num_context] * len(latents)

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next true frame of each row."""
        for row in rows:
            self.kept[row].append(self.next[row])
            self.next[row] += 1

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""
        return len(self.kept[row])

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), oldest first, padded with zeros at the end, and lengths (R,)."""
        own = [self.latents[row, self.kept[row]] for row in rows]
        lengths = torch.tensor([len(frames) for frames in own], device=self.latents.device)
        return torch.nn.utils.rnn.pad_sequence(own, batch_first=True), lengths

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), padded with zeros at the end."""
        return frame_features(*self.history(rows)).cpu().numpy()

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """lat_cos and column_gap of each row's history."""
        found = []
        for row in rows:
            own = self.latents[row, self.kept[row]][None]
            found.append({"lat_cos": latent_cosines(own)[0], "column_gap": column_gaps(own)[0]})
        return [{name: value.float().cpu().numpy() for name, value in own.items()} for own in found]

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these places of the row's history."""
        self.kept[row] = [self.kept[row][place] for place in ids]


def true_frames(workload: Workload, clip: Clip) -> Tensor:
    """The frames of a rollout (T, 3, H, W) as they are in the clip."""
    return torch.from_numpy(clip.frames[: workload.num_frames]).to(workload.host.device)


@torch.no_grad()
def collect(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    *,
    actor: RetentionNetwork | None,
    view: ObservationSpec,
    candidates: int,
    label: str = "coverage",
    true_frames: bool = False,
    sequential_eviction: bool = False,
    slots: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> ExpertData:
    """Roll train clips out and note the expert's opinion at every decision that matters.

    Args:
        clip_ids: of the train split.
        budgets: one per clip.
        actor: who decides; None lets the expert itself decide.
        view: what observations hold.
        candidates: alternatives noted per decision.
        label: see `far_env.agents.imitation.ImitationSettings`; with future_utility every older frame is a candidate.
        true_frames: let the clip's own frames stand for those that the host would generate: much faster, and nearly what is
            seen while the right frames are kept. The expert decides, and sometimes wanders off. Every few steps the last
            frames before anything was dropped, as many as there are slots, are noted as a first decision too, because large
            cuts are rare otherwise.
        sequential_eviction: for a scorer that evicts one frame after the other: with true frames, large cuts are recorded as
            some of the single evictions they consist of.
        slots: rows of an observation; by default as many as an environment with these budgets has.

    Raises:
        ValueError: if labels of future utility are wanted from a host with actions or guidance, or signals of attention
            without rollouts.
    """
    slots = max(workload.num_context, *budgets) + 1 if slots is None else slots
    sampler = None
    if label == "future_utility":
        candidates, sampler = slots - 1, FrameSampler(workload.host.transformer, workload.num_steps)
        if workload.actions or workload.guidance > 1:
            raise ValueError(f"labels of future utility need a host without actions and guidance; {workload.name} has them")
    if true_frames and (actor is not None or not set(view.signals) <= set(TrueHistories.SIGNALS)):
        raise ValueError("true frames are collected with the expert, and show no signals but lat_cos and column_gap")
    task = _Task(workload, actor, view, candidates, sampler, true_frames, sequential_eviction, slots)
    records: list[tuple] = []
    for first in tqdm(range(0, len(clip_ids), batch_size), desc="collect", disable=not progress, dynamic_ncols=True):
        chosen = slice(first, first + batch_size)
        records += _play(task, clip_ids[chosen], budgets[chosen])
    columns = [np.stack(column) for column in zip(*records, strict=True)]
    return ExpertData(*(torch.from_numpy(column) for column in columns))


@dataclass(frozen=True)
class _Task:
    """What `collect` was asked for, the same for all clips; see there."""

    workload: Workload
    actor: RetentionNetwork | None
    view: ObservationSpec
    candidates: int
    sampler: FrameSampler | None
    true_frames: bool
    sequential_eviction: bool
    slots: int


def _play(task: _Task, clip_ids: Sequence[int], budgets: Sequence[int]) -> list[tuple]:
    """Records of the decisions about some clips, played side by side."""
    workload, view, actor = task.workload, task.view, task.actor
    clips = [workload.clips.clip("train", clip_id) for clip_id in clip_ids]
    host, context = workload.host, workload.num_context
    frames = torch.stack([true_frames(workload, clip) for clip in clips])
    latents = host.autoencoder.encode(frames.to(host.dtype))
    truth = latents[:, context:]
    scale = pixel_error_scale(frames, truth) / workload.num_predict
    batch: Histories
    if task.true_frames:
        batch = TrueHistories(latents, context)
    else:
        batch = RolloutBatch(workload, len(clips), signals=view.signals)
        batch.begin(range(len(clips)), clips, [BENCHMARK_SEED + clip_id for clip_id in clip_ids])
    memories = [view.new_memory() for _ in clips]
    records = []
    for step in range(workload.num_predict - 1):
        batch.advance(range(len(clips)))
        full = [row for row in range(len(clips)) if batch.history_length(row) > budgets[row]]
        if not full:
            continue
        features = _squashed(batch.features(full))
        histories, lengths = batch.history(full)
        found = batch.signals(full) if view.signals else [{}] * len(full)
        observed, noted = [], []
        for place, row in enumerate(full):
            length = int(lengths[place])
            rows = observed_rows(features[place, :length].tolist(), step, memories[row])
            future = histories[place, :length], truth[row, step], truth[row, step + 1 :]
            if task.sampler is None:
                alternatives = _covers(*future, scale, budgets[row], task.candidates)
            else:
                noise_key = content_key("future utility", clip_ids[row], step)
                losses = denoising_losses(task.sampler, future[0][:-1], *future[1:], noise_key).tolist()
                alternatives = sorted((loss, [index]) for index, loss in enumerate(losses))
            observed.append(rows)
            noted.append(_record(task, rows, found[place], step, budgets[row], alternatives))
        if actor is not None and actor.sequential_eviction:
            progress = step / workload.num_predict
            kept = [
                choose(actor, rows, memories[row], budgets[row], progress) for row, rows in zip(full, observed, strict=True)
            ]
        else:
            masks = _acted(noted, actor)
            if task.true_frames:
                clips_of = [clip_ids[row] for row in full]
                masks = [_wandering(*own, step) for own in zip(noted, masks, clips_of, strict=True)]
            starts = [task.slots - len(rows) for rows in observed]
            kept = [(np.flatnonzero(mask) - start).tolist() for mask, start in zip(masks, starts, strict=True)]
        for row, ids in zip(full, kept, strict=True):
            batch.retain(row, ids)
            if memories[row] is not None:
                memories[row].keep(ids)
        records += noted
    if task.true_frames and task.sampler is None:
        for row, (clip_id, budget) in enumerate(zip(clip_ids, budgets, strict=True)):
            records += _uncut(task, latents[row], clip_id, budget, scale)
    return records


def _uncut(task: _Task, latents: Tensor, clip_id: int, budget: int, scale: float) -> list[tuple]:
    """Records of first decisions, about the last true frames of which nothing was dropped yet, at every few steps of a clip.

    Args:
        latents: of the whole clip (T, C, h, w).
    """
    view, context, records = task.view, task.workload.num_context, []
    for step in range(UNCUT_EVERY, task.workload.num_predict - 1, UNCUT_EVERY):
        end = context + step + 1
        length = min(task.slots, end)
        if length <= budget:
            continue
        uncut, memory = TrueHistories(latents[None, end - length :], length), view.new_memory()
        rows = observed_rows(_squashed(uncut.features([0]))[0].tolist(), step, memory)
        future = latents[end - length : end], latents[end - 1], latents[end:]
        if task.sequential_eviction:
            rng = np.random.default_rng((clip_id, step, 1))
            sizes = set(rng.integers(budget + 1, length + 1, CHAIN_SIZES).tolist())
            for left, drops in _chain(coverage(*future), scale, budget, sizes, task.candidates):
                remaining = remaining_rows(rows, left, memory)
                records.append(_record(task, remaining, {}, step, budget, drops, len(left) - 1))
        else:
            signals = uncut.signals([0])[0] if view.signals else {}
            alternatives = _covers(*future, scale, budget, task.candidates)
            records.append(_record(task, rows, signals, step, budget, alternatives))
    return records


def _chain(
    cover: Coverage, scale: float, budget: int, sizes: Collection[int], candidates: int
) -> Iterator[tuple[list[int], list[tuple[float, list[int]]]]]:
    """Drop the frames of a history one by one, the one that is missed least first; at these sizes tell which rows are left, and
    the best alternatives: what is lost, and the places among them that stay."""
    left = list(range(len(cover.distance)))
    while len(left) > budget:
        costs = sorted((cost, place) for place, cost in enumerate(cover.costs_without(left)[:-1].tolist()))
        if len(left) in sizes:
            places = range(len(left))
            yield list(left), [(scale * cost, [own for own in places if own != drop]) for cost, drop in costs[:candidates]]
        left.pop(costs[0][1])


def _squashed(features: np.ndarray) -> np.ndarray:
    """`frame_features` with motion as observations show it."""
    features[..., 3] /= 1 + features[..., 3]
    return features


def _covers(
    history: Tensor, newest: Tensor, future: Tensor, scale: float, budget: int, candidates: int
) -> list[tuple[float, list[int]]]:
    """The best sets to keep and what they cost, the cheapest first."""
    cover = coverage(history, newest, future)
    return [(scale * cover.cost(kept), kept) for kept in best_cover(cover, budget, candidates)]


def _record(
    task: _Task,
    rows: list[tuple[float, ...]],
    signals: Mapping[str, np.ndarray],
    step: int,
    budget: int,
    alternatives: Sequence[tuple[float, list[int]]],
    most: int | None = None,
) -> tuple[np.ndarray, ...]:
    """One row of `ExpertData`.

    Args:
        rows: what is observed and remembered of each frame, oldest first.
        alternatives: cost and kept frames of each, the cheapest first.
        most: how many may stay, if not as many as the budget allows.
    """
    slots, view = task.slots, task.view
    length, own = len(rows), view.num_told
    told = {name: right_aligned(name, signals[name], slots) for name in view.signals}
    columns = observation_spec.columns(told, view.signals) if told else np.zeros((slots, 0), dtype=np.float32)
    record = _empty_record(slots, own + columns.shape[1], task.candidates)
    shown = slice(slots - length, slots)
    record[0][shown, :own] = rows
    record[0][shown, 0] *= length / slots
    record[0][:, own:] = columns
    record[1][shown] = 1
    record[2][:] = budget / slots, step / task.workload.num_predict, length / slots
    record[3][...] = budget if most is None else most
    for index, (cost, kept) in enumerate(alternatives):
        record[4][index, slots - length + np.array(kept)] = True
        record[5][index] = cost
    return record


def _wandering(record: tuple, best: np.ndarray, clip_id: int, step: int) -> np.ndarray:
    """The best set, or one of the alternatives; which is a function of clip and step."""
    rng = np.random.default_rng((clip_id, step))
    sets = record[4][np.isfinite(record[5])]
    if rng.random() >= EXPLORATION_PROBABILITY or sets[0].sum() < record[3]:  # single frames are no sets to wander to
        return best
    return sets[rng.integers(len(sets))]


def _empty_record(slots: int, width: int, candidates: int) -> tuple[np.ndarray, ...]:
    """One row of `ExpertData`, of zeros and no alternatives."""
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
    decisions = ExpertData(*columns)
    logits = actor(decisions.frames, decisions.mask, decisions.budget)
    acting = BudgetedSubset.of_histories(actor.ranked(logits), decisions.mask, decisions.max_frames)
    return acting.mode().numpy().astype(bool)


def choices(network: RetentionNetwork, decisions: ExpertData) -> BudgetedSubset:
    """The scorer's distribution over what to keep at each decision."""
    logits = network(decisions.frames, decisions.mask, decisions.budget)
    return BudgetedSubset.of_histories(logits, decisions.mask, network.largest(decisions.max_frames, logits.shape[1]))
