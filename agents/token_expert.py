"""Decisions about a token memory for imitation, with what each costs: an expert that knows the true rest of the clip acts.

A compressed frame is taken for the frame with half as many tokens along each axis, the means of 2×2, as a transformer embeds
their mean patches; what it covers is measured with its cells. The cost of a reduction is how much it raises the logarithm of
the expected error of the rollout, per tokens of a whole frame that it frees: the greedy rule for a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from far_env.agents.config import NetworkConfig
from far_env.agents.expert import EXPLORATION_PROBABILITY, error_unit, frame_similarity, log_error
from far_env.agents.expert_data import ExpertData, Recorder
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation import FrameGraph
from far_env.agents.oracle import Coverage
from far_env.agents.token_reductions import REDUCTIONS, Reductions
from far_env.agents.token_scores import choose_reduction, encoded
from far_env.envs.episodes import Reward
from far_env.envs.token_episode import TokenEpisode
from far_env.frame_meta import frame_features
from far_env.host.compressor import SPACING
from far_env.latent_cells import cell_distances, nearest_cells
from far_env.rollout.context import true_units
from far_env.rollout.frame_actions import DROP, compressed_size
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workload import Workload

CALLS_PER_ROLLOUT = 8
"""Calls whose reductions are recorded, of each rollout."""


def compressed_latents(latents: Tensor, patch_size: int) -> Tensor:
    """Latents (…, C, h / 2, w / 2) whose patches are the means of the patches of 2×2 tokens of latents (…, C, h, w)."""
    rows, columns = (side // (SPACING * patch_size) for side in latents.shape[-2:])
    tokens = latents.unflatten(-2, (rows, SPACING, patch_size)).unflatten(-1, (columns, SPACING, patch_size))
    return tokens.mean(dim=(-5, -2)).flatten(-4, -3).flatten(-2)


class TokenMemory(Protocol):
    """What decisions are collected on, the part of `far_env.envs.token_episode.TokenEpisode` that collecting uses."""

    budget: int

    @property
    def ended(self) -> bool:
        """Whether all frames are there."""

    @property
    def newest(self) -> int:
        """Number of the newest frame."""

    def run(self) -> None:
        """Let frames enter until there are more tokens than the budget, or to the end."""

    def frames(self) -> list[int]:
        """Numbers of the frames in the memory."""

    def sizes(self) -> list[int]:
        """Tokens of each."""

    def latents(self) -> Tensor:
        """Latents of each (n, C, h, w)."""

    def features(self) -> np.ndarray:
        """`frame_features` of them (n, 4)."""

    def retain(self, action: np.ndarray) -> int:
        """Apply DROP, COMPRESS or KEEP of each slot, right-aligned."""


class TrueTokenMemory:
    """A `TokenMemory` of the true frames of a clip, in place of generated ones: no host runs.

    Args:
        latents: of the whole clip (T, C, h, w).
        full: tokens of a frame.
        budget: tokens.
    """

    def __init__(self, latents: Tensor, full: int, budget: int) -> None:
        self.true, self.full, self.budget = latents, full, budget
        self.newest = -1
        self._sizes: dict[int, int] = {}

    @property
    def ended(self) -> bool:
        """Whether all frames but the last, which nothing follows, have entered, and fit."""
        return self.newest >= len(self.true) - 2 and sum(self._sizes.values()) <= self.budget

    def run(self) -> None:
        """Let frames enter until there are more tokens than the budget, or to the end."""
        while not self.ended and sum(self._sizes.values()) <= self.budget:
            self.newest += 1
            self._sizes[self.newest] = self.full

    def frames(self) -> list[int]:
        """Numbers of the frames in the memory."""
        return list(self._sizes)

    def sizes(self) -> list[int]:
        """Tokens of each."""
        return list(self._sizes.values())

    def latents(self) -> Tensor:
        """Latents of each (n, C, h, w)."""
        return self.true[self.frames()]

    def features(self) -> np.ndarray:
        """`frame_features` of them (n, 4)."""
        return frame_features(self.latents()[None])[0].cpu().numpy()

    def retain(self, action: np.ndarray) -> int:
        """Apply DROP, COMPRESS or KEEP of each slot, right-aligned."""
        small, frames = compressed_size(self.full), self.frames()
        for number, size, chosen in zip(frames, self.sizes(), action[len(action) - len(frames) :].tolist(), strict=True):
            self._sizes[number] = (0, min(size, small), size)[chosen]
        self._sizes = {number: size for number, size in self._sizes.items() if size}
        return 0


class TokenExpert:
    """Knows the true rest of a clip, and so what dropping and compressing a frame costs.

    Args:
        latents: of the whole clip (T, C, h, w). context: frames that are given. patch_size: of the host's tokens.
        feedback: see `far_env.agents.oracle.Coverage`.
    """

    def __init__(self, latents: Tensor, context: int, patch_size: int, *, feedback: bool) -> None:
        self.true, self.context, self.patch_size, self.feedback = latents, context, patch_size, feedback
        coming = latents[context:]
        self.unit = float(error_unit(latents[None], context))
        between, nearest = nearest_cells(coming[:, None], latents[context - 1 : -1][:, None])
        self.previous, self.nearest = between[:, 0, 0].cpu().numpy(), nearest[:, 0, 0].cpu().numpy()
        self.whole: dict[int, np.ndarray] = {}
        self.small: dict[int, np.ndarray] = {}
        self._see(list(range(context)), latents[:context])

    def see(self, number: int, latent: Tensor) -> None:
        """Compare a frame (C, h, w) of this number, unless it was compared before, with the coming frames."""
        if number not in self.whole:
            self._see([number], latent[None])

    def _see(self, numbers: list[int], latents: Tensor) -> None:
        coming = self.true[None, self.context :]
        for held, versions in ((self.whole, latents), (self.small, compressed_latents(latents, self.patch_size))):
            found = cell_distances(coming, versions[None])[0].transpose(0, 1).cpu().numpy()
            held.update(zip(numbers, found, strict=True))

    def costs(self, numbers: Sequence[int], reductions: Reductions) -> np.ndarray:
        """What each reduction of the frames of these numbers costs, float64 (n, 2); infinite where it is not allowed.

        Given frames that have not entered yet are taken to stay.
        """
        newest, present = numbers[-1], np.flatnonzero(reductions.sizes)
        start = max(0, newest + 1 - self.context)
        compressed = reductions.sizes[present] < reductions.full
        kept = [(self.small if small else self.whole)[numbers[i]] for i, small in zip(present, compressed, strict=True)]
        to_come = [self.whole[number] for number in range(newest + 1, self.context)]
        instead = [self.small[numbers[i]] for i in present]
        rows = np.stack([*kept, *to_come, *instead, *to_come])[:, start:]
        cover = Coverage(rows, self.previous[start:], self.nearest[start:], self.feedback)
        count = len(kept) + len(to_come)
        now = log_error(cover.cost(range(count)), self.unit)
        after = np.stack(
            [cover.costs_without(range(count)), cover.costs_without(range(count), range(count, 2 * count))], axis=-1
        )[: len(kept)]
        costs = np.full((len(numbers), len(REDUCTIONS)), np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            costs[present] = (log_error(after, self.unit) - now) * reductions.full / reductions.freed()[present]
        return np.where(reductions.allowed(), costs, np.inf)


@torch.no_grad()
def play_tokens_with_expert(
    workload: Workload,
    clip_ids: Sequence[int],
    budgets: Sequence[int],
    actor: RetentionNetwork | None,
    config: NetworkConfig,
    use_true_frames: bool,
    recorder: Recorder,
) -> ExpertData:
    """Decisions about some clips, one after the other; see `far_env.agents.collection.collect`."""
    full, patch_size = workload.host.tokens_per_frame, workload.host.transformer.patch_size
    similarity = {}
    for row, (clip_id, budget) in enumerate(zip(clip_ids, budgets, strict=True)):
        latents = true_units(workload, [workload.clips.clip("train", clip_id)])[0].float()
        expert = TokenExpert(latents, workload.num_context, patch_size, feedback=workload.true_feedback)
        if clip_id not in similarity:
            similarity[clip_id] = frame_similarity(cell_distances(latents[None], latents[None]))[0]
        memory: TokenMemory
        if use_true_frames:
            memory = TrueTokenMemory(latents, full, budget)
        else:
            memory = TokenEpisode(workload, [budget], Reward.make("psnr", False))
            memory.begin("train", clip_id, BENCHMARK_SEED + clip_id, budget)
        _play(memory, expert, actor, config, full, workload, recorder, row)
    frames = [budget / full for budget in budgets]
    return recorder.data(frames, workload.num_predict, np.stack([similarity[clip_id] for clip_id in clip_ids]))


def _play(
    memory: TokenMemory,
    expert: TokenExpert,
    actor: RetentionNetwork | None,
    config: NetworkConfig,
    full: int,
    workload: Workload,
    recorder: Recorder,
    row: int,
) -> None:
    """One clip to its end; every decision is recorded."""
    graph, rng = FrameGraph(config.dropped_frames), recorder.generators[row]
    while True:
        memory.run()
        if memory.ended:
            return
        numbers, features, step = memory.frames(), memory.features(), memory.newest - workload.num_context
        for number, latent in zip(numbers, memory.latents(), strict=True):
            expert.see(number, latent)
        graph.observe_frames(features, step)
        reductions = Reductions(memory.sizes(), full, memory.budget)
        inputs = None
        if actor is not None:
            inputs = encoded(actor, graph, memory.budget / full, workload.num_predict - step - 1)
        while not reductions.done:
            costs = expert.costs(numbers, reductions)
            recorder.decision(len(recorder.calls), reductions.shares, costs)
            if inputs is not None:
                chosen = choose_reduction(actor, inputs, graph, reductions)
            elif rng.random() < EXPLORATION_PROBABILITY:
                chosen = rng.choice(np.argwhere(reductions.allowed()))
            else:
                chosen = np.unravel_index(costs.argmin(), costs.shape)
            reductions.reduce(int(chosen[0]), REDUCTIONS[int(chosen[1])])
        actions = reductions.actions()
        kept = np.array(actions) != DROP
        recorder.call(row, step, features, ([], []), kept)
        slots = getattr(memory, "num_slots", len(actions))
        memory.retain(np.concatenate([np.full(slots - len(actions), DROP), actions]))
        graph.keep(np.flatnonzero(kept).tolist())
