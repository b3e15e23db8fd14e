"""The scheduler and next-frame sampling against the published pipeline's numbers."""

from __future__ import annotations

import pytest
import torch

from far_env.host.sampler import make_scheduler, sample_next_frame

ATOL = 5e-5


def sampled(fixture, steps: int = 20, **changes) -> torch.Tensor:
    arguments = {"context": fixture["in.context"], "noise": fixture["in.noise"]}
    if "in.action" in fixture:
        arguments["action"] = fixture["in.action"]
    return sample_next_frame(fixture.far(), num_steps=steps, **(arguments | changes))


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
def test_scheduler_has_upstreams_times_and_sigmas(golden, steps):
    fixture, scheduler = golden("scheduler.npz"), make_scheduler(steps)
    torch.testing.assert_close(scheduler.sigmas, fixture[f"sigmas_{steps}"], atol=1e-6, rtol=0)
    torch.testing.assert_close(scheduler.timesteps, fixture[f"timesteps_{steps}"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
@pytest.mark.parametrize("case", ["sampling_far.npz", "sampling_far_action.npz"])
def test_next_frame_equals_the_published_sampler(golden, case, steps):
    fixture = golden(case)
    torch.testing.assert_close(sampled(fixture, steps), fixture[f"out.final_{steps}"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["sampling_far.npz", "sampling_far_action.npz"])
@torch.no_grad()
def test_cached_sampling_equals_recomputing_the_sequence_at_every_step(golden, case):
    fixture = golden(case)
    model, context, frame = fixture.far(), fixture["in.context"], fixture["in.noise"]
    conditions = {"action": fixture["in.action"]} if "in.action" in fixture else {}
    scheduler = make_scheduler(20)
    for step, time in enumerate(scheduler.timesteps):
        times = torch.cat([torch.full(context.shape[:2], -1.0), time.expand(2, 1)], dim=1)
        velocity = model(torch.cat([context, frame], dim=1), times, **conditions)[:, -1:]
        frame = scheduler.step(velocity, time, frame).prev_sample
        torch.testing.assert_close(frame, fixture["out.trajectory_20"][step], atol=ATOL, rtol=0)
    torch.testing.assert_close(sampled(fixture), frame, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["sampling_far.npz", "sampling_far_action.npz"])
def test_the_first_frame_needs_no_context(golden, case):
    fixture = golden(case)
    changes = {"context": None} | ({"action": fixture["in.action"][:, -1:]} if "in.action" in fixture else {})
    torch.testing.assert_close(sampled(fixture, **changes), fixture["out.final_20_nocontext"], atol=ATOL, rtol=0)


def test_guidance_and_null_actions(golden):
    fixture = golden("sampling_far_action.npz")
    guided = sampled(fixture, guidance_scale=1.5)
    torch.testing.assert_close(guided, fixture["out.final_20_cfg1.5"], atol=ATOL, rtol=0)
    null = sampled(fixture, action=torch.full_like(fixture["in.action"], 4))
    torch.testing.assert_close(null, fixture["out.final_20_null"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["sampling_far.npz", "sampling_far_action.npz"])
def test_a_rollout_from_nothing(golden, case):
    fixture = golden(case)
    model, frames = fixture.far(), []
    for i in range(12):
        options = {"action": fixture["in.ar_action"][:, : i + 1], "guidance_scale": 1.5} if "in.ar_action" in fixture else {}
        context = torch.cat(frames, dim=1) if frames else None
        frames.append(sample_next_frame(model, context, fixture["in.ar_noise"][:, i : i + 1], num_steps=8, **options))
    torch.testing.assert_close(torch.cat(frames, dim=1), fixture["out.ar_latents_8steps"], atol=ATOL, rtol=0)


def test_what_cannot_be_sampled_is_refused(golden):
    fixture = golden("sampling_far.npz")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        sampled(fixture, steps=0)
    with pytest.raises(ValueError, match="unconditional"):
        sampled(fixture, guidance_scale=2.0)
    conditional = golden("sampling_far_action.npz")
    with pytest.raises(ValueError, match="5 context frames and the new one need 6"):
        sampled(conditional, action=conditional["in.action"][:, :5])
