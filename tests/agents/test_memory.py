"""Memory: true ages from earlier decisions, the same in the environment and in a policy."""

from __future__ import annotations

import itertools
from math import log1p

import numpy as np
import pytest
import torch

from far_env.agents.expert_data import TrueHistories
from far_env.agents.memory import HistoryMemory
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import ObservationSpec
from far_env.agents.observation_wrapper import AgentVecEnv
from far_env.agents.policies import AgentPolicy
from far_env.envs.sb3 import SB3VecEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.frame_meta import frame_features
from far_env.workloads import make_workload


def rows(*names: float) -> list[tuple[float, float, float, float]]:
    return [(name, 0.0, 1.0, 0.5) for name in names]


def test_ages_count_frames_that_were_dropped_and_features_stay_those_at_birth():
    memory = HistoryMemory()
    # six frames at step 0: five of context and the first that was generated
    first = memory.recall(rows(0, 1, 2, 3, 4, 5), 0)
    assert [row[0] for row in first] == pytest.approx([log1p(age) / 4 for age in (5, 4, 3, 2, 1, 0)])
    assert [row[1] for row in first] == [0, 0, 0, 0, 0, 1]
    memory.keep([0, 2, 4, 5])
    later = memory.recall(rows(0.9, 0.8, 0.7, 0.6, 6), 1)
    assert [row[0] for row in later] == pytest.approx([log1p(age) / 4 for age in (6, 4, 2, 1, 0)])
    assert [row[1] for row in later] == [0, 0, 0, 1, 1]
    assert [row[2] for row in later] == pytest.approx([log1p(gap) / 3 for gap in (0, 2, 2, 1, 1)])
    assert [row[3] for row in later] == [0, 2, 4, 5, 6]


def test_frames_generated_between_calls_are_counted():
    memory = HistoryMemory()
    memory.recall(rows(0, 1, 2, 3, 4, 5), 0)
    memory.keep([5])
    births = memory.recall(rows(5, 6, 7, 8, 9), 4) and memory.births
    assert births == [5, 6, 7, 8, 9]


def test_a_new_clip_begins_anew():
    memory = HistoryMemory()
    memory.recall(rows(0, 1, 2, 3, 4, 5), 9)
    memory.keep([0, 5])
    assert memory.recall(rows(7, 8, 9), 1) == HistoryMemory().recall(rows(7, 8, 9), 1)


@pytest.mark.parametrize("further", [{}, {"surroundings": True, "places": True, "path": True}], ids=["ages", "all"])
def test_environment_and_policy_remember_the_same(tiny_workload, further):
    """The network's inputs in training are those of the policy on the same history."""
    env = FrameRetentionVectorEnv(3, tiny_workload, 4, autoreset_mode="SAME_STEP", num_clips=16)
    venv = AgentVecEnv(SB3VecEnv(env), [tiny_workload.num_predict] * 3, ObservationSpec(memory=True, **further))
    venv.seed(0)
    observations = venv.reset()
    policies = [AgentPolicy(RetentionNetwork(memory=True, **further)) for _ in range(3)]
    rng = np.random.default_rng(0)
    for _ in range(25):
        assert venv.observation_space.contains({key: value[0] for key, value in observations.items()})
        actions = np.zeros((3, venv.num_slots), dtype=np.int8)
        for row, policy in enumerate(policies):
            num_frames = int(observations["mask"][row].sum())
            step = round(float(observations["budget"][row, 1]) * 11)
            rows = observations["frames"][row, venv.num_slots - num_frames :]
            recalled = policy.memory.recall(rows[:, 2:6].tolist(), step)
            np.testing.assert_allclose(rows[:, 6:], recalled, atol=1e-6)
            kept = [*sorted(rng.choice(num_frames - 1, int(rng.integers(0, 4)), replace=False).tolist()), num_frames - 1]
            policy.memory.keep(kept)
            actions[row, venv.num_slots - num_frames + np.array(kept)] = 1
        observations, _, dones, _ = venv.step(actions)
        for row in np.flatnonzero(dones):
            policies[row] = AgentPolicy(RetentionNetwork(memory=True, **further))


def test_surroundings_are_the_changes_around_a_frame_also_of_dropped_ones():
    def features_of(*names):
        return [(1.0, 0.0, name / 100, name / 10) for name in names]

    def neighbours(*names):
        return [value for name in names for value in ((name / 100, name / 10, 1.0) if name else (0.0, 0.0, 0.0))]

    memory = HistoryMemory(surroundings=True)
    first = memory.recall(features_of(9, 1, 2, 3, 4, 5), 0)  # the first frame has no change before it
    assert [len(row) for row in first] == [19] * 6
    assert [list(row[7:]) for row in first] == [
        neighbours(0, 0, 1, 2),
        neighbours(0, 1, 2, 3),
        neighbours(1, 2, 3, 4),
        neighbours(2, 3, 4, 5),
        neighbours(3, 4, 5, 0),
        neighbours(4, 5, 0, 0),
    ]
    memory.keep([0, 3, 5])
    later = memory.recall(features_of(9, 70, 80, 6), 1)  # changes from other neighbours are not remembered
    assert [list(row[7:]) for row in later] == [
        neighbours(0, 0, 1, 2),
        neighbours(2, 3, 4, 5),
        neighbours(4, 5, 6, 0),
        neighbours(5, 6, 0, 0),
    ]
    memory.keep([1, 2, 3])
    assert memory.recall(features_of(9, 1, 2, 3, 4, 5), 0) == first, "another clip"


def test_places_are_inferred_from_neighbours_the_oldest_frame_and_earlier_changes():
    """Features by hand: two frames of one place have similarity 0.9 and drift 0.5; those of each pair of places differ."""
    unlike = {(1, 2): 0.30, (1, 3): 0.20, (1, 4): 0.10, (2, 3): 0.05, (2, 4): 0.25, (3, 4): 0.15}

    def features_of(*places):
        rows = [(0.0, 0.0, 1.0, 0.0)]
        for before, place in itertools.pairwise(places):
            similarity = 0.9 if place == before else unlike[min(place, before), max(place, before)]
            rows.append((1.0, 0.5 if place == places[0] else 1.0, similarity, 0.5 - similarity))
        return rows

    def places_at(step, *places):
        return [round(16 * row[19]) for row in memory.recall(features_of(*places), step)]

    memory = HistoryMemory(surroundings=True, places=True)
    assert places_at(0, 1, 1, 2, 3, 4, 4) == [1, 1, 2, 3, 4, 4]
    memory.keep([1, 2, 3, 5])  # 1 2 3 4
    assert places_at(1, 1, 2, 3, 4, 3) == [1, 2, 3, 4, 3], (
        "neither neighbour nor oldest: the change from 4 to 3 is that from 3 to 4"
    )
    memory.keep([0, 1, 3, 4])  # 1 2 4 3
    assert places_at(2, 1, 2, 4, 3, 1) == [1, 2, 3, 4, 1]
    memory.keep([1, 2, 3, 4])  # 2 4 3 1
    assert places_at(3, 2, 4, 3, 1, 4) == [1, 2, 3, 4, 2], (
        "there was no change from 1 to 4 before; that from 1 to 3 was another"
    )
    memory.keep([0, 1, 2, 3])
    memory.places[2] = memory.places[3]
    assert places_at(4, 2, 4, 3, 1, 1) == [1, 2, 3, 4, 4], (
        "neighbours that differ are in two places, whatever was inferred before"
    )
    assert places_at(0, 2, 2, 3, 3, 1, 4) == [1, 1, 2, 2, 3, 4], "another clip"


@torch.no_grad()
def test_shots_are_distinguished_on_real_latents():
    workload = make_workload("cuts", device="cpu")
    clips = [workload.clips.clip("train", i) for i in range(32)]
    latents = workload.host.autoencoder.encode(torch.stack([torch.from_numpy(clip.frames) for clip in clips]))
    histories, rng, right = TrueHistories(latents, 5), np.random.default_rng(0), []
    memories = [HistoryMemory(surroundings=True, places=True) for _ in clips]
    for step in range(10):
        histories.advance(range(32))
        for row, (clip, memory) in enumerate(zip(clips, memories, strict=True)):
            features = histories.features([row])[0]
            features[:, 3] /= 1 + features[:, 3]
            places = [recalled[19] for recalled in memory.recall(features.tolist(), step)]
            shots = clip.actions[histories.kept[row]]
            right.append((np.equal.outer(places, places) == np.equal.outer(shots, shots)).all())
            newest_of_shots = [int(np.flatnonzero(shots == shot)[-1]) for shot in dict.fromkeys(shots.tolist())]
            spare = rng.permutation([i for i in range(len(shots)) if i not in newest_of_shots])
            kept = sorted([*newest_of_shots, *spare[: 4 - len(newest_of_shots)].tolist()])
            histories.retain(row, kept)
            memory.keep(kept)
    assert np.mean(right) > 0.93


def along(points, stretches, ring=0):
    """Features of frames at these points of a path, from the similarity of each stretch; without motion frames are similar."""
    rows = [(0.0, 0.0, 1.0, 0.0)]
    for before, after in itertools.pairwise(points):
        if after == before:
            rows.append((0.1, 0.5, 0.8, 0.1))
            continue
        stretch = min(after, before) % ring if ring else min(after, before)
        rows.append((1.0, 1.0, stretches[stretch], 0.5 - stretches[stretch] / 3))
    return rows


def test_a_path_is_followed_forth_and_back_and_through_frames_that_were_dropped():
    stretches = {0: 0.10, 1: 0.20, 2: 0.30, 3: 0.40, -1: 0.15}
    points = [0, 1, 2, 3, 3, 3, 2, 1, 0, -1, -1, 0, 1]
    features = along(points, stretches)
    memory = HistoryMemory(surroundings=True, path=True)
    memory.recall(features[:6], 0)
    assert [row[-3:] for row in memory.recall(features[:6], 0)] == [(point / 8, 0.0, 1.0) for point in (-3, -2, -1, 0, 0, 0)]
    kept = list(range(6))
    for newest in range(6, len(points)):
        kept = [kept[0], kept[2], kept[-2], kept[-1], newest]
        memory.keep([0, 2, -2, -1][: len(memory.births)])
        recalled = [row[-3:] for row in memory.recall([features[frame] for frame in kept], newest - 5)]
        moves = [later - before for before, later in itertools.pairwise(points[: newest + 1]) if later != before]
        assert recalled == [(moves[-1] * (points[frame] - points[newest]) / 8, 0.0, 1.0) for frame in kept], newest
    assert memory.recall(features[:6], 0) == HistoryMemory(surroundings=True, path=True).recall(features[:6], 0), "another clip"


def test_a_path_that_meets_itself_is_a_ring():
    stretches = {number: similarity / 20 for number, similarity in enumerate((3, 7, 1, 9, 5, 2, 8))}
    points = [*range(5), *range(3, 12)]  # 0 to 4, back to 3, and on to 11, which is 4 again
    memory = HistoryMemory(surroundings=True, path=True)
    recalled = memory.recall(along(points, stretches, ring=7), 0)
    here = points[-1]
    expected = [min(((point - here) % 7, (point - here) % 7 - 7), key=abs) / 8 for point in points]
    assert [row[-3:] for row in recalled] == [(ahead, 7 / 16, 1.0) for ahead in expected]


@pytest.mark.parametrize(("name", "share"), [("orbit", 0.9), ("pan", 0.6)])
@torch.no_grad()
def test_a_camera_is_followed_on_real_latents(name, share):
    """In most clips every frame is found where the camera was, up to which way is ahead."""
    workload = make_workload(name, device="cpu")
    right = []
    for number in range(24):
        clip = workload.clips.clip("train", number)
        latents = workload.host.autoencoder.encode(torch.from_numpy(clip.frames)[None])
        features = frame_features(latents.float())[0].numpy()
        features[:, 3] /= 1 + features[:, 3]
        recalled = HistoryMemory(surroundings=True, path=True).recall(features.tolist(), workload.num_predict - 1)
        ahead, ring = np.array([row[-3] for row in recalled]) * 8, round(recalled[0][-2] * 16)
        moves = 2 * clip.actions[1:] - 1 if name == "orbit" else clip.actions[1:] - 2
        places = np.concatenate([[0], np.cumsum(moves)])
        same = np.equal.outer(places, places) if name == "pan" else np.subtract.outer(places, places) % 12 == 0
        distances = np.subtract.outer(ahead, ahead).round()
        right.append(((distances % ring if ring else distances) == 0).tolist() == same.tolist())
    assert np.mean(right) > share
