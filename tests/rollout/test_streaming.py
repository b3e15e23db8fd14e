"""Streaming rollouts against the specification, against single passes of the transformer, and against a slow implementation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.errors import PolicyError
from far_env.host.far import FAR
from far_env.host.sampler import make_scheduler
from far_env.rollout.context import context_latents
from far_env.rollout.noise import rollout_noise
from far_env.rollout.reference import reference_rollout
from far_env.rollout.streaming import StreamingBatch, play_streaming
from far_env.rollout.token_cache import COARSE, FULL, MERGED
from tests.conftest import TINY_FAR, randomise
from tests.rollout.slow_streaming import SlowStream
from tests.rollout.test_actions import Steered

ATOL = 1e-4
TOKENS = 16
"""Of an 8×8 latent in patches of 2."""


def streamed(workload, policy=None, budget=None, ids=(0, 1), **options):
    clips = [workload.clips.clip("test", i) for i in ids]
    return play_streaming(workload, clips, [100 + i for i in ids], policy, budget, **options)


class Kept:
    """Keeps entries of frames by a rule: from the newest frame to the numbers of frames that stay."""

    def __init__(self, frames):
        self.frames = frames

    def retain(self, view):
        stays = torch.isin(view.frame, torch.tensor(self.frames(view.newest)))
        return torch.where(stays, torch.arange(view.frame.shape[-1]).expand_as(view.frame), -1)


class ByHead:
    """Asks a function about every head by itself, as the slow implementation does."""

    attention_frames = 1

    def __init__(self, decide):
        self.decide = decide

    def retain(self, view):
        into = torch.full_like(view.frame, -1)
        for place in np.ndindex(*view.frame.shape[:3]):
            slots = torch.nonzero(view.frame[place] >= 0).flatten()
            answer = self.decide(_OfHead(view, place, slots), view.newest, view.budget)
            targets = [slots[target] if target >= 0 else -1 for target in answer]
            into[place][slots] = torch.tensor([int(target) for target in targets])
        return into


class _OfHead:
    """Entries of a head, from a view: what `decide` below reads of the slow implementation's lists."""

    def __init__(self, view, place, slots):
        self.items = [
            type(
                "E",
                (),
                {
                    "frame": int(view.frame[place][s]),
                    "key": view.key[place][s],
                    "value": view.value[place][s],
                    "accumulated": float(view.accumulated[place][s]),
                    "weight": float(view.weight[place][s]),
                },
            )
            for s in slots
        ]

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def drop_and_merge(entries, newest, budget):
    """Drops those that received least until three fewer than needed are gone, and merges three pairs of neighbours."""
    old = [i for i, entry in enumerate(entries) if entry.frame != newest]
    excess = len(entries) - budget
    by_attention = sorted(old, key=lambda i: entries[i].accumulated)
    dropped = set(by_attention[: max(0, excess - 3)])
    into = [-1 if i in dropped else i for i in range(len(entries))]
    left = [i for i in old if i not in dropped]
    for a, b in list(zip(left[::2], left[1::2], strict=False))[: min(3, excess)]:
        into[a] = b
    return into


@pytest.fixture(scope="module")
def slope_workload(tiny_workload):
    transformer = FAR(**TINY_FAR, slope_scale=0.3)
    randomise(transformer, 8)
    return replace(tiny_workload, host=replace(tiny_workload.host, transformer=transformer.eval().requires_grad_(False)))


def steered(workload, host, guidance, actions=True, num_context=2, num_predict=4):
    lengths = {"num_context": num_context, "num_predict": num_predict}
    source = Steered(num_context + num_predict)
    return replace(workload, clips=source, host=host, guidance=guidance, actions=actions, **lengths)


@pytest.fixture(scope="module")
def action_hosts(tiny_host, tiny_long_host):
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "action", "num_action_classes": 3})
    randomise(transformer, 4)
    short = replace(tiny_host, name="tiny_action", transformer=transformer.eval().requires_grad_(False))
    return {"far": short, "far_long": tiny_long_host}


@pytest.fixture(params=["far", "slope", "true_feedback", "long", "actions", "guided", "guided_long"])
def unlimited(request, tiny_workload, slope_workload, tiny_long_workload, action_hosts):
    kind = request.param
    if kind in ("actions", "guided", "guided_long"):
        host = action_hosts["far_long" if kind == "guided_long" else "far"]
        return steered(tiny_workload, host, 1.0 if kind == "actions" else 1.5)
    if kind == "long":  # five kept frames and the new one are the window
        return replace(tiny_long_workload, num_context=2, num_predict=4)
    if kind == "true_feedback":
        return replace(tiny_workload, feedback="true")
    return slope_workload if kind == "slope" else tiny_workload


@pytest.mark.parametrize("max_gap", [1, None])
def test_with_nothing_dropped_it_is_the_specification(unlimited, max_gap):
    together = streamed(unlimited, ids=(0, 1, 2), max_gap=max_gap)
    for i, rollout in enumerate(together):
        expected = reference_rollout(unlimited, unlimited.clips.clip("test", i), None, 9999, 100 + i)
        torch.testing.assert_close(rollout.latents, expected.latents, atol=ATOL, rtol=0)
        assert rollout.tokens == [TOKENS * (unlimited.num_context + step) for step in range(unlimited.num_predict)]
    alone = streamed(unlimited, ids=(1,), max_gap=max_gap)[0]
    torch.testing.assert_close(alone.latents, together[1].latents, atol=ATOL, rtol=0)


def test_videos_from_nothing_are_the_specification(label_workload):
    for i, rollout in enumerate(streamed(label_workload)):
        expected = reference_rollout(label_workload, label_workload.clips.clip("test", i), None, 9999, 100 + i)
        torch.testing.assert_close(rollout.latents, expected.latents, atol=ATOL, rtol=0)


@pytest.fixture
def label_workload(tiny_workload, label_host):
    return replace(tiny_workload, clips=Labelled(), host=label_host, labels=True, guidance=1.5, num_context=0, num_predict=4)


class Labelled(Steered):
    def clip(self, split, clip_id):
        return replace(super().clip(split, clip_id), label=clip_id % 3)


@pytest.fixture(scope="session")
def label_host(tiny_host):
    transformer = FAR(**TINY_FAR, condition_cfg={"type": "label", "num_classes": 3})
    randomise(transformer, 5)
    return replace(tiny_host, name="tiny_label", transformer=transformer.eval().requires_grad_(False))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@torch.no_grad()
def test_frames_that_leave_the_window_are_one_pass_with_both_resolutions(tiny_workload, action_hosts, guidance):
    """A frame j was encoded while frames up to j − 5 were coarse: coarse copies of old frames, full ones of all, one mask."""
    workload = steered(tiny_workload, action_hosts["far_long"], guidance, num_context=8, num_predict=4)
    model, window = workload.host.transformer, 6
    for i, rollout in enumerate(streamed(workload)):
        clip = workload.clips.clip("test", i)
        history = list(context_latents(workload.host, [clip], 8)[0])
        noise = rollout_noise(100 + i, 4, workload.host.latent_shape)
        actions = torch.from_numpy(clip.actions)
        for step in range(4):
            num_kept = len(history)
            num_coarse = num_kept + 1 - window
            numbers = torch.tensor([*range(num_coarse), *range(num_kept + 1)])
            coarse = torch.arange(len(numbers)) < num_coarse
            sees = (numbers[None] <= numbers[:, None]) & (coarse[None] == coarse[:, None])
            sees |= ~coarse[:, None] & coarse[None] & (numbers[None] <= numbers[:, None] + 1 - window)
            # the full tokens of a frame that is coarse to this one are no longer there
            sees &= coarse[None] | (numbers[None] > numbers[:, None] + 1 - window) | (numbers[None] == numbers[:, None])
            sees[-1] = coarse | (numbers >= num_coarse)
            frame, scheduler = noise[step], make_scheduler(3)
            for time in scheduler.timesteps:
                sequence = torch.stack([*history[:num_coarse], *history, frame])[None]
                times = torch.full(sequence.shape[:2], -1.0)
                times[:, -1] = time
                both = [
                    model.velocity(sequence, times, numbers, sees, num_coarse=num_coarse, action=classes[None])[0, -1]
                    for classes in (actions[numbers], torch.full_like(numbers, 3))
                ]
                velocity = both[1] + guidance * (both[0] - both[1])
                frame = scheduler.step(velocity, time, frame).prev_sample
            torch.testing.assert_close(rollout.latents[step], frame, atol=ATOL, rtol=0)
            assert rollout.tokens[step] == 5 * TOKENS + 4 * num_coarse
            history.append(rollout.latents[step])
    exact = reference_rollout(workload, workload.clips.clip("test", 0), None, 9999, 100).latents
    assert (exact - streamed(workload, ids=(0,))[0].latents).abs().max() > 1e-3, "the window is not encoded again"


@torch.no_grad()
def test_dropped_frames_are_remembered_by_those_that_saw_them(tiny_workload):
    """With true distances, a rollout with drops is one pass with a mask: a frame sees those that were kept when it came."""
    workload = replace(tiny_workload, num_predict=5)

    def kept(newest):
        return [0, newest - 2, newest - 1, newest]

    (rollout,) = streamed(workload, Kept(kept), 4 * TOKENS, ids=(0,), max_gap=None)
    clip, model = workload.clips.clip("test", 0), workload.host.transformer
    history, noise = list(context_latents(workload.host, [clip], 5)[0]), rollout_noise(100, 5, workload.host.latent_shape)
    for step in range(5):
        count = len(history)
        sees = torch.zeros(count + 1, count + 1, dtype=torch.bool)
        for number in range(count + 1):
            before = range(number) if number < 5 else kept(number - 1)
            sees[number, [*before, number]] = True
        frame, scheduler = noise[step], make_scheduler(3)
        for time in scheduler.timesteps:
            times = torch.full((1, count + 1), -1.0)
            times[:, -1] = time
            velocity = model.velocity(torch.stack([*history, frame])[None], times, torch.arange(count + 1), sees)[0, -1]
            frame = scheduler.step(velocity, time, frame).prev_sample
        torch.testing.assert_close(rollout.latents[step], frame, atol=ATOL, rtol=0)
        history.append(frame)
    assert [(d.step, d.full, d.tokens) for d in rollout.decisions][:2] == [(-1, (0, 2, 3, 4), 64.0), (0, (0, 3, 4, 5), 64.0)]


@pytest.mark.parametrize("max_gap", [1, 3])
@torch.no_grad()
def test_entries_of_every_head_are_those_of_the_slow_implementation(tiny_workload, max_gap):
    workload = replace(tiny_workload, num_context=3, num_predict=4, num_steps=2)
    slow = SlowStream(workload, drop_and_merge, 40, max_gap)
    expected = slow.run(workload.clips.clip("test", 1), 101, 4)
    batch = StreamingBatch(
        workload, [workload.clips.clip("test", i) for i in (0, 1)], [100, 101], ByHead(drop_and_merge), 40, max_gap=max_gap
    )
    frames = torch.stack([batch.advance()[1] for _ in range(4)])
    torch.testing.assert_close(frames, expected, atol=ATOL, rtol=0)
    assert {len(entries) for entries in slow.heads.values()} == {40}
    # The last frame enters the slow memory alone.
    batch._remember(6, torch.stack([frames[-1], frames[-1]]))
    view, distinct = batch.cache, set()
    for (layer, head), entries in slow.heads.items():
        place = (layer, 1, head)
        assert view.frame[place].tolist() == [entry.frame for entry in entries]
        assert view.weight[place].tolist() == [entry.weight for entry in entries]
        assert view.kind[place].tolist() == [MERGED if entry.merged else FULL for entry in entries]
        torch.testing.assert_close(view.key[0][place], torch.stack([entry.key for entry in entries]), atol=ATOL, rtol=0)
        torch.testing.assert_close(view.accumulated[place].tolist(), [e.accumulated for e in entries], atol=1e-3, rtol=0)
        distinct.add(tuple(view.cell[place].tolist()))
    assert len(distinct) == 4, "every head keeps tokens of its own"


def test_merging_equal_tokens_changes_nothing(tiny_workload):
    """Every entry twice, then merged into one of weight 2: the frame is the same, and another one than without weights."""
    workload = replace(tiny_workload, num_predict=1)
    clips = [workload.clips.clip("test", i) for i in (0, 1)]

    def generated(change):
        batch = StreamingBatch(workload, clips, [100, 101], None, None)
        change(batch.cache)
        return batch.advance()

    def double(cache):
        for name in ("frame", "cell", "kind", "weight"):
            setattr(cache, name, getattr(cache, name).repeat_interleave(2, dim=-1))
        cache.accumulated = cache.accumulated.repeat_interleave(2, dim=-1)
        cache.received = cache.received.repeat_interleave(2, dim=-1)
        cache.key, cache.value = (x.repeat_interleave(2, dim=-2) for x in (cache.key, cache.value))

    def merge(cache):
        double(cache)
        cache.regroup((torch.arange(cache.num_slots) // 2 * 2).expand_as(cache.frame).clone())
        assert cache.num_slots == 5 * TOKENS and bool((cache.weight == 2).all()) and bool((cache.kind == MERGED).all())

    torch.testing.assert_close(generated(merge), generated(double), atol=1e-5, rtol=0)
    assert (generated(merge) - generated(lambda cache: None)).abs().max() > 1e-2, "the new frame's own tokens count once"


def test_memory_and_attended_tokens_stay_the_same(tiny_long_workload):
    workload = replace(tiny_long_workload, num_predict=40, num_steps=1, host=tiny_long_workload.host)

    class HalfAndNewest:
        def retain(self, view):
            rank = torch.arange(view.frame.shape[-1]).expand_as(view.frame)
            order = torch.where(view.frame < 0, -1, rank)
            stays = order >= order.sort(dim=-1).values[..., -view.budget, None]
            return torch.where(stays & (view.frame >= 0), rank, -1)

    clips = [workload.clips.clip("test", 0)]
    batch = StreamingBatch(workload, clips, [100], HalfAndNewest(), 100)
    sizes = []
    for _ in range(40):
        batch.advance()
        sizes.append((batch.cache.num_slots, batch.cache.nbytes, len(batch._full_latents[0])))
    assert len(set(sizes[20:])) == 1 and sizes[-1][0] <= 100
    assert COARSE in batch.cache.kind and FULL in batch.cache.kind


def test_rows_do_not_depend_on_their_neighbours(tiny_workload):
    workload = replace(tiny_workload, num_predict=4, num_steps=2)
    together = streamed(workload, ByHead(drop_and_merge), 50, ids=(0, 1, 2))
    alone = streamed(workload, ByHead(drop_and_merge), 50, ids=(2,))[0]
    torch.testing.assert_close(together[2].latents, alone.latents, atol=1e-5, rtol=0)
    assert together[2].decisions == alone.decisions


def test_what_cannot_be_is_one_sentence(tiny_workload):
    for budget in (15, 64.0, True):
        with pytest.raises(ValueError, match="hold the newest frame, which has 16 tokens"):
            streamed(tiny_workload, Kept(lambda newest: [newest]), budget)
    with pytest.raises(ValueError, match="belong together"):
        streamed(tiny_workload, None, 64)
    with pytest.raises(ValueError, match="2 clips and 1 noise seeds"):
        play_streaming(tiny_workload, [tiny_workload.clips.clip("test", i) for i in (0, 1)], [1])
    with pytest.raises(ValueError, match="at least 1, or None"):
        streamed(tiny_workload, max_gap=0)
    answers = {
        "int64 tensor of the shape": lambda view: view.frame[..., 1:],
        "not in −1 to 79": lambda view: view.frame + 100,
        "stays as it is": lambda view: torch.full_like(view.frame, -1),
        "does not stay": lambda view: (torch.arange(80) + 1).clamp(max=79).expand_as(view.frame).clone(),
        "keeps 80 entries of a head, with a budget of 64": lambda view: torch.arange(80).expand_as(view.frame).clone(),
        "raised ZeroDivisionError": lambda view: 1 // 0,
    }
    for reason, answer in answers.items():
        policy = type("Wrong", (), {"retain": staticmethod(answer)})()
        with pytest.raises(PolicyError, match=rf"token policy Wrong, step -1: .*{reason}"):
            streamed(tiny_workload, policy, 64)
