"""The expert that imitation learns from: it knows the true rest of a clip, and so what dropping each frame costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.agents.config import NetworkConfig
from far_env.agents.expert_data import ExpertData, Recorder
from far_env.agents.graph_batches import Scores
from far_env.agents.histories import Histories, TrueHistories, uses_true_frames
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation import FrameGraph, signal_arrays
from far_env.agents.oracle import Coverage
from far_env.latent_cells import cell_distances, nearest_cells
from far_env.rollout.context import true_units
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workload import Workload

LAST_EVICTIONS, OTHER_EVICTIONS = 4, 4
"""Evictions that are recorded where a call drops more: the last ones, which cost most, and as many others, chosen at random."""
EXPLORATION_PROBABILITY = 0.15
"""Share of evictions from true frames in which a random frame is dropped, not the cheapest, so that histories vary."""
COST_FLOOR = 0.01
"""Error that any host leaves, as a share of the clip's variance."""


@torch.no_grad()
def play_with_expert(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    actor: RetentionNetwork | None,
    config: NetworkConfig,
    use_true_frames: bool,
    recorder: Recorder,
) -> ExpertData:
    """Decisions about some clips, which are played in one batch. Where the host generates chunks, these are decided about."""
    unique = list(dict.fromkeys(clip_ids))
    clip_of_row = [unique.index(clip_id) for clip_id in clip_ids]
    clips = [workload.clips.clip("train", clip_id) for clip_id in unique]
    context, steps = workload.context_units, workload.predict_units
    budgets = [workload.max_units(budget) for budget in budgets]
    latents = true_units(workload, clips).float()
    histories: Histories
    if use_true_frames or uses_true_frames(workload, config.signals):
        histories = TrueHistories(latents[clip_of_row], context)
    else:
        histories = RolloutBatch(workload, len(clip_ids), signals=config.signals)
        seeds = [BENCHMARK_SEED + clip_id for clip_id in clip_ids]
        histories.begin(range(len(clip_ids)), [clips[index] for index in clip_of_row], seeds)
    true_frames_kept, feedback = isinstance(histories, TrueHistories), workload.true_feedback
    expert = Expert(latents, clip_of_row, context, true_frames=true_frames_kept, feedback=feedback)
    graphs = [FrameGraph(config.dropped_frames) for _ in clip_ids]
    rows = range(len(clip_ids))
    for step in range(steps - 1):
        histories.advance(rows)
        expert.see(histories)
        full = [row for row in rows if histories.history_length(row) > budgets[row]]
        if not full:
            continue
        features = histories.features(full)
        by_name = histories.signals(full) if config.signals else [{}] * len(full)
        signals = [signal_arrays(of_row, config.signals) for of_row in by_name]
        for index, row in enumerate(full):
            graphs[row].observe_frames(features[index, : histories.history_length(row)], step, *signals[index])
        situations = [(graphs[row], budgets[row], steps - step - 1) for row in full]
        scores = None if actor is None else Scores(actor, situations)
        remaining = _evict(recorder, expert, scores, full, graphs, [budgets[row] for row in full], step)
        for index, (row, stays) in enumerate(zip(full, remaining, strict=True)):
            kept = np.flatnonzero(stays).tolist()
            recorder.call(row, step, features[index, : len(stays)], signals[index], stays)
            histories.retain(row, kept)
            graphs[row].keep(kept)
    return recorder.data(budgets, steps, expert.similarity)


def _evict(
    recorder: Recorder,
    expert: Expert,
    scores: Scores | None,
    full: Sequence[int],
    graphs: Sequence[FrameGraph],
    budgets: Sequence[int],
    step: int,
) -> list[np.ndarray]:
    """Drop frames one by one until every history fits; record some of the decisions. Returns masks of the frames that stay."""
    covers = [expert.cover(row, graphs[row].births, step) for row in full]
    remaining = [np.ones(len(graphs[row].births), dtype=bool) for row in full]
    sizes = [np.arange(budget + 1, len(stays) + 1) for budget, stays in zip(budgets, remaining, strict=True)]
    generators = [recorder.generators[row] for row in full]
    recorded = [
        {*choices[:LAST_EVICTIONS].tolist(), *rng.permutation(choices[LAST_EVICTIONS:])[:OTHER_EVICTIONS].tolist()}
        for rng, choices in zip(generators, sizes, strict=True)
    ]
    first_call = len(recorder.calls)
    while any(stays.sum() > budget for stays, budget in zip(remaining, budgets, strict=True)):
        chosen = None if scores is None else scores.lowest(remaining)
        for index, row in enumerate(full):
            stays, rng = remaining[index], generators[index]
            left = np.flatnonzero(stays)
            if len(left) <= budgets[index]:
                continue
            is_recorded = len(left) in recorded[index]
            if is_recorded or chosen is None:
                costs = np.full(len(stays), np.inf)
                costs[left[:-1]] = expert.log_error(row, covers[index].costs_without(left)[:-1])
            if is_recorded:
                recorder.decision(first_call + index, stays.copy(), costs)
            if chosen is not None:
                stays[chosen[index]] = False
            elif rng.random() < EXPLORATION_PROBABILITY:
                stays[rng.choice(left[:-1])] = False
            else:
                stays[costs.argmin()] = False
    return remaining


class Expert:
    """Knows the true rest of the clips, and so what dropping a frame costs.

    Args:
        latents: of whole clips (C, T, C, h, w), each clip once.
        clip: of each row, the index of its clip.
        context: frames that are given.
        true_frames: whether histories consist of true frames. feedback: see `far_env.agents.oracle.Coverage`.
    """

    def __init__(self, latents: Tensor, clip: Sequence[int], context: int, *, true_frames: bool, feedback: bool) -> None:
        self.clip, self.context, self.true_frames, self.feedback = list(clip), context, true_frames, feedback
        self.truth = latents[:, context:]
        self.unit = error_unit(latents, context).tolist()
        between, nearest = nearest_cells(latents, latents)
        self.similarity = frame_similarity(between)[self.clip]
        coming = range(context, latents.shape[1])
        self.previous, self.nearest = (
            torch.stack([of_pairs[:, frame, frame - 1] for frame in coming], dim=1).cpu().numpy()
            for of_pairs in (between, nearest)
        )
        if true_frames:
            self.distances = between[:, context:].transpose(1, 2).cpu().numpy()
        else:
            self.distances = np.zeros((len(clip), latents.shape[1], *self.previous.shape[1:]), dtype=np.float32)
            self.num_seen = 0

    def see(self, histories: Histories) -> None:
        """Compare the newest frame of each row, at first also those before it, with the coming frames."""
        if self.true_frames:
            return
        kept, lengths = histories.history(range(len(self.clip)))
        if self.num_seen:
            kept = torch.stack([history[length - 1 : length] for history, length in zip(kept, lengths, strict=True)])
        found = cell_distances(self.truth[self.clip], kept).transpose(1, 2).cpu().numpy()
        self.distances[:, self.num_seen : self.num_seen + found.shape[1]] = found
        self.num_seen += found.shape[1]

    def cover(self, row: int, births: Sequence[int], step: int) -> Coverage:
        """How well these frames cover what comes after a step."""
        clip = self.clip[row]
        coming = self.distances[clip if self.true_frames else row][list(births), step + 1 :]
        return Coverage(coming, self.previous[clip, step + 1 :], self.nearest[clip, step + 1 :], self.feedback)

    def log_error(self, row: int, costs: np.ndarray) -> np.ndarray:
        """The logarithm of the expected error of a rollout, from a cost of `Coverage`."""
        return log_error(costs, self.unit[self.clip[row]])


def error_unit(latents: Tensor, context: int) -> Tensor:
    """The squared error of all frames after the given ones if each of them were the clip's mean, (C,), above 0.

    Args:
        latents: of whole clips (C, T, C, h, w). context: frames that are given.
    """
    return (latents.flatten(1).var(dim=1) * latents[0, context:].numel()).clamp(min=1e-12)


def log_error(cost: np.ndarray | float, unit: float) -> np.ndarray:
    """The logarithm of the expected error of a rollout, from a cost of `Coverage` and the `error_unit` of the clip."""
    return np.log(np.asarray(cost) / unit + COST_FLOOR)


def frame_similarity(distances: Tensor) -> np.ndarray:
    """How similar every two frames of clips are, float16 (C, T, T), from the distances of their cells (C, T, T, cells)."""
    mean = distances.mean(dim=-1)
    return torch.exp(-mean / mean.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)).half().cpu().numpy()
