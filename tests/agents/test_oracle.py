"""The oracle: what it matches, which sets it prefers, and that what it promises is what its decisions give."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.agents.oracle import Coverage, best_cover, coverage, search
from far_env.contract import make_plan
from far_env.metrics import psnr
from far_env.rollout.reference import reference_rollout


def test_a_cell_is_compared_with_all_cells_of_a_source():
    generator = torch.Generator().manual_seed(0)
    history, newest, future = (torch.randn(n, 3, 2, 4, generator=generator) for n in (5, 1, 3))
    cover = coverage(history, newest[0], future)
    before = [newest[0], future[0], future[1]]
    for index, (f, r, c) in enumerate(itertools.product(range(3), range(2), range(4))):

        def nearest(source, target=future[f, :, r, c]):
            places = itertools.product(range(2), range(4))
            return min(float((source[:, row, column] - target).square().sum()) for row, column in places)

        assert cover.missing[index] == pytest.approx(nearest(before[f]), rel=1e-4)
        for row in range(5):
            assert cover.distance[row, index] == pytest.approx(nearest(history[row]), rel=1e-4)


def test_what_is_lost_without_each_frame_is_the_cost_of_the_others():
    rng = np.random.default_rng(2)
    cover = Coverage(rng.random(50).astype(np.float32), rng.random((9, 50)).astype(np.float32))
    for kept in ([0, 1], [1, 3, 4, 8], list(range(9))):
        sequential_eviction = [cover.cost([other for other in kept if other != row]) for row in kept]
        np.testing.assert_allclose(cover.costs_without(kept), sequential_eviction, rtol=1e-5)


def test_the_best_cover_is_the_cheapest_set_with_the_newest_frame():
    rng = np.random.default_rng(0)
    cover = Coverage(rng.random(30).astype(np.float32) * 2, rng.random((7, 30)).astype(np.float32))
    sets = best_cover(cover, 3, limit=4)
    every = sorted(([*chosen, 6] for chosen in itertools.combinations(range(6), 2)), key=cover.cost)
    assert sets == every[:4]
    assert best_cover(cover, 7) == [list(range(7))]


def test_a_long_history_is_cut_down_row_by_row():
    rng = np.random.default_rng(1)
    distance = rng.random((37, 40)).astype(np.float32) + 1
    for column in range(40):  # seven rows hold everything
        distance[[3, 8, 13, 20, 21, 30, 33][column % 7], column] = 0
    cover = Coverage(np.full(40, 9, dtype=np.float32), distance)
    first, *others = best_cover(cover, 8, limit=3)
    assert first == [3, 8, 13, 20, 21, 30, 33, 36] and cover.cost(first) == 0
    assert len(others) == 2 and all(len(set(kept)) == 8 and kept[-1] == 36 for kept in others)


class Replay:
    """Keeps the given true frames."""

    def __init__(self, decisions, num_context):
        self.kept = {decision.step: decision.kept for decision in decisions}
        self.numbers = list(range(num_context))

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        while len(self.numbers) < len(chunk_meta_list):
            self.numbers.append(max(self.numbers) + 1)
        wanted = self.kept.get(rollout_state.step, tuple(self.numbers[-budget_state["max_frames"] :]))
        ids = [place for place, number in enumerate(self.numbers) if number in wanted]
        self.numbers = list(wanted)
        return make_plan(ids, len(chunk_meta_list))


@pytest.mark.parametrize("feedback", ["generated", "true"])
def test_the_promised_score_is_what_the_plain_rollout_gives(tiny_workload, feedback):
    tiny_workload = replace(tiny_workload, feedback=feedback)
    clips = [tiny_workload.clips.clip("train", i) for i in range(3)]
    narrow = search(tiny_workload, clips, [7, 8, 9], 4, width=1, branches=1, progress=False)
    wide = search(tiny_workload, clips, [7, 8, 9], 4, width=3, branches=3, progress=False)
    for clip, seed, *rollouts in zip(clips, [7, 8, 9], narrow, wide, strict=True):
        for oracle in rollouts:
            rollout = reference_rollout(tiny_workload, clip, Replay(oracle.decisions, 5), 4, seed)
            truth = torch.from_numpy(clip.frames[5:16])
            assert oracle.psnr == pytest.approx(float(psnr(rollout.frames, truth)), abs=1e-3)
    assert [oracle.frames_generated for oracle in narrow] == [11] * 3
    assert [oracle.frames_generated for oracle in wide] == [1 + 3 * 10] * 3


def test_settings_that_cannot_work_are_refused(tiny_workload):
    clip = tiny_workload.clips.clip("train", 0)
    with pytest.raises(ValueError, match="width and branches of at least 1, got 0 and 1"):
        search(tiny_workload, [clip], [0], 4, width=0, branches=1)
    with pytest.raises(ValueError, match="leaves nothing to decide"):
        search(tiny_workload, [clip], [0], 15)
