"""The scorer with a critic as a policy class of sb3-contrib's MaskablePPO: a softmax over the frames that may be dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn import functional as F

from far_env.agents.config import NetworkConfig
from far_env.agents.graph_batches import network_inputs, trimmed
from far_env.agents.network import RetentionNetwork, ValueNetwork, make_network

BOOLEAN_ARRAYS = ("generated", "in_history", "known_changes", "known", "mask")


class PackedGraph(BaseFeaturesExtractor):
    """The dict observation of `far_env.agents.eviction_env.EvictionVecEnv` as one vector. The networks unpack it again."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, features_dim=sum(int(np.prod(s.shape)) for s in observation_space.values()))

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Packed observations (B, features_dim), the parts in alphabetical order."""
        return torch.cat([observations[key].flatten(1) for key in sorted(observations)], dim=1)


class ActorCritic(nn.Module):
    """Scorer and critic over packed observations, in place of SB3's MLP extractor.

    The actor's latent are the logits of dropping each node, the negative scores; in a token memory those of dropping and of
    compressing each node in turn.

    Args:
        bfloat16: multiply matrices in bfloat16, which is faster on processors that have it.
    """

    def __init__(self, space: spaces.Dict, config: NetworkConfig, bfloat16: bool = False) -> None:
        super().__init__()
        self.bfloat16 = bfloat16
        self.shapes = {name: space[name].shape for name in sorted(space.spaces)}
        self.config = config
        self.actor, self.critic = make_network(config), ValueNetwork(config)
        self.num_nodes = self.shapes["mask"][0]
        self.latent_dim_pi, self.latent_dim_vf = self.num_nodes * self.actor.head.out_features, config.width

    def forward(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Both latents."""
        return self.forward_actor(packed), self.forward_critic(packed)

    def forward_actor(self, packed: Tensor) -> Tensor:
        """Logits (B, N), or (B, 2N)."""
        return self._by_size(packed, self._logits)

    def forward_critic(self, packed: Tensor) -> Tensor:
        """Pooled features (B, width)."""
        return self._by_size(packed, self.critic)

    def _logits(self, *inputs: Tensor) -> Tensor:
        scores = self.actor(*inputs).reshape(*inputs[2].shape, -1)
        return F.pad(-scores, (0, 0, 0, self.num_nodes - scores.shape[1])).flatten(1)

    def _by_size(self, packed: Tensor, network: Callable[..., Tensor]) -> Tensor:
        """Outputs of a network. Graphs of at most half the size of the largest are not padded to it, which would be slow."""
        start = sum(int(np.prod(shape)) for name, shape in self.shapes.items() if name < "mask")
        sizes = packed[:, start : start + self.num_nodes].sum(dim=1)
        small = sizes <= sizes.max() / 2
        groups = (small, ~small) if small.any() else (~small,)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            outputs = torch.cat([network(*self._unpack(packed[rows])) for rows in groups])
        order = torch.cat([rows.nonzero()[:, 0] for rows in groups])
        return outputs[order.argsort()].float()

    def _unpack(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The networks' inputs, without the padding that all graphs have."""
        parts = packed.split([int(np.prod(shape)) for shape in self.shapes.values()], dim=1)
        arrays = {
            name: part.reshape(-1, *shape).numpy() for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }
        count, nodes = arrays["mask"].shape
        size = int(arrays["mask"].sum(axis=1).max())
        for name, shape in (("frame_signals", (count, nodes, 0)), ("pair_signals", (count, nodes, nodes, 0))):
            arrays.setdefault(name, np.zeros(shape, dtype=np.float32))
        arrays = {name: values > 0 if name in BOOLEAN_ARRAYS else values for name, values in trimmed(arrays, size).items()}
        mask, remaining = arrays.pop("mask"), torch.from_numpy(arrays.pop("remaining"))
        return *network_inputs(arrays, mask, self.config), remaining


class EvictionDistribution(MaskableCategoricalDistribution):
    """A categorical distribution whose parameters are the actor's latent."""

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """Return an identity."""
        return nn.Identity()


class EvictionPolicy(MaskableActorCriticPolicy):
    """Policy class for ``MaskablePPO(EvictionPolicy, EvictionVecEnv(…), policy_kwargs={"network": NetworkConfig(…)})``."""

    def __init__(self, *args: Any, network: NetworkConfig | None = None, bfloat16: bool = False, **kwargs: Any) -> None:
        self.network, self.bfloat16 = network or NetworkConfig(), bfloat16
        kwargs["features_extractor_class"] = PackedGraph
        kwargs["ortho_init"] = False
        super().__init__(*args, **kwargs)

    @property
    def scorer(self) -> RetentionNetwork:
        """The actor, which is exported."""
        return self.mlp_extractor.actor

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActorCritic(self.observation_space, self.network, self.bfloat16).to(self.device)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = EvictionDistribution(self.action_space.n)
        super()._build(lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        for fixed in ("features_extractor_class", "features_extractor_kwargs", "ortho_init"):
            parameters.pop(fixed, None)
        return parameters | {"network": self.network, "bfloat16": self.bfloat16}
