"""The scorer: an edge-conditioned set transformer over the frames that a policy has seen; it says which frame to drop next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.agents.config import TOKENS, NetworkConfig
from far_env.agents.observation import FrameGraph
from far_env.contract import OF_PAIRS

MASKED = -1e9


class EdgeUpdate(nn.Module):
    """Edges see products over third nodes, and their two nodes.

    The products are those of AlphaFold's triangle update (Jumper et al. 2021, supplement, algorithm 11).
    """

    def __init__(self, width: int, edge_width: int, products: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(edge_width)
        self.factors = nn.Linear(edge_width, 2 * edge_width) if products else None
        if products:
            self.product_norm = nn.LayerNorm(edge_width // 2)
            self.product_out = nn.Linear(edge_width // 2, edge_width)
        self.norm2 = nn.LayerNorm(edge_width)
        self.of_nodes = nn.Linear(width, 4 * edge_width)
        self.up = nn.Linear(edge_width, 2 * edge_width)
        self.down = nn.Linear(2 * edge_width, edge_width)

    def forward(self, edges: Tensor, nodes: Tensor, both: Tensor, share: Tensor) -> Tensor:
        """edges (B, N, N, c), nodes (B, N, width), both (B, N, N, 1) 1 where neither is padding, share (B, 1, 1, 1) 1 / √N."""
        if self.factors is not None:
            values, gates = self.factors(self.norm1(edges)).chunk(2, dim=-1)
            first, second = ((values * gates.sigmoid()) * both).permute(0, 3, 1, 2).chunk(2, dim=1)
            product = (first @ second).permute(0, 2, 3, 1) * share
            edges = edges + self.product_out(self.product_norm(product))
        one, other = self.of_nodes(nodes).chunk(2, dim=-1)
        hidden = self.up(self.norm2(edges)) + one[:, :, None] + other[:, None]
        return edges + self.down(F.relu(hidden))


class NodeUpdate(nn.Module):
    """Attention between nodes, with edges in the scores and in the values, then a two-layer perceptron in each node."""

    def __init__(self, width: int, edge_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.edge_scores = nn.Linear(edge_width, num_heads)
        self.out = nn.Linear(width + num_heads * edge_width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, nodes: Tensor, edges: Tensor, bias: Tensor) -> Tensor:
        """nodes (B, N, width), edges (B, N, N, c), bias (B, 1, 1, N), very negative at nodes that are not to be seen."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(nodes)).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + self.edge_scores(edges).movedim(-1, 1)
        weights = (scores + bias).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        mixed_edges = (weights.transpose(1, 2) @ edges).flatten(2)
        nodes = nodes + self.out(torch.cat([mixed, mixed_edges], dim=-1))
        return nodes + self.down(F.relu(self.up(self.norm2(nodes))))


class RetentionNetwork(nn.Module):
    """Scores of the frames of a history: the one with the lowest is dropped next.

    Args:
        config: sizes and inputs.
    """

    def __init__(self, config: NetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or NetworkConfig()
        width, edge_width, num_heads, signals = config.width, config.edge_width, config.num_heads, config.signals
        num_pair_signals = sum(name in OF_PAIRS for name in signals)
        self.embed_nodes = nn.Linear(FrameGraph.NODE_INPUTS + 2 * (len(signals) - num_pair_signals), width)
        self.embed_edges = nn.Sequential(
            nn.Linear(FrameGraph.EDGE_INPUTS + 2 * num_pair_signals, 2 * edge_width),
            nn.ReLU(),
            nn.Linear(2 * edge_width, edge_width),
        )
        self.edge_updates = nn.ModuleList(EdgeUpdate(width, edge_width, config.edge_updates) for _ in range(config.num_layers))
        self.node_updates = nn.ModuleList(NodeUpdate(width, edge_width, num_heads) for _ in range(config.num_layers))
        self.embed_remaining = nn.Linear(1, width)
        self.decide = NodeUpdate(width, edge_width, num_heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        self.similarity = nn.Linear(edge_width, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor, remaining: Tensor) -> Tensor:
        """Scores (B, N) of the frames that remain; very negative numbers elsewhere have no meaning.

        Args:
            nodes, edges: of `far_env.agents.observation.graph_inputs`, batched and padded.
            mask: bool (B, N), false on padding.
            remaining: (B, N), above 0 at frames of the history that were not dropped yet.
        """
        return self.score(*self.encode(nodes, edges, mask), remaining)

    def encode(self, nodes: Tensor, edges: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Representations of nodes (B, N, width) and edges (B, N, N, edge_width)."""
        both = (mask[:, :, None] & mask[:, None]).float()[..., None]
        share = mask.sum(dim=1).clamp(min=1).float().rsqrt()[:, None, None, None]
        bias = (~mask * MASKED)[:, None, None]
        x = self.embed_nodes(nodes)
        e = self.embed_edges(edges if self.config.edges else torch.zeros_like(edges))
        for edge_update, node_update in zip(self.edge_updates, self.node_updates, strict=True):
            if self.config.edges:
                e = edge_update(e, x, both, share)
            x = node_update(x, e, bias)
        return x, e

    def score(self, x: Tensor, e: Tensor, remaining: Tensor) -> Tensor:
        """Scores (B, N) from representations; see `forward`."""
        return self.head(self.decision(x, e, remaining))[..., 0]

    def decision(self, x: Tensor, e: Tensor, remaining: Tensor) -> Tensor:
        """What the scores are read from: nodes (B, N, width) that have seen the remaining ones."""
        count = torch.log1p(remaining.sum(dim=1).float())[:, None, None] / 3
        return self.norm(self.decide(x + self.embed_remaining(count), e, ((remaining == 0) * MASKED)[:, None, None]))


class TokenRetentionNetwork(RetentionNetwork):
    """Scores of the frames of a token memory (B, N, 2): of the lowest ones, one is dropped or compressed next.

    ``remaining`` is the share of its tokens that a frame has: 0 dropped, 1 whole. The first score is that of dropping.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.width, 2)
        self.embed_share = nn.Linear(1, config.width)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def score(self, x: Tensor, e: Tensor, remaining: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.decision(x, e, remaining))

    def decision(self, x: Tensor, e: Tensor, remaining: Tensor) -> Tensor:
        """As of `RetentionNetwork`; nodes know the share of their tokens too."""
        return super().decision(x + self.embed_share(remaining.float()[..., None]), e, remaining)


class ValueNetwork(nn.Module):
    """The critic: the same trunk, the mean over the remaining frames."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.trunk = make_network(config)
        self.trunk.head = nn.Identity()

    def forward(self, nodes: Tensor, edges: Tensor, mask: Tensor, remaining: Tensor) -> Tensor:
        """Pooled features (B, width)."""
        present = remaining > 0
        rows = self.trunk.decision(*self.trunk.encode(nodes, edges, mask), remaining) * present[..., None]
        return rows.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)


def make_network(config: NetworkConfig) -> RetentionNetwork:
    """A new scorer for the configured memory."""
    return TokenRetentionNetwork(config) if config.memory == TOKENS else RetentionNetwork(config)


def deeper(network: RetentionNetwork, num_layers: int) -> RetentionNetwork:
    """A network with more layers that scores as this one does to the last bit: what further layers add to their inputs is 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        larger = make_network(replace(network.config, num_layers=num_layers))
    larger.load_state_dict(network.state_dict(), strict=False)
    first = network.config.num_layers
    for edge_update, node_update in zip(larger.edge_updates[first:], larger.node_updates[first:], strict=True):
        products = () if edge_update.factors is None else (edge_update.product_out,)
        for layer in (*products, edge_update.down, node_update.out, node_update.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return larger


UNLIKELY = 4.0
"""How much higher than of dropping a frame the score of compressing it is, where a scorer of frames begins to learn it."""


def token_weights(network: RetentionNetwork, config: NetworkConfig) -> dict[str, Tensor]:
    """Weights of a `TokenRetentionNetwork` that scores the dropping of whole frames as a scorer of frames does."""
    weights = dict(TokenRetentionNetwork(config).state_dict(), **network.state_dict())
    weights["head.weight"] = network.head.weight.detach().repeat(2, 1)
    weights["head.bias"] = torch.cat([network.head.bias.detach(), network.head.bias.detach() + UNLIKELY])
    return weights | {name: torch.zeros_like(weights[name]) for name in ("embed_share.weight", "embed_share.bias")}


def network_with_weights(config: NetworkConfig, weights: Mapping[str, Tensor]) -> RetentionNetwork:
    """A scorer with these weights, in eval mode."""
    network = make_network(config)
    network.load_state_dict(weights)
    return network.eval()
