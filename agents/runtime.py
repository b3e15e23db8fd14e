"""A trained scorer as it acts: the network of `far_env.agents.network` in NumPy, and the decision which frames stay.

Evaluation uses this module, and exported files contain its source, so it needs NumPy alone.
"""

from __future__ import annotations

import numpy as np

from far_env.agents.observation import FrameGraph, graph_inputs


class GraphScorer:
    """Decides which frames of one clip stay.

    Args:
        weights: of `far_env.agents.network.RetentionNetwork`, by name.
        num_heads, num_layers, edges, edge_updates, dropped_frames, scaled: of `far_env.agents.config.NetworkConfig`.
    """

    def __init__(
        self,
        weights: dict,
        num_heads: int,
        num_layers: int,
        edges: bool = True,
        edge_updates: bool = True,
        dropped_frames: bool = True,
        scaled: bool = True,
    ) -> None:
        # Linear layers multiply from the right.
        self.weights = {name: np.ascontiguousarray(np.asarray(value, dtype=np.float32).T) for name, value in weights.items()}
        self.num_heads, self.num_layers = num_heads, num_layers
        self.edges, self.edge_updates, self.scaled = edges, edge_updates, scaled
        self.graph = FrameGraph(dropped_frames)

    def __deepcopy__(self, memo: dict) -> object:
        """A scorer with the same weights, which never change, and a copy of the graph."""
        from copy import deepcopy

        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.graph = deepcopy(self.graph, memo)
        return copied

    def choose(self, features: np.ndarray, step: int, total_steps: int, max_frames: int, signals: tuple = ((), ())) -> list:
        """The positions of the frames that stay, ascending: the newest and others up to the budget.

        The frame with the lowest score is dropped, the rest are scored again, and so on.

        Args:
            features: (n, 4), boundary_score, feature_drift, temporal_similarity and motion_strength of the kept frames,
                oldest first.
            step, total_steps: the benchmark's.
            max_frames: the budget.
            signals: of `far_env.agents.observation.signal_arrays`.
        """
        self.graph.observe_frames(features, step, *signals)
        left = np.arange(len(features))
        if len(left) > max_frames:
            nodes, edges = self.encode(*self.inputs(total_steps - step - 1, max_frames))
            while len(left) > max(max_frames, 1):
                left = np.delete(left, self.scores(nodes, edges, left)[:-1].argmin())
        kept = left.tolist()
        self.graph.keep(kept)
        return kept

    def inputs(self, steps_left: int, max_frames: int) -> tuple:
        """The network's inputs, see `far_env.agents.observation.graph_inputs`."""
        arrays = self.graph.arrays(steps_left, max_frames)
        if not self.scaled:
            arrays["scale"] = np.ones_like(arrays["scale"])
        return graph_inputs(arrays)

    def encode(self, nodes: np.ndarray, edges: np.ndarray) -> tuple:
        """Representations of the frames in the history (n, width) and of pairs of them (n, n, edge_width)."""
        x = self.linear("embed_nodes", nodes)
        edges = edges if self.edges else np.zeros_like(edges)
        e = self.linear("embed_edges.2", np.maximum(self.linear("embed_edges.0", edges), 0))
        rows = self.graph.rows()
        for layer in range(self.num_layers):
            # The last layer is computed for the frames in the history alone.
            seeing = rows if layer == self.num_layers - 1 else np.arange(len(x))
            e = self.edge_update(f"edge_updates.{layer}.", e, x, seeing) if self.edges else e[seeing]
            x = self.node_update(f"node_updates.{layer}.", x, e, seeing)
        return x, e[:, rows]

    def scores(self, x: np.ndarray, e: np.ndarray, left: np.ndarray) -> np.ndarray:
        """Scores of the frames that are left, from the representations of all in the history."""
        count = np.full((1, 1), np.log1p(len(left)) / 3, dtype=np.float32)
        x = x[left] + self.linear("embed_remaining", count)
        x = self.node_update("decide.", x, e[left[:, None], left], np.arange(len(left)))
        return self.linear("head", self.norm("norm", x))[:, 0]

    def edge_update(self, name: str, e: np.ndarray, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`far_env.agents.network.EdgeUpdate` of the edges (rows, N, c) from these nodes."""
        if self.edge_updates:
            values, gates = np.split(self.linear(name + "factors", self.norm(name + "norm1", e)), 2, axis=-1)
            first, second = np.split((values / (1 + np.exp(-gates))).transpose(2, 0, 1), 2)
            product = (first[:, rows] @ np.ascontiguousarray(second)).transpose(1, 2, 0) / np.float32(len(e) ** 0.5)
            e = e[rows] + self.linear(name + "product_out", self.norm(name + "product_norm", product))
        else:
            e = e[rows]
        one, other = np.split(self.linear(name + "of_nodes", x), 2, axis=-1)
        hidden = self.linear(name + "up", self.norm(name + "norm2", e)) + one[rows, None] + other
        return e + self.linear(name + "down", np.maximum(hidden, 0))

    def node_update(self, name: str, x: np.ndarray, e: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """`far_env.agents.network.NodeUpdate` of these nodes, with the edges (rows, N, c) from them: (rows, width)."""
        count, width = len(rows), x.shape[1]
        heads = self.num_heads
        qkv = self.linear(name + "qkv", self.norm(name + "norm1", x)).reshape(len(x), 3, heads, width // heads)
        query, key, value = qkv.transpose(1, 2, 0, 3)
        scores = query[:, rows] @ key.transpose(0, 2, 1) / np.float32((width // heads) ** 0.5)
        scores = scores + self.linear(name + "edge_scores", e).transpose(2, 0, 1)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = scores / scores.sum(axis=-1, keepdims=True)
        mixed = (weights @ value).transpose(1, 0, 2).reshape(count, width)
        mixed_edges = (weights.transpose(1, 0, 2) @ e).reshape(count, -1)
        x = x[rows] + self.linear(name + "out", np.concatenate([mixed, mixed_edges], axis=1))
        return x + self.linear(name + "down", np.maximum(self.linear(name + "up", self.norm(name + "norm2", x)), 0))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """A linear layer."""
        return x @ self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """A layer normalisation."""
        # A product with a vector of ones is faster than a mean over few entries.
        average = np.full((x.shape[-1], 1), 1 / x.shape[-1], dtype=np.float32)
        centred = x - x @ average
        return (
            centred / np.sqrt((centred * centred) @ average + np.float32(1e-5)) * self.weights[name + ".weight"]
            + self.weights[name + ".bias"]
        )
