"""Statistics that a rollout hands to the policies that ask: equal to the plain specification, and nobody else notices."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import baselines
from far_env.clips.clip import Clip
from far_env.contract import STATISTICS, ObservedRolloutState, PolicyError, RolloutState, make_plan
from far_env.host.weights import Host
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import FrameMemo
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.rollout.statistics import OF_LATENTS, QueryMoments, column_gaps, latent_cosines
from far_env.workloads import Workload

ALL = tuple(STATISTICS)
WATCHED = tuple(name for name in ALL if name not in OF_LATENTS)


class Asks:
    """Drops the frame at one place whenever it is over budget, and notes what it was told; copies share the notes."""

    def __init__(self, statistics=ALL, place=1):
        self.statistics, self.place, self.told = statistics, place, {}
        self.seed = None

    def __deepcopy__(self, memo):
        own = copy.copy(self)
        return own

    def begin_clip(self, noise_seed):
        self.seed = noise_seed

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        self.told[self.seed, rollout_state.step] = getattr(rollout_state, "statistics", None)
        n, surplus = len(chunk_meta_list), len(chunk_meta_list) - budget_state["max_frames"]
        first = min(self.place, n - 1 - surplus)
        return make_plan([i for i in range(n) if not first <= i < first + surplus], n)


class Identity(torch.nn.Module):
    """Stands for an autoencoder where a fixture gives latents instead of pixels."""

    def encode(self, frames):
        return frames

    decode = encode


def fixture_workload(golden, name):
    """A published tiny network with its latents as clips: 5 + 4 frames, 4 ODE steps."""
    fixture = golden(name)
    key = next(key for key in ("in.context", "in.latents", "in.above.latents") if key in fixture)
    latents = fixture[key]
    host = Host("fixture", fixture.far(), Identity(), "", tuple(latents.shape[2:]), 4, 4)
    generator = torch.Generator().manual_seed(3)
    clips = [Clip(i, torch.randn(5, *latents.shape[2:], generator=generator).numpy()) for i in range(2)]
    return Workload("fixture", None, host, num_context=5, num_predict=4, num_steps=4), clips


def compare(workload, clips, budgets, atol):
    """Play all clips in one batch, and each by the specification; returns what the batch was told."""
    batched = Asks()
    seeds = [7 + i for i in range(len(clips))]
    play(workload, clips, seeds, batched, budgets)
    plain = Asks()
    for clip, seed, budget in zip(clips, seeds, budgets, strict=True):
        plain.begin_clip(seed)
        reference_rollout(workload, clip, plain, budget, seed)
    last = workload.num_predict - 1
    assert {key for key in plain.told if key[1] < last} == set(batched.told)
    for key, told in batched.told.items():
        assert tuple(told) == ALL
        for name, array in told.items():
            assert array.dtype == np.float32, name
            # Eigenvectors of float32 covariances are only so well known.
            tolerance = 10 * atol if name == "expected_cos" else atol
            np.testing.assert_allclose(array, plain.told[key][name], atol=tolerance, rtol=1e-4, err_msg=f"{name} {key}")
    return batched.told


@pytest.mark.parametrize(
    "name", ["rollout_far.npz", "far_tiny_slope.npz", "far_tiny_label.npz", "rollout_far_long.npz", "far_long_tiny_slope.npz"]
)
def test_statistics_equal_the_specification_on_the_published_networks(golden, name):
    """FAR-Long's window is four frames there: of a history of six or more, two or more are coarse."""
    workload, clips = fixture_workload(golden, name)
    told = compare(workload, clips, [5, 3], atol=5e-6)
    coarse = workload.host.transformer.num_coarse(6)
    assert (coarse > 0) == ("long" in name)
    for statistics in told.values():
        n = len(statistics["attn_mass"])
        assert statistics["attn_mass"].sum() == pytest.approx(1, abs=1e-5)
        assert np.isnan(statistics["key_cos"][-1]).all() and np.isfinite(statistics["key_cos"][:-1, :-1]).all()
        np.testing.assert_allclose(np.linalg.norm(statistics["key_proto"], axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(np.diag(statistics["lat_cos"]), 1, atol=1e-5)
        assert {k: v.shape[0] for k, v in statistics.items()} == dict.fromkeys(ALL, n)


def test_statistics_equal_the_specification_in_a_ragged_batch(tiny_workload, tiny_long_workload):
    for workload in (tiny_workload, tiny_long_workload):
        workload = replace(workload, num_predict=4)
        compare(workload, [workload.clips.clip("test", i) for i in range(3)], [2, 4, 7], atol=1e-4)
