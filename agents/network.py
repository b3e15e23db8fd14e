"""The scorer: a small set transformer over the rows of the FrameMeta matrix, one logit per history frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.agents import observation_spec
from far_env.agents.config import NetworkConfig
from far_env.agents.surroundings import (
    NUM_EDGES,
    NUM_PATH_EDGES,
    NUM_PATH_ROWS,
    NUM_PLACE_EDGES,
    NUM_PLACE_ROWS,
    NUM_ROWS,
    compare,
)
from far_env.envs.episodes import ROW_FEATURES

EDGE_WIDTH = 8
_MASKED = -1e9


def network_inputs(frames: Tensor, budget: Tensor) -> Tensor:
    """Observations to network inputs (B, N, columns + 4): counts are made independent of the number of slots N.

    Per row log(1 + age) / 3, the other features unchanged, then whether it is the newest, log(1 + budget) / 3, the step as a
    share of the rollout, log(1 + frames) / 3, and the columns of memory.

    Args:
        frames: observation["frames"] (B, N, 6), or with the columns of `HistoryMemory.recall` appended.
        budget: observation["budget"] (B, 3).
    """
    slots = frames.shape[1]
    age = frames[..., :1] * slots
    newest = torch.zeros_like(age)
    newest[:, -1] = 1
    counts = torch.log1p(budget[:, [0, 2]] * slots) / 3
    shared = torch.stack([counts[:, 0], budget[:, 1], counts[:, 1]], dim=-1)[:, None].expand(-1, slots, -1)
    features, remembered = frames[..., 1 : len(ROW_FEATURES)], frames[..., len(ROW_FEATURES) :]
    return torch.cat([torch.log1p(age) / 3, features, newest, shared, remembered], dim=-1)


class SetBlock(nn.Module):
    """Pre-norm attention across the rows, unless left out, then a two-layer perceptron in each row.

    Edges, features of pairs of rows, add to the attention scores, and their attention-weighted mean is appended to the values'.
    """

    def __init__(self, width: int, num_heads: int, attention: bool, edge_width: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        if attention:
            self.norm1 = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width + num_heads * edge_width, width)
            self.edge_scores = nn.Linear(edge_width, num_heads) if edge_width else None
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, bias: Tensor, edges: Tensor | None = None) -> Tensor:
        """x (B, N, width); bias (B, 1, 1, N) is very negative on padding; edges (B, N, N, edge_width)."""
        if self.attention:
            query, key, value = (
                part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
            )
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
            if edges is None:
                mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
            else:
                weights = (scores + self.edge_scores(edges).movedim(-1, 1)).softmax(dim=-1)
                mixed_edges = (weights.transpose(1, 2) @ edges).flatten(2)
                mixed = torch.cat([(weights @ value).transpose(1, 2).flatten(2), mixed_edges], dim=-1)
            x = x + self.out(mixed)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class RetentionNetwork(nn.Module):
    """Logits over history frames; frames with a positive one should stay. The order of the rows has no effect.

    Args:
        width, num_layers, num_heads: size of the set transformer; the defaults make 67k weights.
        memory: rows also carry true ages and features at birth, from a `HistoryMemory`.
        attention: rows attend to each other. Without it each is scored alone: by a perceptron, or with no layers by a
            (normalised) linear rule. These are for comparison.
        surroundings: with memory, rows also carry how frames changed around them, and are compared by it.
        places: with surroundings, rows also carry which of them show the same place.
        path: with surroundings, rows also carry how far apart they are along the camera's path.
        signals: names of `far_env.contract.SIGNALS`; their columns (`far_env.agents.observation_spec.columns`) come last.
        sequential_eviction: where several frames have to go, drop the one with the lowest logit, score the rest again,
            and so on (`far_env.agents.policies.choose`), so that one of several near-duplicates can stay.

    Attributes:
        spec: the contents of the scorer's observations.

    Raises:
        ValueError: if the heads do not share the width evenly, on an invalid observation spec, or on
            sequential_eviction with signals.
    """

    def __init__(
        self,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        memory: bool = False,
        attention: bool = True,
        surroundings: bool = False,
        signals: Sequence[str] = (),
        sequential_eviction: bool = False,
        places: bool = False,
        path: bool = False,
    ) -> None:
        super().__init__()
        if sequential_eviction and signals:
            raise ValueError("sequential_eviction is for scorers without signals")
        self.num_heads, self.sequential_eviction = num_heads, sequential_eviction
        self.spec = observation_spec.ObservationSpec(memory, surroundings, tuple(signals), places, path)
        if width % num_heads:
            raise ValueError(f"width {width} must be a multiple of num_heads {num_heads}")
        inputs, edges = self.spec.num_row_columns + 4, 0
        if surroundings:
            inputs += NUM_ROWS + NUM_PLACE_ROWS * places + NUM_PATH_ROWS * path
            edges += NUM_EDGES + NUM_PLACE_EDGES * places + NUM_PATH_EDGES * path
        if signals:
            inputs, edges = inputs + observation_spec.num_row_inputs(signals), edges + observation_spec.num_edges(signals)
        self.embed = nn.Linear(inputs, width)
        self.embed_edges, edge_width = None, 0
        if attention and edges:
            edge_width = EDGE_WIDTH
            self.embed_edges = nn.Sequential(nn.Linear(edges, 2 * EDGE_WIDTH), nn.ReLU(), nn.Linear(2 * EDGE_WIDTH, EDGE_WIDTH))
        self.blocks = nn.ModuleList(SetBlock(width, num_heads, attention, edge_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        # Start close to uniform over sets that fill the budget: small scores, all positive.
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.constant_(self.head.bias, 1.0)

    def forward(self, frames: Tensor, mask: Tensor, budget: Tensor) -> Tensor:
        """Observation parts, batched (see `far_env.envs.retention_env.FrameRetentionEnv`), to logits (B, N)."""
        return self.head(self.encode(frames, mask, budget)).squeeze(-1)

    def encode(self, frames: Tensor, mask: Tensor, budget: Tensor) -> Tensor:
        """Row representations (B, N, width)."""
        bias = ((1 - mask) * _MASKED)[:, None, None, :]
        num_columns = self.spec.num_row_columns
        inputs, extra_inputs = network_inputs(frames[..., :num_columns], budget), []
        if self.spec.surroundings:
            extra_inputs.append(compare(torch, frames[..., len(ROW_FEATURES) : num_columns]))
        if self.spec.signals:
            extra_inputs.append(observation_spec.rows_and_edges(frames[..., num_columns:], mask, self.spec.signals))
        x = self.embed(torch.cat([inputs, *(rows for rows, _ in extra_inputs)], dim=-1))
        edges = None if self.embed_edges is None else self.embed_edges(torch.cat([edges for _, edges in extra_inputs], dim=-1))
        for block in self.blocks:
            x = block(x, bias, edges)
        return self.norm(x)


class ValueNetwork(nn.Module):
    """The critic: the same trunk, the mean over rows, one number."""

    def __init__(self, width: int = 64, **size: int) -> None:
        super().__init__()
        self.trunk = RetentionNetwork(width, **size)
        self.trunk.head = nn.Identity()

    def forward(self, frames: Tensor, mask: Tensor, budget: Tensor) -> Tensor:
        """Observation parts to pooled features (B, width)."""
        rows = self.trunk.encode(frames, mask, budget) * mask[..., None]
        return rows.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def network_with_weights(config: NetworkConfig, weights: Mapping[str, Tensor]) -> RetentionNetwork:
    """A scorer with these weights, in eval mode."""
    network = RetentionNetwork(**asdict(config))
    network.load_state_dict(weights)
    return network.eval()
