"""Comparing frames by their surroundings: against plain loops, with NumPy and torch alike, and on a camera that comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from far_env.agents.memory import HistoryMemory
from far_env.agents.network import RetentionNetwork
from far_env.agents.surroundings import (
    NUM_EDGES,
    NUM_PATH_EDGES,
    NUM_PATH_ROWS,
    NUM_PLACE_EDGES,
    NUM_PLACE_ROWS,
    NUM_ROWS,
    compare,
)


def recalled(similarities, motions, kept):
    """The memory of the kept frames of a clip whose frames changed so; the first change leads to frame 1."""
    memory = HistoryMemory(surroundings=True)
    count = len(similarities) + 1
    looks = [(1.0, 1.0, 1.0, 0.0), *((1.0, 1.0, s, m) for s, m in zip(similarities, motions, strict=True))]
    memory.recall(looks, count - 6)
    memory.keep(kept)
    return np.array(memory.recall([looks[i] for i in kept] + [(1.0, 1.0, 0.0, 0.0)], count - 5), dtype=np.float32)[:-1]


def agreement(one, other, scale):
    if one is None or other is None:
        return 0.0
    return math.exp(-math.dist(one, other) / scale)


def test_agreements_are_those_of_plain_loops_in_torch_and_numpy():
    rng = np.random.default_rng(0)
    similarities, motions = rng.integers(0, 3, 11) / 50, rng.integers(0, 3, 11) / 40
    kept = [0, 1, 4, 5, 9, 11]
    remembered = recalled(similarities, motions, kept)
    rows, edges = compare(np, remembered)
    assert rows.shape == (6, NUM_ROWS) and edges.shape == (6, 6, NUM_EDGES)
    for actual, expected in zip(compare(torch, torch.from_numpy(remembered)), (rows, edges), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)
    changes = {i + 1: change for i, change in enumerate(zip(similarities, motions, strict=True))}
    changes[12] = (0.0, 0.0)  # to the new frame of the last call
    best = np.zeros((6, 6))
    for i, number in enumerate(kept):
        before, after = ((changes.get(number), changes.get(number - 1)), (changes.get(number + 1), changes.get(number + 2)))
        for j, other in enumerate(kept):
            past, next_ = ((changes.get(other), changes.get(other - 1)), (changes.get(other + 1), changes.get(other + 2)))
            expected, both = [], {0.004: [], 0.03: []}
            for one, two in ((before, past), (after, next_), (before, next_), (after, past)):
                expected += [agreement(one[0], two[0], scale) for scale in (0.004, 0.03)]
                for scale in (0.004, 0.03):
                    pair = [agreement(one[k], two[k], scale) for k in range(2)]
                    both[scale].append(min(pair))
                    expected.append(min(pair))
            gap = number - other
            expected += [max(both[0.004]), max(both[0.03]), np.clip(gap, -1, 1), math.log1p(abs(gap)) / 3, float(i == j)]
            np.testing.assert_allclose(edges[i, j], expected, atol=2e-3)
            best[i, j] = max(both[0.03]) * (i != j)
    np.testing.assert_allclose(rows[:, 0], best.max(axis=1), atol=2e-3)
    np.testing.assert_allclose(rows[:, 1], [best[i, i + 1 :].max(initial=0) for i in range(6)], atol=2e-3)


def test_a_camera_that_comes_back_is_recognised():
    """Ten places on a ring; from one to the next the picture changes as nowhere else. Where two changes are known on one side,
    frames agree if and only if they show the same place."""
    moves = [1, 1, 1, 1, 1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1]
    places = np.cumsum([0, *moves]) % 10
    ring = np.random.default_rng(1).permutation(10) / 10
    passed = [ring[place if move > 0 else (place - 1) % 10] for place, move in zip(places, moves, strict=False)]
    kept = list(range(2, len(places) - 2))
    _, edges = compare(np, recalled([0.5] * len(passed), passed, kept))
    same_place = edges[..., 16] > 0.5
    expected = places[kept][:, None] == places[kept][None]
    np.testing.assert_array_equal(same_place | np.eye(len(kept), dtype=bool), expected)


def test_what_shows_the_same_place_is_told_alike_in_torch_and_numpy():
    births, places = [0, 3, 4, 7, 8, 9], [2, 1, 2, 3, 1, 2]
    remembered = np.zeros((6, 20), dtype=np.float32)
    remembered[:, 0] = np.log1p(9 - np.array(births)) / 4
    remembered[:, 19] = np.array(places) / 16
    rows, edges = compare(np, remembered)
    assert rows.shape == (6, NUM_ROWS + NUM_PLACE_ROWS) and edges.shape == (6, 6, NUM_EDGES + NUM_PLACE_EDGES)
    for actual, expected in zip(compare(torch, torch.from_numpy(remembered)), (rows, edges), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(edges[..., -1], np.equal.outer(places, places), atol=1e-6)
    newer, older, newest = rows[:, NUM_ROWS:].T
    np.testing.assert_allclose(newer, [1, 1, 1, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(older, [0, 0, 1, 0, 1, 1], atol=1e-5)
    np.testing.assert_allclose(newest, [1, 0, 1, 0, 0, 1], atol=1e-5)


def test_distances_along_a_path_and_around_a_ring_are_told_alike_in_torch_and_numpy():
    births, points, ring = [0, 3, 4, 7, 8, 9], [-5, 1, 4, -5, 6, 0], 11
    remembered = np.zeros((7, 22), dtype=np.float32)  # the first row is padding
    remembered[1:, 0] = np.log1p(9 - np.array(births)) / 4
    remembered[1:, 19:] = [(point / 8, ring / 16, 1) for point in points]
    rows, edges = compare(np, remembered)
    assert rows.shape == (7, NUM_ROWS + NUM_PATH_ROWS) and edges.shape == (7, 7, NUM_EDGES + NUM_PATH_EDGES)
    for actual, expected in zip(compare(torch, torch.from_numpy(remembered)), (rows, edges), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)
    apart = np.array([[(point - other + 5) % ring - 5 for other in points] for point in points])
    same, ahead, behind, distance = np.moveaxis(edges[1:, 1:, NUM_EDGES:], -1, 0)
    for values, expected in ((same, 0), (ahead, 1), (behind, -1)):
        np.testing.assert_allclose(values, apart == expected, atol=1e-6)
    np.testing.assert_allclose(distance, apart / 8, atol=1e-5)
    assert not edges[0, 1:, NUM_EDGES:].any() and not edges[1:, 0, NUM_EDGES:].any()
    newer, older, newest, next_ahead, next_behind = rows[1:, NUM_ROWS:].T
    np.testing.assert_allclose(newer, [1, 0, 0, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(older, [0, 0, 0, 1, 1, 0], atol=1e-5)
    np.testing.assert_allclose(newest, [0, 0, 0, 0, 0, 1], atol=1e-5)
    for actual, side in ((next_ahead, -apart), (next_behind, apart)):
        nearest = [min((other for other in row if other > 0), default=8) for row in side]
        np.testing.assert_allclose(actual, 1 - np.array(nearest) / 8, atol=1e-5)
    # Without a ring, a path does not end.
    remembered[:, 20] = 0
    np.testing.assert_allclose(compare(np, remembered)[1][1:, 1:, -1], np.subtract.outer(points, points).clip(-8, 8) / 8)


def test_places_need_surroundings():
    with pytest.raises(ValueError, match="places and path are inferred from surroundings: set surroundings as well"):
        RetentionNetwork(memory=True, places=True)
    network = RetentionNetwork(memory=True, surroundings=True, places=True, path=True)
    assert sum(p.numel() for p in network.parameters()) < 100_000


def test_surroundings_need_memory():
    with pytest.raises(ValueError, match="surroundings need memory: set memory as well"):
        RetentionNetwork(surroundings=True)
    assert sum(p.numel() for p in RetentionNetwork(memory=True, surroundings=True).parameters()) < 100_000
