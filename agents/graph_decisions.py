"""Collected decisions as batches of network inputs: the calls of `ExpertData`, replayed into frame graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from far_env.agents.config import NetworkConfig
from far_env.agents.expert_data import ExpertData
from far_env.agents.graph_batches import PAIR_ARRAYS, network_inputs, stacked
from far_env.agents.observation import FrameGraph

BATCHES_SORTED_TOGETHER = 16
"""Batches among which decisions are sorted by the number of their nodes, so that little is padded."""


@dataclass(frozen=True)
class Decisions:
    """A batch of single evictions; N nodes, padded.

    Attributes:
        nodes, edges, mask: as `far_env.agents.network.RetentionNetwork.encode` takes them.
        remaining: bool (B, N), frames of the history that were not dropped yet.
        costs: float32 (B, N), as in `ExpertData`; infinite at nodes that cannot be dropped.
        similarity: float32 (B, N, N), of the true frames with the nodes' numbers, see `ExpertData`.
    """

    nodes: Tensor
    edges: Tensor
    mask: Tensor
    remaining: Tensor
    costs: Tensor
    similarity: Tensor


class GraphDecisions:
    """The decisions of one workload, with the arrays of a frame graph at every call that has one.

    Measurements of pairs are in half precision, to save memory.
    """

    def __init__(self, data: ExpertData, config: NetworkConfig) -> None:
        self.data, self.config = data, config
        self.arrays: dict[int, dict] = {}
        self.numbers: dict[int, np.ndarray] = {}
        decided = set(data.call.tolist())
        rollouts, steps, lengths = data.rollout.tolist(), data.step.tolist(), data.length.tolist()
        features, kept, total_steps = data.features.numpy(), data.kept.numpy(), int(data.total_steps[0])
        frame_signals, pair_signals = data.frame_signals.numpy(), data.pair_signals.numpy()
        graph = FrameGraph()
        for call, (rollout, step, length) in enumerate(zip(rollouts, steps, lengths, strict=True)):
            if not call or rollout != rollouts[call - 1]:
                graph = FrameGraph(config.dropped_frames)
            of_frames = [frame_signals[call, :length, i] for i in range(frame_signals.shape[2])]
            of_pairs = [pair_signals[call, :length, :length, i] for i in range(pair_signals.shape[3])]
            graph.observe_frames(features[call, :length], step, of_frames, of_pairs)
            if call in decided:
                arrays = graph.arrays(total_steps - step - 1, int(data.max_frames[rollout]))
                self.arrays[call] = {name: _compact(values, name in PAIR_ARRAYS) for name, values in arrays.items()}
                self.numbers[call] = graph.numbers.copy()
            graph.keep(np.flatnonzero(kept[call]).tolist())
        self.sizes = np.array([len(self.numbers[call]) for call in data.call.tolist()])

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: np.ndarray) -> Decisions:
        """The decisions with these indices."""
        calls = self.data.call[indices].tolist()
        batch, mask = stacked([self.arrays[call] for call in calls])
        batch = {name: values.astype(np.float32) if values.dtype == np.float16 else values for name, values in batch.items()}
        count, size = mask.shape
        remaining = np.zeros((count, size), dtype=bool)
        costs = np.full((count, size), np.inf, dtype=np.float32)
        similarity = np.zeros((count, size, size), dtype=np.float32)
        for row, (index, call) in enumerate(zip(indices.tolist(), calls, strict=True)):
            rows, numbers = np.flatnonzero(self.arrays[call]["in_history"]), self.numbers[call]
            remaining[row, rows] = self.data.remaining[index, : len(rows)].numpy()
            costs[row, rows] = self.data.costs[index, : len(rows)].numpy()
            of_clip = self.data.similarity[self.data.rollout[call]].numpy()
            similarity[row, : len(numbers), : len(numbers)] = of_clip[np.ix_(numbers, numbers)]
        inputs = network_inputs(batch, mask, self.config)
        return Decisions(*inputs, *map(torch.from_numpy, (remaining, costs, similarity)))


def shuffled_batches(
    parts: Sequence[GraphDecisions], batch_size: int, rng: np.random.Generator
) -> Iterator[tuple[GraphDecisions, np.ndarray]]:
    """Every decision once, in batches of one workload and of similar numbers of nodes, in a random order."""
    batches = []
    for part in parts:
        order = rng.permutation(len(part))
        for first in range(0, len(order), batch_size * BATCHES_SORTED_TOGETHER):
            together = order[first : first + batch_size * BATCHES_SORTED_TOGETHER]
            together = together[np.argsort(part.sizes[together], kind="stable")]
            batches += [(part, together[start : start + batch_size]) for start in range(0, len(together), batch_size)]
    for index in rng.permutation(len(batches)):
        yield batches[index]


def _compact(values: np.ndarray, of_pairs: bool) -> np.ndarray:
    """A copy, in half precision where it has numbers of pairs."""
    return values.astype(np.float16) if of_pairs and values.dtype == np.float32 else values.copy()
