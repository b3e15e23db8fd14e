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


def random_cover(rng, history, frames, cells, feedback=False):
    shapes = (history, frames, cells), (frames, cells)
    distance, previous = (rng.random(shape).astype(np.float32) for shape in shapes)
    return Coverage(distance, previous, rng.integers(0, cells, (frames, cells)), feedback)


def test_a_cell_is_compared_with_all_cells_of_a_source():
    generator = torch.Generator().manual_seed(0)
    history, newest, future = (torch.randn(n, 3, 2, 4, generator=generator) for n in (5, 1, 3))
    cover = coverage(history, newest[0], future)
    before = [newest[0], future[0], future[1]]
    places = list(itertools.product(range(2), range(4)))
    for frame, (cell, (r, c)) in itertools.product(range(3), enumerate(places)):
        target = future[frame, :, r, c]
        of_before = [float((before[frame][:, row, column] - target).square().sum()) for row, column in places]
        assert cover.previous[frame, cell] == pytest.approx(min(of_before), rel=1e-4)
        assert cover.nearest[frame, cell] == np.argmin(of_before)
        for row in range(5):
            nearest = min(float((history[row, :, y, x] - target).square().sum()) for y, x in places)
            assert cover.distance[row, frame, cell] == pytest.approx(nearest, rel=1e-4)


@pytest.mark.parametrize("feedback", [False, True])
def test_a_cell_inherits_the_error_of_the_cell_it_is_copied_from(feedback):
    cover = random_cover(np.random.default_rng(3), history=6, frames=5, cells=7, feedback=feedback)

    def error(frame, cell, kept):
        of_kept = min(cover.distance[row, frame, cell] for row in kept)
        if feedback:
            return min(of_kept, cover.previous[frame, cell])
        if frame == 0:  # the frame before is in the history
            return of_kept
        return min(of_kept, cover.previous[frame, cell] + error(frame - 1, cover.nearest[frame, cell], kept))

    for kept in ([5], [0, 2, 5], list(range(6))):
        exact = sum(error(frame, cell, kept) for frame in range(5) for cell in range(7))
        assert cover.cost(kept) == pytest.approx(exact, rel=1e-5)


def test_content_that_was_dropped_is_missing_in_every_frame_that_shows_it():
    # Old content appears in the first frame to come and stays; the frames differ in nothing else.
    distance = np.zeros((2, 4, 1), dtype=np.float32)
    distance[1] = 1
    cover = Coverage(distance, np.zeros((4, 1), dtype=np.float32), np.zeros((4, 1), dtype=np.int64))
    assert cover.cost([0, 1]) == 0 and cover.cost([1]) == 4


@pytest.mark.parametrize("feedback", [False, True])
def test_what_is_lost_without_each_frame_is_the_cost_of_the_others(feedback):
    cover = random_cover(np.random.default_rng(2), history=9, frames=5, cells=10, feedback=feedback)
    for kept in ([0, 1], [1, 3, 4, 8], list(range(9))):
        sequential_eviction = [cover.cost([other for other in kept if other != row]) for row in kept]
        np.testing.assert_allclose(cover.costs_without(kept), sequential_eviction, rtol=1e-5)


def test_the_best_cover_is_the_cheapest_set_with_the_newest_frame():
    cover = random_cover(np.random.default_rng(0), history=7, frames=3, cells=10)
    sets = best_cover(cover, 3, limit=4)
    every = sorted(([*chosen, 6] for chosen in itertools.combinations(range(6), 2)), key=cover.cost)
    assert sets == every[:4]
    assert best_cover(cover, 7) == [list(range(7))]


def test_a_long_history_is_cut_down_row_by_row():
    rng = np.random.default_rng(1)
    distance = rng.random((37, 4, 10)).astype(np.float32) + 1
    for column in range(40):  # seven rows hold everything
        distance[[3, 8, 13, 20, 21, 30, 33][column % 7], column // 10, column % 10] = 0
    cover = Coverage(distance, np.full((4, 10), 9, dtype=np.float32), np.zeros((4, 10), dtype=np.int64))
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
