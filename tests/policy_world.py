"""Random rollouts without a host, for tests of policies: frames, what a host would see of them, and the benchmark's loop."""

from __future__ import annotations

import numpy as np
import torch

from far_env import baselines
from far_env.baselines.filling import FillingPolicy
from far_env.contract import SIGNALS, ObservedRolloutState, RolloutState, apply_plan, check_plan
from far_env.frame_meta import frame_features, frame_meta_list
from far_env.rollout.signals import column_gaps, latent_cosines

MADE = {name: baselines.make(name) for name in baselines.names()}
FILLING = [name for name, policy in MADE.items() if isinstance(policy, FillingPolicy)]
EVERY_TIER = [(name, tier) for name in FILLING for tier in MADE[name].needs]
UCF8, UCF4, DMLAB = (5, 11, 8), (5, 11, 4), (36, 36, 8)


def make(name, tier=None, **params):
    chosen = {"tier": tier} if tier and len(MADE[name].needs) > 1 else {}
    return baselines.make(name, **chosen, **params)


class World:
    """Random frames, and what a host would see of them: one number, vector or matrix for each, by true frame number."""

    def __init__(self, seed: int, num_frames: int = 80):
        rng = np.random.default_rng(seed)
        self.latents = torch.from_numpy(rng.standard_normal((num_frames, 2, 2, 3)).cumsum(axis=0)).float()
        self.values = rng.random((num_frames, num_frames)).astype(np.float32)
        vectors = rng.standard_normal((num_frames, 6)) + 0.5
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.gaps = column_gaps(self.latents[None])[0].numpy()
        self.cosines = latent_cosines(self.latents[None])[0].numpy()

    def metas(self, kept, step):
        return frame_meta_list(frame_features(self.latents[kept][None])[0], step, 0.01)

    def signals(self, kept):
        """As for the newest frame, whose keys do not exist yet."""
        newest = kept[-1]
        mass = self.values[newest, kept] / self.values[newest, kept].sum()
        square = np.ix_(kept, kept)
        products = self.vectors @ self.vectors.T
        signals = {
            "lat_cos": self.cosines[square],
            "column_gap": self.gaps[square],
            "key_proto": self.vectors[kept],
            "attn_mass": mass,
            "qk_first": self.values[newest, kept] - 0.5,
            "key_cos": products[square].copy(),
            "expected_mass": self.values[kept, newest].copy(),
            "expected_cos": products[square].copy(),
            "denoise_gap": self.values[kept, 0],
        }
        for name in ("key_cos", "expected_mass", "expected_cos"):
            signals[name][-1] = np.nan
            signals[name].T[-1] = np.nan
        assert set(signals) == set(SIGNALS)
        return signals


def ask(policy, metas, step, budget, signals=None):
    place = (step, budget * 0.01, 99)
    state = RolloutState(*place) if signals is None else ObservedRolloutState(*place, signals)
    plan = policy.build_temporal_cache_plan(metas, state, {"max_frames": budget, "capacity_mb": budget * 0.01})
    check_plan(plan, len(metas))
    return plan


def rollout(policy, world, num_context, num_predict, budget, clip=None, calls=1):
    """The benchmark's loop; returns (step, true numbers before, true numbers that stayed) of every call."""
    if clip is not None:
        policy.begin_clip(clip)
    kept, decisions = list(range(num_context)), []
    for step in range(num_predict):
        kept.append(num_context + step)
        if len(kept) > budget:
            arguments = world.metas(kept, step), step, budget, world.signals(kept)
            plans = [ask(policy, *arguments) for _ in range(calls)]
            assert all(plan == plans[0] for plan in plans), "asked again, it answers the same"
            stay = [kept[i] for i in apply_plan(plans[0], len(kept), budget)]
            decisions.append((step, kept, stay))
            kept = list(stay)
    return decisions
