"""Decisions with the costs of their alternatives, collected in rollouts of train clips or from the true frames of the clips."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from far_env.agents import observation_spec
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import ObservationSpec
from far_env.agents.oracle import Coverage, best_cover, coverage, pixel_error_scale
from far_env.agents.policies import choose, observed_rows, remaining_rows
from far_env.agents.subset_distribution import BudgetedSubset
from far_env.clips.clip import Clip
from far_env.envs.episodes import right_aligned
from far_env.frame_meta import frame_features
from far_env.progress import show_progress
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.signals import column_gaps, latent_cosines
from far_env.workloads import Workload

CHAIN_SIZES = 3
"""Single evictions that are recorded of a large cut."""
UNCUT_EVERY = 3
"""Steps of a true clip between decisions about a history from which nothing was dropped yet."""
EXPLORATION_PROBABILITY = 0.3
"""Share of decisions about true clips in which a random recorded alternative acts, not the best one, so that histories vary."""


@dataclass(frozen=True)
class ExpertData:
    """Decisions and what their alternatives cost; histories are right-aligned like the environment's.

    Attributes:
        frames: float32 (D, slots, columns), mask: float32 (D, slots), budget: float32 (D, 3): observations.
        max_frames: int64 (D,).
        sets: bool (D, candidates, slots), the frames that each alternative keeps; the best comes first.
        costs: float32 (D, candidates), expected squared pixel error per predicted frame; infinite where there is no
            alternative.
    """

    frames: Tensor
    mask: Tensor
    budget: Tensor
    max_frames: Tensor
    sets: Tensor
    costs: Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def rows(self, indices: Tensor) -> ExpertData:
        """The decisions with these indices."""
        return ExpertData(*(getattr(self, name)[indices] for name in ExpertData.__dataclass_fields__))

    def sample(self, count: int, seed: int) -> ExpertData:
        """``count`` decisions drawn at random, or all if there are fewer."""
        return self.rows(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])

    @staticmethod
    def join(parts: Sequence[ExpertData]) -> ExpertData:
        """All decisions, one part after the other."""
        return ExpertData(*(torch.cat([getattr(part, name) for part in parts]) for name in ExpertData.__dataclass_fields__))


class Histories(Protocol):
    """The part of `far_env.rollout.engine.RolloutBatch` that collecting uses."""

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next frame of each row."""

    def history_length(self, row: int) -> int:
        """Frames in a row's history."""

    def history(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Kept latents (R, K, C, h, w), padded at the end, and lengths (R,)."""

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of kept histories, (R, K, 4)."""

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Signals of each row's history, by name."""

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these positions of the row's history."""


class TrueHistories:
    """Histories of true frames, for use without a host; see `Histories`.

    Args:
        latents: of whole clips (R, T, C, h, w).
        num_context: frames that each history begins with.
    """

    SIGNALS = ("lat_cos", "column_gap")
    """The `far_env.contract.SIGNALS` of true frames; all others are recorded while a host generates a frame."""

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
        histories = [self.latents[row, self.kept[row]] for row in rows]
        lengths = torch.tensor([len(history) for history in histories], device=self.latents.device)
        return torch.nn.utils.rnn.pad_sequence(histories, batch_first=True), lengths

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), padded with zeros at the end."""
        return frame_features(*self.history(rows)).cpu().numpy()

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """lat_cos and column_gap of each row's history."""
        per_history = []
        for row in rows:
            history = self.latents[row, self.kept[row]][None]
            per_history.append({"lat_cos": latent_cosines(history)[0], "column_gap": column_gaps(history)[0]})
        return [{name: value.float().cpu().numpy() for name, value in signals.items()} for signals in per_history]

    def retain(self, row: int, ids: Sequence[int]) -> None:
        """Keep these positions of the row's history."""
        self.kept[row] = [self.kept[row][i] for i in ids]


def true_frames(workload: Workload, clip: Clip) -> Tensor:
    """The clip's frames that correspond to a rollout's, (T, 3, H, W), on the host's device."""
    return torch.from_numpy(clip.frames[: workload.num_frames]).to(workload.host.device)


@torch.no_grad()
def collect(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    *,
    actor: RetentionNetwork | None,
    spec: ObservationSpec,
    candidates: int,
    true_frames: bool = False,
    sequential_eviction: bool = False,
    slots: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> ExpertData:
    """Roll train clips out and record the expert's alternatives at every decision that matters.

    Args:
        clip_ids: of the train split.
        budgets: one per clip.
        actor: the scorer that decides; None lets the expert decide.
        spec: the contents of observations.
        candidates: alternatives recorded per decision.
        true_frames: use the clip's frames in place of generated ones, which is much faster, and nearly what a policy observes
            while the right frames are kept. The expert decides, sometimes at random (`EXPLORATION_PROBABILITY`). At every few
            steps (`UNCUT_EVERY`) the last frames before anything was dropped, as many as there are slots, are recorded as a
            first decision too, because large cuts are rare otherwise.
        sequential_eviction: for a scorer that evicts sequentially: with true frames, large cuts are recorded as
            some of the single evictions they consist of.
        slots: rows of an observation; by default as many as an environment with these budgets has.

    Raises:
        ValueError: if ``true_frames`` is combined with an actor, or with signals that only rollouts have.
    """
    slots = max(workload.num_context, *budgets) + 1 if slots is None else slots
    if true_frames and (actor is not None or not set(spec.signals) <= set(TrueHistories.SIGNALS)):
        raise ValueError("true frames are collected with the expert, and have no signals but lat_cos and column_gap")
    task = _Task(workload, actor, spec, candidates, true_frames, sequential_eviction, slots)
    records: list[tuple] = []
    description = f"collect decisions in {'true clips' if true_frames else 'rollouts'}"
    with show_progress(total=len(clip_ids), description=description, unit="clips", disable=not progress) as bar:
        for first in range(0, len(clip_ids), batch_size):
            batch = slice(first, first + batch_size)
            records += _play(task, clip_ids[batch], budgets[batch])
            bar.set_postfix(decisions=f"{len(records):,}")
            bar.update(len(clip_ids[batch]))
    columns = [np.stack(column) for column in zip(*records, strict=True)]
    return ExpertData(*(torch.from_numpy(column) for column in columns))


@dataclass(frozen=True)
class _Task:
    """The arguments of `collect` that are the same for all clips; see there."""

    workload: Workload
    actor: RetentionNetwork | None
    spec: ObservationSpec
    candidates: int
    true_frames: bool
    sequential_eviction: bool
    slots: int


def _play(task: _Task, clip_ids: Sequence[int], budgets: Sequence[int]) -> list[tuple]:
    """Records of the decisions about some clips, which are played in one batch."""
    workload, spec, actor = task.workload, task.spec, task.actor
    clips = [workload.clips.clip("train", clip_id) for clip_id in clip_ids]
    host, context = workload.host, workload.num_context
    frames = torch.stack([true_frames(workload, clip) for clip in clips])
    latents = host.autoencoder.encode(frames.to(host.dtype))
    truth = latents[:, context:]
    scale = pixel_error_scale(frames, truth) / workload.num_predict
    batch: Histories
    # Where true frames are fed back and no signal is the host's, generating frames would change nothing that is recorded.
    if task.true_frames or (workload.true_feedback and set(spec.signals) <= set(TrueHistories.SIGNALS)):
        batch = TrueHistories(latents, context)
    else:
        batch = RolloutBatch(workload, len(clips), signals=spec.signals)
        batch.begin(range(len(clips)), clips, [BENCHMARK_SEED + clip_id for clip_id in clip_ids])
    memories = [spec.new_memory() for _ in clips]
    records = []
    for step in range(workload.num_predict - 1):
        batch.advance(range(len(clips)))
        full = [row for row in range(len(clips)) if batch.history_length(row) > budgets[row]]
        if not full:
            continue
        features = _squashed(batch.features(full))
        histories, lengths = batch.history(full)
        signals = batch.signals(full) if spec.signals else [{}] * len(full)
        observed, recorded = [], []
        for index, row in enumerate(full):
            length = int(lengths[index])
            rows = observed_rows(features[index, :length].tolist(), step, memories[row])
            future = histories[index, :length], truth[row, step], truth[row, step + 1 :]
            alternatives = _best_sets(*future, scale, budgets[row], task.candidates)
            observed.append(rows)
            recorded.append(_record(task, rows, signals[index], step, budgets[row], alternatives))
        if actor is not None and actor.sequential_eviction:
            progress = step / workload.num_predict
            kept = [
                choose(actor, rows, memories[row], budgets[row], progress) for row, rows in zip(full, observed, strict=True)
            ]
        else:
            masks = _chosen_masks(recorded, actor)
            if task.true_frames:
                ids = [clip_ids[row] for row in full]
                masks = [_with_exploration(*decision, step) for decision in zip(recorded, masks, ids, strict=True)]
            starts = [task.slots - len(rows) for rows in observed]
            kept = [(np.flatnonzero(mask) - start).tolist() for mask, start in zip(masks, starts, strict=True)]
        for row, ids in zip(full, kept, strict=True):
            batch.retain(row, ids)
            if memories[row] is not None:
                memories[row].keep(ids)
        records += recorded
    if task.true_frames:
        for row, (clip_id, budget) in enumerate(zip(clip_ids, budgets, strict=True)):
            records += _uncut(task, latents[row], clip_id, budget, scale)
    return records


def _uncut(task: _Task, latents: Tensor, clip_id: int, budget: int, scale: float) -> list[tuple]:
    """Records of first decisions, about the last true frames before anything was dropped, at every few steps of a clip.

    Args:
        latents: of the whole clip (T, C, h, w).
    """
    spec, context, records = task.spec, task.workload.num_context, []
    for step in range(UNCUT_EVERY, task.workload.num_predict - 1, UNCUT_EVERY):
        end = context + step + 1
        length = min(task.slots, end)
        if length <= budget:
            continue
        uncut, memory = TrueHistories(latents[None, end - length :], length), spec.new_memory()
        rows = observed_rows(_squashed(uncut.features([0]))[0].tolist(), step, memory)
        future = latents[end - length : end], latents[end - 1], latents[end:]
        if task.sequential_eviction:
            rng = np.random.default_rng((clip_id, step, 1))
            sizes = set(rng.integers(budget + 1, length + 1, CHAIN_SIZES).tolist())
            for rows_left, alternatives in _eviction_chain(coverage(*future), scale, budget, sizes, task.candidates):
                remaining = remaining_rows(rows, rows_left, memory)
                records.append(_record(task, remaining, {}, step, budget, alternatives, len(rows_left) - 1))
        else:
            signals = uncut.signals([0])[0] if spec.signals else {}
            alternatives = _best_sets(*future, scale, budget, task.candidates)
            records.append(_record(task, rows, signals, step, budget, alternatives))
    return records


def _eviction_chain(
    cover: Coverage, scale: float, budget: int, sizes: Collection[int], candidates: int
) -> Iterator[tuple[list[int], list[tuple[float, list[int]]]]]:
    """Evict the frames of a history sequentially, the one with the lowest cost first.

    Yields:
        At each of ``sizes``: the rows that are left, and the best alternatives: the cost of each, and the positions among
        these rows that it keeps.
    """
    rows_left = list(range(len(cover.distance)))
    while len(rows_left) > budget:
        costs = sorted((cost, position) for position, cost in enumerate(cover.costs_without(rows_left)[:-1].tolist()))
        if len(rows_left) in sizes:
            positions = range(len(rows_left))
            yield (
                list(rows_left),
                [(scale * cost, [i for i in positions if i != evicted]) for cost, evicted in costs[:candidates]],
            )
        rows_left.pop(costs[0][1])


def _squashed(features: np.ndarray) -> np.ndarray:
    """`frame_features` with motion squashed as in observations; changed in place."""
    features[..., 3] /= 1 + features[..., 3]
    return features


def _best_sets(
    history: Tensor, newest: Tensor, future: Tensor, scale: float, budget: int, candidates: int
) -> list[tuple[float, list[int]]]:
    """The best sets to keep, each with its cost, in ascending order of cost."""
    cover = coverage(history, newest, future)
    return [(scale * cover.cost(kept), kept) for kept in best_cover(cover, budget, candidates)]


def _record(
    task: _Task,
    rows: list[tuple[float, ...]],
    signals: Mapping[str, np.ndarray],
    step: int,
    budget: int,
    alternatives: Sequence[tuple[float, list[int]]],
    max_kept: int | None = None,
) -> tuple[np.ndarray, ...]:
    """One decision of `ExpertData`.

    Args:
        rows: of `observed_rows`.
        alternatives: cost and kept frames of each, in ascending order of cost.
        max_kept: how many frames may stay, if not as many as the budget allows.
    """
    slots, spec = task.slots, task.spec
    length, num_columns = len(rows), spec.num_row_columns
    aligned = {name: right_aligned(name, signals[name], slots) for name in spec.signals}
    columns = observation_spec.columns(aligned, spec.signals) if aligned else np.zeros((slots, 0), dtype=np.float32)
    frames, mask, shares, max_frames, sets, costs = record = _empty_record(
        slots, num_columns + columns.shape[1], task.candidates
    )
    filled = slice(slots - length, slots)
    frames[filled, :num_columns] = rows
    frames[filled, 0] *= length / slots
    frames[:, num_columns:] = columns
    mask[filled] = 1
    shares[:] = budget / slots, step / task.workload.num_predict, length / slots
    max_frames[...] = budget if max_kept is None else max_kept
    for index, (cost, kept) in enumerate(alternatives):
        sets[index, slots - length + np.array(kept)] = True
        costs[index] = cost
    return record


def _with_exploration(record: tuple, best: np.ndarray, clip_id: int, step: int) -> np.ndarray:
    """The best set, or one of the alternatives; which one is a function of clip and step."""
    rng = np.random.default_rng((clip_id, step))
    sets = record[4][np.isfinite(record[5])]
    if rng.random() >= EXPLORATION_PROBABILITY:
        return best
    return sets[rng.integers(len(sets))]


def _empty_record(slots: int, width: int, candidates: int) -> tuple[np.ndarray, ...]:
    """One decision of `ExpertData`, of zeros and no alternatives."""
    return (
        np.zeros((slots, width), dtype=np.float32),
        np.zeros(slots, dtype=np.float32),
        np.zeros(3, dtype=np.float32),
        np.zeros((), dtype=np.int64),
        np.zeros((candidates, slots), dtype=bool),
        np.full(candidates, np.inf, dtype=np.float32),
    )


def _chosen_masks(records: list[tuple], actor: RetentionNetwork | None) -> np.ndarray:
    """Keep masks (D, slots), bool: the expert's best sets, or the actor's most probable ones."""
    if actor is None:
        return np.stack([sets[0] for _, _, _, _, sets, _ in records])
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*records, strict=True)]
    return subset_distribution(actor, ExpertData(*columns)).mode().numpy().astype(bool)


def subset_distribution(network: RetentionNetwork, decisions: ExpertData) -> BudgetedSubset:
    """The scorer's distribution over the sets to keep at each decision."""
    logits = network(decisions.frames, decisions.mask, decisions.budget)
    return BudgetedSubset.of_histories(logits, decisions.mask, decisions.max_frames)
