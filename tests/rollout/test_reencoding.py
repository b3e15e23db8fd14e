"""Frames from kept frames that are encoded again, written out for the transformer, and the gap to streaming rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from far_env.baselines import tokens
from far_env.host.sampler import make_scheduler
from far_env.rollout.reencoding import denoise_reencoded, reencoding_gap
from tests.rollout.test_actions import Steered


@pytest.fixture(scope="module")
def steered(tiny_long_host, tiny_long_workload):
    """Twelve context and four predicted frames whose host is conditioned on every action and guided."""
    lengths = {"num_context": 12, "num_predict": 4}
    return replace(tiny_long_workload, clips=Steered(16), guidance=1.5, actions=True, **lengths)


@torch.no_grad()
def test_coarse_frames_between_full_ones_keep_their_places_in_time(steered):
    """Full, coarse, coarse, full, then the new one, written out for the transformer by hand."""
    model = steered.host.transformer
    generator = torch.Generator().manual_seed(0)
    a, b, c, d, noise = torch.randn((5, 1, *steered.host.latent_shape), generator=generator)
    actions = [[0, 1, 2, 1, 0]]
    got = denoise_reencoded(steered, torch.stack([a, b, c, d], dim=1), [False, True, True, False], noise, actions)
    sees = torch.tensor(  # rows b, c, a, d, new; coarse frames see no full ones in any case
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool
    )
    scheduler, frame = make_scheduler(steered.num_steps), noise
    for time in scheduler.timesteps:
        sequence = torch.stack([b, c, a, d, frame], dim=1)
        times = torch.tensor([[-1.0, -1, -1, -1, time]])
        both = [
            model.velocity(sequence, times, torch.tensor([1, 2, 0, 3, 4]), sees, num_coarse=2, action=torch.tensor([actions]))
            for actions in ([1, 2, 0, 1, 0], [3] * 5)
        ]
        frame = scheduler.step((both[1] + 1.5 * (both[0] - both[1]))[:, -1], time, frame).prev_sample
    torch.testing.assert_close(got, frame, atol=1e-6, rtol=0)


def test_on_a_far_it_is_the_specification(tiny_workload):
    kept, noise = torch.randn(5, 4, 8, 8), torch.randn(4, 8, 8)
    expected = tiny_workload.host.generate(list(kept), noise, tiny_workload.conditions())
    torch.testing.assert_close(denoise_reencoded(tiny_workload, kept[None], [False] * 5, noise[None])[0], expected)


def test_there_is_no_gap_until_a_frame_is_dropped(tiny_workload, steered):
    clips = [tiny_workload.clips.clip("test", i) for i in (0, 1)]
    gap = reencoding_gap(tiny_workload, clips, [100, 101], tokens.load("sink_recent"), 8 * 16)
    assert gap.largest.shape == gap.relative.shape == (2, 11)
    assert float(gap.largest[:, :4].max()) < 1e-4 < 1e-3 < float(gap.largest[:, 4:].min()), "the budget is eight frames"
    assert bool((gap.relative[:, 4:] > 0).all()) and bool((gap.relative <= 2).all())
    # A packed middle: sinks are full, then coarse frames, then full ones.
    clips = [steered.clips.clip("test", 0)]
    gap = reencoding_gap(steered, clips, [100], tokens.load("packforcing_coarse"), 8 * 16)
    assert float(gap.largest.min()) > 1e-3
    short = replace(steered, num_context=1, num_predict=3)  # at most two sinks and two newest frames: none is coarse
    assert float(reencoding_gap(short, clips, [100], tokens.load("packforcing_coarse"), 4 * 16).largest.max()) < 1e-4


def test_parts_of_frames_cannot_be_encoded_again(tiny_workload):
    clips = [tiny_workload.clips.clip("test", 0)]
    with pytest.raises(ValueError, match="kept in part or merged"):
        reencoding_gap(tiny_workload, clips, [100], tokens.load("h2o"), 50)
