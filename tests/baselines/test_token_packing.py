"""PackForcing over tokens: its parts, its queue and its middles, against loops over frames and entries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.baselines import tokens
from far_env.baselines.token_packing import PackForcing, Parts
from far_env.errors import PolicyError
from far_env.host.compressor import Compressor, save_compressor
from far_env.rollout.streaming import StreamingBatch
from far_env.rollout.token_cache import COMPRESSED, FULL, MERGED
from far_env.rollout.token_policy import TokenSizes
from tests.conftest import randomise

BUDGET, FULL_TOKENS, BLOCK, LENGTH = 160, 16, 4, 4


def by_frames(newest, num_sink, num_blocks):
    """Frame by frame: the first ones stay, others queue; the four oldest of them become a block while there is no room."""
    sinks, blocks, recent = [], [], []
    for number in range(newest + 1):
        if len(sinks) < num_sink:
            sinks.append(number)
            continue
        recent.append(number)
        while FULL_TOKENS * (len(sinks) + len(recent)) + BLOCK * min(len(blocks), num_blocks) > BUDGET:
            blocks.append(recent[:LENGTH])
            recent = recent[LENGTH:]
        blocks_left = blocks[-num_blocks:] if num_blocks else []
    return sinks, blocks_left, recent


@pytest.mark.parametrize(("num_sink", "num_blocks"), [(1, 3), (0, 0), (2, 5)])
def test_parts_are_those_of_a_queue_that_is_filled_frame_by_frame(num_sink, num_blocks):
    parts = Parts(num_sink, num_blocks, FULL_TOKENS, BLOCK, LENGTH, BUDGET)
    for newest in range(2, 60):
        sinks, blocks, recent = by_frames(newest, num_sink, num_blocks)
        made = parts.blocks_before(newest)
        assert recent == list(range(len(sinks) + LENGTH * made, newest + 1))
        assert blocks == [
            list(range(num_sink + LENGTH * i, num_sink + LENGTH * (i + 1))) for i in range(max(0, made - num_blocks), made)
        ]


def test_the_shares_are_of_tokens_and_a_budget_without_room_for_a_block_is_refused():
    policy = PackForcing()
    assert policy.parts(256, 16, 4) == Parts(2, 16, 16, 4, 4, 256)
    assert policy.parts(128, 16, 4) == Parts(1, 8, 16, 4, 4, 128)
    with pytest.raises(ValueError, match=r"needs 4 newest frames beside the other parts, 96 tokens under this budget of 64"):
        policy.parts(64, 16, 4)
    with pytest.raises(ValueError, match="did you mean 'averaged'"):
        tokens.load("packforcing:middle=average")
    assert tokens.load("packforcing:top_blocks=0").top_blocks is None
    assert tokens.load("packforcing:compressor=here").compressor == "here"
    assert tokens.load("packforcing:middle=none").compressor is None


@pytest.fixture
def folder(tiny_host, tmp_path):
    compressor = Compressor.of(tiny_host.transformer, block_frames=LENGTH, channels=8)
    randomise(compressor, 5)
    save_compressor(tmp_path, compressor, tiny_host)
    return tmp_path


def stream(workload, policy):
    """A batch of two clips of 5 + 25 frames, and after every frame what is left."""
    clips = [workload.clips.clip("test", i) for i in range(2)]
    batch = StreamingBatch(replace(workload, num_predict=25), clips, [100, 101], policy, BUDGET)
    while batch.step < batch.workload.num_predict - 1:
        batch.advance()
        yield batch.workload.num_context + batch.step - 1, batch.cache


def parts_of(newest):
    return by_frames(newest, 1, 10)  # f_sink 0.125 and f_middle 0.25 of 160 tokens, one frame and ten blocks


def test_what_keeps_it_from_being_played_is_said(tiny_workload, folder):
    clips = [tiny_workload.clips.clip("test", 0)]
    with pytest.raises(
        PolicyError, match=r"token policy packforcing: no compressor ships for the host .* far-env train-compressor"
    ):
        StreamingBatch(tiny_workload, clips, [1], PackForcing(), BUDGET)
    with pytest.raises(
        PolicyError, match="token policy packforcing: packforcing with blocks of 4 frames needs 4 newest frames"
    ):
        StreamingBatch(tiny_workload, clips, [1], PackForcing(compressor=str(folder)), 64)


def test_blocks_are_compressed_in_time_order_and_leave_in_the_order_they_came(tiny_workload, folder):
    policy = PackForcing(f_middle=0.05, compressor=str(folder))  # two blocks
    for newest, cache in stream(tiny_workload, policy):
        sinks, blocks, recent = by_frames(newest, 1, 2)
        for row in range(2):
            assert cache.kept_frames(row, FULL) == [*sinks, *recent]
            assert cache.kept_frames(row, COMPRESSED) == [block[0] for block in blocks]
        assert bool((cache.counts() == 16 * len([*sinks, *recent]) + 4 * len(blocks)).all()) and cache.num_slots <= BUDGET
    assert newest - len(recent) > 2 * LENGTH, "blocks have left"


def test_without_a_middle_the_other_parts_are_the_same(tiny_workload):
    for newest, cache in stream(tiny_workload, PackForcing(middle="none")):
        sinks, _, recent = parts_of(newest)
        assert cache.kept_frames(0) == [*sinks, *recent]


@pytest.mark.parametrize("middle", ["averaged", "strided"])
def test_other_middles_have_one_entry_in_the_place_of_each_compressed_token(tiny_workload, middle):
    for newest, cache in stream(tiny_workload, PackForcing(middle=middle)):
        sinks, blocks, recent = parts_of(newest)
        expected = [(f, c) for f in [*sinks, *recent] for c in range(16)] + [(b[0], c) for b in blocks for c in (0, 2, 8, 10)]
        for place in np.ndindex(*cache.kind.shape[:3]):
            found = zip(cache.frame[place].tolist(), cache.cell[place].tolist(), strict=True)
            assert sorted(found) == sorted(expected)
        merged = torch.isin(cache.frame, torch.tensor([block[0] for block in blocks], dtype=torch.int64))
        assert bool((cache.weight == torch.where(merged, 16.0 if middle == "averaged" else 1.0, 1.0)).all())
        assert bool((cache.kind == torch.where(merged & (middle == "averaged"), MERGED, FULL)).all())


def test_averaged_values_are_means_over_four_frames_and_four_places(tiny_workload):
    """In the first layer, values depend on the frame alone, so that they can be computed again."""
    *_, (_, cache) = stream(tiny_workload, PackForcing(middle="averaged"))
    workload = replace(tiny_workload, num_predict=25)
    clips = [workload.clips.clip("test", i) for i in range(2)]
    kept = StreamingBatch(workload, clips, [100, 101], None, None)
    block = [1, 2, 3, 4]  # all given frames
    for cell, places in ((0, (0, 1, 4, 5)), (10, (10, 11, 14, 15))):
        chosen = torch.isin(kept.cache.frame[0, 0, 0], torch.tensor(block)) & torch.isin(
            kept.cache.cell[0, 0, 0], torch.tensor(places)
        )
        mean = kept.cache.value[0, 0, 0, 0][chosen].mean(dim=0)
        at = (cache.frame[0, 0, 0] == 1) & (cache.cell[0, 0, 0] == cell)
        assert torch.allclose(cache.value[0, 0, 0, 0][at][0], mean, atol=1e-5)


def test_compressed_blocks_are_asked_for_only_where_frames_are_left_to_compress():
    sizes = TokenSizes(budget=BUDGET, full=16, coarse=None, window=15, block=4, block_frames=4)
    policy = PackForcing()
    assert policy.compressed_blocks(list(range(10)), sizes) == []
    assert policy.compressed_blocks(list(range(11)), sizes) == [1]
    assert policy.compressed_blocks([0, *range(5, 16)], sizes) == [5]
    assert policy.coarse_frames([0, 1], sizes) == []


def test_without_training_the_past_is_averaged_as_far_back_as_the_budget_holds(tiny_workload):
    """Of 160 tokens five frames are whole, and frames of four tokens have the rest."""
    asked = 0
    policy = tokens.load("recent_averaged")
    retain = policy.retain

    class Counted(type(policy)):
        def retain(self, view):
            nonlocal asked
            asked = view.newest
            return retain(view)

    for newest, cache in stream(tiny_workload, Counted()):
        if newest != asked:  # there was room: what the last answer left, and whole frames after it
            continue
        averaged = range(max(0, newest - 24), newest - 4)
        expected = [(f, c) for f in range(newest - 4, newest + 1) for c in range(16)]
        expected += [(f, c) for f in averaged for c in (0, 2, 8, 10)]
        for place in np.ndindex(*cache.kind.shape[:3]):
            found = zip(cache.frame[place].tolist(), cache.cell[place].tolist(), strict=True)
            assert sorted(found) == sorted(expected)
    assert asked > 24, "the oldest frames have left"
