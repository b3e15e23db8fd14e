"""FAR-Long against the published model's numbers, below and above its window, with and without the cache."""

from __future__ import annotations

import pytest
import torch

from far_env.host.far_long import FARLong
from far_env.host.sampler import sample_next_frame
from tests.conftest import TINY_FAR_LONG, cached_velocity

CASES = [f"far_long_tiny_{name}.npz" for name in ("base", "wide", "patch2", "slope", "eps")]
ATOL = 2e-5
SAMPLING_ATOL = 5e-5


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("window", ["below", "above"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_returns_every_frame_as_the_published_model_does(golden, case, window, train):
    fixture = golden(case)
    model = fixture.far().train(train)
    latents, action = fixture[f"in.{window}.latents"], fixture[f"in.{window}.action"]
    for times, suffix in (("timesteps", ""), ("timesteps_mixed", "_mixed")):
        velocity = model(latents, fixture[f"in.{window}.{times}"], action=action)
        torch.testing.assert_close(velocity, fixture[f"out.{window}.train_all{suffix}"], atol=ATOL, rtol=0)
    null = model(latents, fixture[f"in.{window}.timesteps"], **model.null_conditions(*latents.shape[:2], latents.device))
    torch.testing.assert_close(null[:, -1:], fixture[f"out.{window}.eval_last_null"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("call", ["a", "b"])
@pytest.mark.parametrize("window", ["below", "above"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_cached_and_uncached_frames_agree_with_both_paths_of_the_published_model(golden, case, window, call):
    fixture = golden(case)
    model, latents, action = fixture.far(), fixture[f"in.{window}.latents"], fixture[f"in.{window}.action"]
    for k in range(latents.shape[1]):
        noisy = fixture[f"in.{window}.noise_{call}"][:, k : k + 1]
        time = fixture[f"in.{window}.t_{call}"][:, k : k + 1]
        times = torch.cat([torch.full((len(latents), k), -1.0), time], dim=1)
        uncached = model(torch.cat([latents[:, :k], noisy], dim=1), times, action=action[:, : k + 1])[:, -1]
        context_conditions, frame_conditions = {"action": action[:, :k]}, {"action": action[:, k : k + 1]}
        cached = cached_velocity(model, latents[:, :k], noisy, time, context_conditions, frame_conditions)[:, 0]
        for path in ("cached", "nocache"):
            expected = fixture[f"out.{window}.incr_{path}_{call}"][:, k]
            torch.testing.assert_close(uncached, expected, atol=ATOL, rtol=0)
            torch.testing.assert_close(cached, expected, atol=ATOL, rtol=0)


def sampled(fixture, steps: int = 20, **changes) -> torch.Tensor:
    arguments = {"context": fixture["in.context"], "noise": fixture["in.noise"], "action": fixture["in.action"]}
    return sample_next_frame(fixture.far(), num_steps=steps, **(arguments | changes))


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
def test_next_frame_equals_the_published_sampler(golden, steps):
    fixture = golden("sampling_far_long.npz")
    torch.testing.assert_close(sampled(fixture, steps), fixture[f"out.final_{steps}"], atol=SAMPLING_ATOL, rtol=0)


def test_no_context_null_actions_and_guidance(golden):
    fixture = golden("sampling_far_long.npz")
    action = fixture["in.action"]
    for changes, name in (
        ({"context": None, "action": action[:, -1:]}, "nocontext"),
        ({"action": torch.full_like(action, 4)}, "null"),
        ({"guidance_scale": 1.5}, "cfg1.5"),
    ):
        torch.testing.assert_close(sampled(fixture, **changes), fixture[f"out.final_20_{name}"], atol=SAMPLING_ATOL, rtol=0)


def test_a_rollout_from_nothing_through_the_window(golden):
    fixture = golden("sampling_far_long.npz")
    model, frames = fixture.far(), []
    for i in range(12):
        action = fixture["in.ar_action"][:, : i + 1]
        context = torch.cat(frames, dim=1) if frames else None
        noise = fixture["in.ar_noise"][:, i : i + 1]
        frames.append(sample_next_frame(model, context, noise, num_steps=8, action=action, guidance_scale=1.5))
    torch.testing.assert_close(torch.cat(frames, dim=1), fixture["out.ar_latents_8steps"], atol=SAMPLING_ATOL, rtol=0)


@torch.no_grad()
def test_context_encoded_piece_by_piece_is_the_context_encoded_at_once(golden):
    """Above the window only what was coarse before may be reused."""
    fixture = golden("far_long_tiny_slope.npz")
    model, frames = fixture.far(), fixture["in.above.latents"]
    action = fixture["in.above.action"]
    whole = model.encode_context(frames, action=action)
    first = model.encode_context(frames[:, :6], action=action[:, :6])[:, :, :, : sum(model.token_counts(6, frames)[:3])]
    later = model.encode_context(frames[:, 3:], first, 3, action=action[:, 3:])
    torch.testing.assert_close(torch.cat([first, later], dim=3), whole, atol=ATOL, rtol=0)


def test_what_does_not_fit_is_refused(golden):
    with pytest.raises(ValueError, match="not labels"):
        FARLong(**{**TINY_FAR_LONG, "condition_cfg": {"type": "label", "num_classes": 3}})
    with pytest.raises(ValueError, match="multiple of patch_size"):
        FARLong(**{**TINY_FAR_LONG, "context_patch_size": 3})
    model = FARLong(**TINY_FAR_LONG)
    with pytest.raises(ValueError, match="6×6 cannot be cut into patches of 4"):
        model(torch.zeros(1, 1, 4, 6, 6), torch.zeros(1, 1), action=torch.zeros(1, 1, dtype=torch.int64))
