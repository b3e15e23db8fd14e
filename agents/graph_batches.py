"""Frame graphs of several histories as one batch of tensors, and the scores of a network for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.agents.config import NetworkConfig
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation import FrameGraph, graph_inputs

PAIR_ARRAYS = ("pairs", "known", "pair_signals")
SHARED_ARRAYS = ("scale", "situation")


def stacked(graphs: Sequence[dict], size: int | None = None) -> tuple[dict, np.ndarray]:
    """Arrays of `FrameGraph.arrays`, padded at the end to ``size`` nodes, by default as many as the largest has.

    Returns:
        The arrays by name, and a bool mask (B, N), false on padding.
    """
    size = max(len(graph["ages"]) for graph in graphs) if size is None else size
    batch = {}
    for name in graphs[0]:
        axes = _node_axes(name)
        if not axes:
            batch[name] = np.stack([graph[name] for graph in graphs])
            continue
        first = graphs[0][name]
        batch[name] = np.zeros((len(graphs), *(size,) * axes, *first.shape[axes:]), dtype=first.dtype)
        for row, graph in enumerate(graphs):
            count = len(graph["ages"])
            batch[name][(row, *(slice(count),) * axes)] = graph[name]
    mask = np.arange(size) < np.array([len(graph["ages"]) for graph in graphs])[:, None]
    return batch, mask


def trimmed(batch: dict, size: int) -> dict:
    """Batched arrays of `FrameGraph.arrays` with their first ``size`` nodes alone."""
    return {name: values[(slice(None), *(slice(size),) * _node_axes(name))] for name, values in batch.items()}


def _node_axes(name: str) -> int:
    """How many axes of an array of `FrameGraph.arrays` are nodes."""
    return 0 if name in SHARED_ARRAYS else 2 if name in PAIR_ARRAYS else 1


def network_inputs(batch: dict, mask: np.ndarray, config: NetworkConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, edges and mask, as `RetentionNetwork.encode` takes them."""
    nodes, edges = graph_inputs(batch if config.scaled else {**batch, "scale": np.ones_like(batch["scale"])})
    return torch.from_numpy(nodes), torch.from_numpy(edges), torch.from_numpy(mask)


class Scores:
    """A network's scores of the frames of several histories, of which frames are dropped one after the other.

    Args:
        situations: of each history its graph, the budget and the frames to come.
    """

    def __init__(self, network: RetentionNetwork, situations: Sequence[tuple[FrameGraph, int, int]]) -> None:
        self.network = network
        self.rows = [graph.rows() for graph, _, _ in situations]
        batch, mask = stacked([graph.arrays(steps_left, budget) for graph, budget, steps_left in situations])
        self.size = mask.shape[1]
        self.encoded = network.encode(*network_inputs(batch, mask, network.config))

    def lowest(self, remaining: Sequence[np.ndarray]) -> list[int]:
        """Of each history, the position of the frame with the lowest score among those that remain, the newest aside."""
        masks = np.zeros((len(self.rows), self.size), dtype=bool)
        for mask, rows, stays in zip(masks, self.rows, remaining, strict=True):
            mask[rows[stays]] = True
        scores = self.network.score(*self.encoded, torch.from_numpy(masks)).numpy()
        chosen = []
        for values, rows, stays in zip(scores, self.rows, remaining, strict=True):
            left = np.flatnonzero(stays)[:-1]
            chosen.append(int(left[values[rows[left]].argmin()]) if len(left) else 0)
        return chosen
