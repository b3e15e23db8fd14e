"""Extended rollouts: coarse frames under a budget of tokens, against the specification and the host's full history."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.baselines import extended
from far_env.contract import ChunkDecision, NewestFrames, TemporalCachePlan, make_plan
from far_env.errors import PolicyError
from far_env.host.sampler import make_scheduler
from far_env.rollout.extended import TokenCounts, denoise_extended, play_extended, token_counts
from far_env.rollout.reference import reference_rollout
from tests.rollout.test_actions import Steered

FINE, COARSE = 16, 4
"""Tokens of an 8×8 latent in patches of 2 and of 4."""
ATOL = 1e-4


class Window:
    """Demotes all but the newest frames, and keeps everything."""

    def __init__(self, num_fine: int):
        self.num_fine = num_fine

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        num_frames = len(chunk_meta_list)
        return make_plan(range(num_frames), num_frames, anchors=range(num_frames - self.num_fine))


class Scripted:
    """Answers with the next of some lists of letters, k, d (demote) or x (drop), and records its arguments."""

    def __init__(self, *answers: str):
        self.answers, self.calls = list(answers), []

    def __deepcopy__(self, memo):
        return self  # for one clip alone, so that the test sees the calls

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        self.calls.append((chunk_meta_list, rollout_state, budget_state))
        answer = self.answers.pop(0)
        assert len(answer) == len(chunk_meta_list)
        actions = {"k": "keep", "d": "demote_to_long_term", "x": "drop"}
        return TemporalCachePlan([ChunkDecision(i, actions[letter]) for i, letter in enumerate(answer)])


def played(workload, policy, tokens, num_clips=1, ids=None):
    ids = list(range(num_clips)) if ids is None else ids
    return play_extended(workload, [workload.clips.clip("test", i) for i in ids], [100 + i for i in ids], policy, tokens)


@pytest.fixture(scope="module")
def short(tiny_long_workload):
    """Three context and six predicted frames, all within the window of six with a budget of up to five frames."""
    return replace(tiny_long_workload, num_context=3, num_predict=6)


@pytest.fixture(scope="module")
def steered(tiny_long_host, tiny_long_workload):
    """Twelve context and four predicted frames whose host is conditioned on every action and guided."""
    lengths = {"num_context": 12, "num_predict": 4}
    return replace(tiny_long_workload, clips=Steered(16), guidance=1.5, actions=True, **lengths)


@pytest.mark.parametrize("budget", [3, 4, 5])
def test_without_coarse_frames_it_is_the_specification(short, budget):
    for tokens in (FINE * budget, FINE * budget + FINE - 1)[budget % 2 :]:
        for i, rollout in enumerate(played(short, NewestFrames(), tokens, num_clips=2)):
            expected = reference_rollout(short, short.clips.clip("test", i), NewestFrames(), budget, 100 + i)
            torch.testing.assert_close(rollout.latents, expected.latents, atol=ATOL, rtol=0)
            made = [(decision.step, list(decision.fine)) for decision in rollout.decisions]
            assert made == [kept for kept in expected.kept if kept[0] < short.num_predict - 1]
            assert not any(decision.coarse for decision in rollout.decisions)


@pytest.mark.parametrize("kind", ["null", "guided"])
def test_the_oldest_beyond_the_window_coarse_is_the_hosts_own_full_history(tiny_long_workload, steered, kind):
    workload = steered if kind == "guided" else replace(tiny_long_workload, num_context=12, num_predict=4)
    # Five fine and 7 to 10 coarse frames are 108 to 120 tokens; one more fine frame exceeds the budget each time.
    for i, rollout in enumerate(played(workload, Window(5), 120, num_clips=2)):
        expected = reference_rollout(workload, workload.clips.clip("test", i), None, 9999, 100 + i)
        torch.testing.assert_close(rollout.latents, expected.latents, atol=ATOL, rtol=0)
        assert rollout.tokens == [5 * FINE + coarse * COARSE for coarse in (7, 8, 9, 10)]
        assert [decision.step for decision in rollout.decisions] == [-1, 0, 1, 2], "the context is too long for the first frame"
    fine = played(workload, NewestFrames(), 9999)[0].latents
    assert (fine - played(workload, Window(5), 120)[0].latents).abs().max() > 1e-2, "resolution matters"


@torch.no_grad()
def test_coarse_frames_between_fine_ones_keep_their_places_in_time(steered):
    """Fine, coarse, coarse, fine, then the new one, written out for the transformer by hand."""
    model = steered.host.transformer
    generator = torch.Generator().manual_seed(0)
    a, b, c, d, noise = torch.randn((5, 1, *steered.host.latent_shape), generator=generator)
    actions = [[0, 1, 2, 1, 0]]
    got = denoise_extended(steered, torch.stack([a, b, c, d], dim=1), [False, True, True, False], noise, actions)
    sees = torch.tensor(  # rows b, c, a, d, new; coarse frames see no fine ones in any case
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


def test_a_plan_becomes_fine_and_coarse_frames(tiny_long_workload):
    """The newest frame stays fine, coarse frames stay coarse, and of a plan that is too long the oldest frames go."""
    workload = replace(tiny_long_workload, num_context=4, num_predict=4, num_steps=1)
    script = Scripted(
        "kdkd",  # 4 fine: the newest is not demoted
        "kkkkd",  # 3 fine and 1 coarse, plus one: frame 1 stays coarse, frame 4 fine, and frame 0 has to go
        "xkkkk",  # frame 1 is dropped
        "dkkd",
    )
    (rollout,) = played(workload, script, 3 * FINE + COARSE)
    assert [(d.step, d.fine, d.coarse, d.tokens) for d in rollout.decisions] == [
        (-1, (0, 2, 3), (1,), 52),
        (0, (2, 3, 4), (1,), 52),
        (1, (3, 4, 5), (), 48),
        (2, (4, 5, 6), (3,), 52),
    ]


def test_the_policy_is_told_which_rows_are_coarse_and_what_tokens_there_are(tiny_long_workload):
    workload = replace(tiny_long_workload, num_context=4, num_predict=2, num_steps=1)
    script = Scripted("dkkk", "xkkkk")
    played(workload, script, 3 * FINE + COARSE)
    (first, state, budget), (second, later, _) = script.calls
    size = 4 * 8 * 8 * 4 / 2**20
    assert budget == {
        "max_frames": 3,
        "capacity_mb": pytest.approx(3.25 * size),
        "token_budget": 52,
        "tokens_per_fine_frame": FINE,
        "tokens_per_coarse_frame": COARSE,
    }
    assert (state.step, later.step, state.total_steps) == (-1, 0, 2)
    assert {(m.long_term_resident, m.compression_state, m.size_mb) for m in first} == {(False, "none", size)}
    assert [(m.long_term_resident, m.compression_state) for m in second] == [(True, "coarse")] + [(False, "none")] * 4
    assert [m.size_mb for m in second] == [size / 4] + [size] * 4
    assert [m.age for m in second] == [4, 3, 2, 1, 0]


def test_the_budget_holds_for_every_generated_frame_under_every_policy(tiny_long_workload):
    workload = replace(tiny_long_workload, num_context=9, num_predict=3, num_steps=1)
    policies = [extended.make(name) for name in extended.EXTENDED] + [Window(0), Window(99)]
    for policy in policies:
        for tokens in (FINE, 2 * FINE + 3, 4 * FINE + 2):
            for rollout in played(workload, policy, tokens, num_clips=2):
                assert max(rollout.tokens) <= tokens
                counted = [FINE * len(d.fine) + COARSE * len(d.coarse) for d in rollout.decisions]
                assert counted == [d.tokens for d in rollout.decisions]
                assert all(max(d.fine) == d.step + 9 for d in rollout.decisions if d.step >= 0), "the newest is fine"


def test_rows_do_not_depend_on_their_neighbours(tiny_long_workload):
    class ByContent:
        """Demotes what changed little: histories of different shapes side by side."""

        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            motion = [meta.motion_strength for meta in chunk_meta_list]
            demoted = [i for i, frame_motion in enumerate(motion) if frame_motion < np.median(motion)]
            return make_plan(range(len(motion)), len(motion), anchors=demoted)

    workload = replace(tiny_long_workload, num_predict=5, num_steps=2)
    together = played(workload, ByContent(), 70, ids=[0, 1, 2, 3])
    assert len({tuple(rollout.decisions) for rollout in together}) > 1
    alone = played(workload, ByContent(), 70, ids=[2])[0]
    torch.testing.assert_close(together[2].latents, alone.latents, atol=1e-5, rtol=0)
    assert together[2].decisions == alone.decisions


# resolution of twelve fine rows after a plan under 8 frames of tokens: . dropped, c coarse, F fine
SHAPES = {
    "recent_fill": "....FFFFFFFF",
    "sink_recent_fine": "F....FFFFFFF",
    "far_coarse": "ccccccccFFFF",
    "packforcing_coarse": "FFFFccccccFF",
}


@pytest.mark.parametrize("name", extended.EXTENDED)
def test_the_policies_fill_their_shares_of_the_tokens(name, tiny_long_workload):
    workload = replace(tiny_long_workload, num_context=12, num_predict=1, num_steps=1)
    ((decision,),) = (rollout.decisions for rollout in played(workload, extended.make(name), 8 * FINE))
    shape = "".join("F" if i in decision.fine else "c" if i in decision.coarse else "." for i in range(12))
    assert shape == SHAPES[name]


def test_the_coarse_middle_is_a_queue():
    """Under 4 frames of tokens: two sinks, one newest frame, and four coarse ones."""
    policy = extended.make("packforcing_coarse")
    numbers = {
        "max_frames": 4,
        "capacity_mb": 1.0,
        "token_budget": 64,
        "tokens_per_fine_frame": 16,
        "tokens_per_coarse_frame": 4,
    }
    plan = policy.build_temporal_cache_plan([None] * 9, None, numbers)
    # the first two of "drop", "demote_to_long_term" and "keep" tell them apart
    assert "".join(decision.action[:2] for decision in plan.chunk_decisions) == "keke" + "drdr" + "dededede" + "ke"


def test_what_cannot_be_is_one_sentence(tiny_workload, tiny_long_workload):
    assert token_counts(tiny_long_workload.host) == TokenCounts(FINE, COARSE)
    with pytest.raises(ValueError, match="has no coarse frames"):
        played(tiny_workload, NewestFrames(), 64)
    for tokens in (FINE - 1, 64.0, True):
        with pytest.raises(ValueError, match="hold the newest frame, which has 16 tokens"):
            played(tiny_long_workload, NewestFrames(), tokens)
    with pytest.raises(ValueError, match="generates videos from nothing"):
        played(replace(tiny_long_workload, num_context=0), NewestFrames(), 64)
    with pytest.raises(ValueError, match="1 clips and 0 noise seeds"):
        play_extended(tiny_long_workload, [tiny_long_workload.clips.clip("test", 0)], [], NewestFrames(), 64)
    with pytest.raises(PolicyError, match=r"clip 0, step -1: decided about chunk id 9"):
        played(tiny_long_workload, _Wrong(), 64)
    with pytest.raises(ValueError, match="needs a token budget, which only far-env extended gives"):
        extended.make("far_coarse").build_temporal_cache_plan([None] * 5, None, {"max_frames": 4, "capacity_mb": 1.0})
    with pytest.raises(ValueError, match="did you mean 'far_coarse'"):
        extended.make("far_coars")


class _Wrong:
    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        return TemporalCachePlan([ChunkDecision(9, "keep")])
