"""The set-transformer scorer with the budgeted-subset head, as a policy class of sb3-contrib's MaskablePPO."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from far_env.agents.network import RetentionNetwork, ValueNetwork
from far_env.agents.subset_distribution import BudgetedSubset

PADDING_LOGIT = -1e6


class PackedObservation(BaseFeaturesExtractor):
    """The dict observation as one vector: frames, mask, budget. The network unpacks it again."""

    def __init__(self, observation_space: spaces.Dict) -> None:
        super().__init__(observation_space, features_dim=sum(int(np.prod(s.shape)) for s in observation_space.values()))

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Packed observations (B, N·C + N + 3) for frames of C columns."""
        return torch.cat([observations[key].flatten(1) for key in ("frames", "mask", "budget")], dim=1)


class ActorCritic(nn.Module):
    """Scorer and critic over packed observations, in place of SB3's MLP extractor.

    The actor's latent consists of the action distribution's parameters: N logits and how many frames an action may keep.
    """

    def __init__(self, frames_shape: tuple[int, int], network: dict[str, Any]) -> None:
        super().__init__()
        self.frames_shape = frames_shape
        self.actor = RetentionNetwork(**network)
        self.critic = ValueNetwork(**network)
        self.latent_dim_pi = frames_shape[0] + 1
        self.latent_dim_vf = self.actor.embed.out_features

    def forward(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Both latents."""
        return self.forward_actor(packed), self.forward_critic(packed)

    def forward_actor(self, packed: Tensor) -> Tensor:
        """Logits and budget (B, N + 1)."""
        frames, mask, budget = self._unpack(packed)
        max_frames = (budget[:, :1] * self.frames_shape[0]).round()
        # Padding must never be kept, also without an action mask.
        logits = self.actor(frames, mask, budget).masked_fill(mask == 0, PADDING_LOGIT)
        return torch.cat([logits, max_frames], dim=1)

    def forward_critic(self, packed: Tensor) -> Tensor:
        """Pooled features (B, width)."""
        return self.critic(*self._unpack(packed))

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slots, features = self.frames_shape
        frames, mask, budget = packed.split([slots * features, slots, 3], dim=1)
        return frames.unflatten(1, (slots, features)), mask, budget


class SubsetDistribution(MaskableDistribution):
    """`BudgetedSubset` with sb3-contrib's interface. Without masks the newest slot is forced and all others are free."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self._built: BudgetedSubset | None = None

    def proba_distribution_net(self, latent_dim: int) -> nn.Module:
        """Return an identity: the latent already consists of the distribution's parameters."""
        return nn.Identity()

    def proba_distribution(self, action_logits: Tensor) -> SubsetDistribution:
        """Set the parameters (B, N + 1): logits and the budget in frames."""
        self._logits, self._max_frames = action_logits[:, : self.num_slots], action_logits[:, self.num_slots].long()
        self._drop_ok = torch.ones_like(self._logits, dtype=torch.bool)
        self._drop_ok[:, -1] = False
        self._keep_ok = torch.ones_like(self._drop_ok)
        self._built = None
        return self

    def apply_masking(self, masks: Tensor | np.ndarray | None) -> None:
        """Fix the slots for which the masks, bool (B, 2N), allow only one of drop and keep."""
        if masks is None:
            return
        pairs = torch.as_tensor(masks, dtype=torch.bool, device=self._logits.device).reshape(-1, self.num_slots, 2)
        self._drop_ok, self._keep_ok = pairs.unbind(-1)
        self._built = None

    @property
    def subset(self) -> BudgetedSubset:
        """The distribution under the masks, built on first access."""
        if self._built is None:
            free, forced = self._drop_ok & self._keep_ok, self._keep_ok & ~self._drop_ok
            self._built = BudgetedSubset(self._logits, free, forced, self._max_frames)
        return self._built

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probabilities (B,) of keep masks (B, N)."""
        return self.subset.log_prob(actions.reshape(-1, self.num_slots))

    def entropy(self) -> Tensor:
        """Entropies (B,) in nats."""
        return self.subset.entropy()

    def sample(self) -> Tensor:
        """Keep masks (B, N)."""
        return self.subset.sample()

    def mode(self) -> Tensor:
        """The most probable keep masks (B, N)."""
        return self.subset.mode()

    def actions_from_params(self, action_logits: Tensor, deterministic: bool = False) -> Tensor:
        """Keep masks for parameters (B, N + 1)."""
        return self.proba_distribution(action_logits).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, action_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled keep masks and their log-probabilities."""
        actions = self.actions_from_params(action_logits)
        return actions, self.log_prob(actions)


class SubsetPolicy(MaskableActorCriticPolicy):
    """Policy class for ``MaskablePPO(SubsetPolicy, env, policy_kwargs={"network": {"width": 64, …}})``."""

    def __init__(self, *args: Any, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.network = network or {}
        kwargs["features_extractor_class"] = PackedObservation
        kwargs["ortho_init"] = False
        super().__init__(*args, **kwargs)

    @property
    def scorer(self) -> RetentionNetwork:
        """The actor, which is exported."""
        return self.mlp_extractor.actor

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = ActorCritic(self.observation_space["frames"].shape, self.network).to(self.device)

    def _build(self, lr_schedule: Any) -> None:
        self.action_dist = SubsetDistribution(self.action_space.n)
        super()._build(lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters = super()._get_constructor_parameters()
        for fixed in ("features_extractor_class", "features_extractor_kwargs", "ortho_init"):
            parameters.pop(fixed, None)
        return parameters | {"network": self.network}
