"""The batched engine against the specification, and both against the published rollout with dropped frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from far_env import baselines
from far_env.clips.clip import Clip
from far_env.contract import ChunkDecision, TemporalCachePlan
from far_env.errors import PolicyError
from far_env.host.far_host import FARHost
from far_env.metrics import psnr
from far_env.rollout import reference
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import rollout_noise
from far_env.rollout.play import play
from far_env.workload import Workload


class Sloppy:
    """Keeps a random number of frames, often fewer than allowed, sometimes more; remembers nothing."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def begin_clip(self, noise_seed):
        self.rng = np.random.default_rng((self.seed, noise_seed))

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        keep = self.rng.random(len(chunk_meta_list)) < self.rng.uniform(0.2, 1)
        return TemporalCachePlan(
            [ChunkDecision(m.chunk_id, "keep" if k else "drop") for m, k in zip(chunk_meta_list, keep, strict=True)]
        )


def specified(workload, clip, policy, budget, seed):
    if hasattr(policy, "begin_clip"):
        policy.begin_clip(seed)
    return reference.reference_rollout(workload, clip, policy, budget, seed)


@pytest.mark.parametrize("kind", ["far", "far_long"])
@pytest.mark.parametrize("budget", [1, 2, 4, 8, 14, 9999])
def test_a_ragged_batch_equals_the_specification_row_by_row(tiny_workload, tiny_long_workload, budget, kind):
    """FAR-Long's window of six frames is crossed, both ways, by all but the smallest budgets."""
    tiny_workload = tiny_workload if kind == "far" else tiny_long_workload
    clips = [tiny_workload.clips.clip("test", i) for i in range(5)]
    seeds = [100 + i for i in range(5)]
    batch, decisions = play(tiny_workload, clips, seeds, Sloppy(), budget)
    latents, frames = batch.generated(range(5)), batch.decode(range(5))
    for row, (clip, seed) in enumerate(zip(clips, seeds, strict=True)):
        expected = specified(tiny_workload, clip, Sloppy(), budget, seed)
        torch.testing.assert_close(latents[row], expected.latents, atol=1e-4, rtol=0)
        truth = torch.from_numpy(clip.frames[5:])
        assert psnr(frames[row], truth).item() == pytest.approx(psnr(expected.frames, truth).item(), abs=1e-3)
        made = [(d.step, list(d.kept)) for d in decisions[row]]
        assert made == [kept for kept in expected.kept if kept[0] < 10], "the call after the last frame changes nothing"


def test_the_budget_changes_what_is_generated(tiny_workload):
    clip = tiny_workload.clips.clip("test", 0)
    full, tight = (reference.reference_rollout(tiny_workload, clip, baselines.make("recent_fill"), b, 1) for b in (9999, 1))
    assert (full.latents[0] - tight.latents[0]).abs().max() < 1e-6, "nothing was dropped before the first frame"
    assert (full.latents[1:] - tight.latents[1:]).abs().max() > 1e-2


def test_rows_do_not_depend_on_their_neighbours(tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(4)]
    together, _ = play(tiny_workload, clips, [1, 2, 3, 4], Sloppy(), 4)
    backwards, _ = play(tiny_workload, clips[::-1], [4, 3, 2, 1], Sloppy(), 4)
    alone, _ = play(tiny_workload, clips[2:3], [3], Sloppy(), 4)
    torch.testing.assert_close(together.generated([2]), alone.generated([0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(together.generated(range(4)), backwards.generated([3, 2, 1, 0]), atol=1e-4, rtol=0)


class Identity(torch.nn.Module):
    """Replaces an autoencoder where a fixture gives latents instead of pixels."""

    def encode(self, frames):
        return frames

    decode = encode


@pytest.fixture(params=["rollout_far.npz", "rollout_far_long.npz"])
def published(golden, request):
    fixture = golden(request.param)
    host = FARHost("fixture", fixture.far(), Identity(), "", (4, 4, 4), 4, 20)
    return fixture, Workload("fixture", None, host, num_context=5, num_predict=6, num_steps=20)


def test_engine_equals_the_published_rollout_with_dropped_frames(published, monkeypatch):
    fixture, workload = published
    monkeypatch.setattr("far_env.rollout.noise.rollout_noise", lambda seed, *_: fixture["in.noise"][seed])
    batch = RolloutBatch(workload, 2)
    batch.begin([0, 1], [Clip(i, fixture["in.context"][i].numpy()) for i in range(2)], [0, 1])
    for step in range(6):
        batch.advance([0, 1])
        for row in (0, 1):
            batch.retain(row, fixture[f"in.keep_{step}"].tolist())
            assert batch.frame_numbers(row) == fixture[f"in.kept_ids_after_{step}"].tolist()
    torch.testing.assert_close(batch.generated([0, 1]), fixture["out.generated"], atol=5e-5, rtol=0)


@torch.no_grad()
def test_specification_equals_the_published_rollout_with_dropped_frames(published):
    fixture, workload = published
    for row in range(2):
        kept = list(fixture["in.context"][row])
        for step in range(6):
            frame = workload.host.generate(kept, fixture["in.noise"][row, step], workload.conditions())
            torch.testing.assert_close(frame, fixture["out.generated"][row, step], atol=5e-5, rtol=0)
            kept.append(frame)
            kept = [kept[i] for i in fixture[f"in.keep_{step}"]]


def test_noise_is_the_benchmarks_and_a_prefix_of_longer_noise():
    noise = rollout_noise(49, 3, (4, 2, 2))
    generator = torch.Generator().manual_seed(49)
    for step in range(3):
        torch.testing.assert_close(noise[step], torch.randn((1, 1, 4, 2, 2), generator=generator)[0, 0], atol=0, rtol=0)
    torch.testing.assert_close(rollout_noise(49, 7, (4, 2, 2))[:3], noise, atol=0, rtol=0)


def test_policies_are_called_as_the_benchmark_calls_them(tiny_workload):
    calls = []

    class Watching:
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            calls.append((len(chunk_meta_list), rollout_state.step, rollout_state.total_steps, dict(budget_state)))
            assert rollout_state.budget_capacity_mb == budget_state["capacity_mb"]
            return baselines.make("recent_fill").build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)

    clip = tiny_workload.clips.clip("test", 0)
    size = 4 * 8 * 8 * 4 / 2**20
    reference.reference_rollout(tiny_workload, clip, Watching(), 8, 42)
    assert calls == [(9, step, 11, {"max_frames": 8, "capacity_mb": 8 * size}) for step in range(3, 11)]
    calls.clear()
    reference.reference_rollout(tiny_workload, clip, Watching(), 4, 42)
    assert [call[:2] for call in calls] == [(6, 0), *((5, step) for step in range(1, 11))]
    calls.clear()
    reference.reference_rollout(tiny_workload, clip, Watching(), 9999, 42)
    assert calls == []


def test_a_policy_that_raises_names_itself_clip_and_step(tiny_workload):
    class Broken:
        name = "broken"

        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            if rollout_state.step == 2:
                raise RuntimeError("out of ideas")
            return baselines.make("recent_fill").build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)

    with pytest.raises(PolicyError, match="policy broken on clip 3, step 2: raised RuntimeError: out of ideas"):
        play(tiny_workload, [tiny_workload.clips.clip("test", 3)], [0], Broken(), 4)
