"""Memory: true ages from one's own decisions, the same in the environment and in a policy."""

from __future__ import annotations

from math import log1p

import numpy as np
import pytest

from agents.adapters import AgentPolicy
from agents.agent_env import AgentVecEnv
from agents.memory import HistoryMemory
from agents.network import RetentionNetwork
from agents.seen import View
from far_env.sb3 import SB3VecEnv
from far_env.vector_env import FrameRetentionVectorEnv


def rows(*names: float) -> list[tuple[float, float, float, float]]:
    return [(name, 0.0, 1.0, 0.5) for name in names]


def test_ages_count_frames_that_were_dropped_and_looks_stay_those_at_birth():
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


def test_frames_born_while_nothing_was_asked_are_counted():
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


def test_environment_and_policy_remember_the_same(tiny_workload):
    """The network's inputs in training are those of the policy on the same history."""
    env = FrameRetentionVectorEnv(3, tiny_workload, 4, autoreset_mode="SAME_STEP", num_clips=16)
    venv = AgentVecEnv(SB3VecEnv(env), [tiny_workload.num_predict] * 3, View(memory=True))
    venv.seed(0)
    observations = venv.reset()
    policies = [AgentPolicy(RetentionNetwork(memory=True)) for _ in range(3)]
    rng = np.random.default_rng(0)
    for _ in range(25):
        assert venv.observation_space.contains({key: value[0] for key, value in observations.items()})
        actions = np.zeros((3, venv.num_slots), dtype=np.int8)
        for row, policy in enumerate(policies):
            num_frames = int(observations["mask"][row].sum())
            step = round(float(observations["budget"][row, 1]) * 11)
            shown = observations["frames"][row, venv.num_slots - num_frames :]
            recalled = policy.memory.recall(shown[:, 2:6].tolist(), step)
            np.testing.assert_allclose(shown[:, 6:], recalled, atol=1e-6)
            kept = [*sorted(rng.choice(num_frames - 1, int(rng.integers(0, 4)), replace=False).tolist()), num_frames - 1]
            policy.memory.keep(kept)
            actions[row, venv.num_slots - num_frames + np.array(kept)] = 1
        observations, _, dones, _ = venv.step(actions)
        for row in np.flatnonzero(dones):
            policies[row] = AgentPolicy(RetentionNetwork(memory=True))


def test_surroundings_are_the_changes_around_a_frame_also_of_dropped_ones():
    def looks(*names):
        return [(1.0, 0.0, name / 100, name / 10) for name in names]

    def known(*names):
        return [value for name in names for value in ((name / 100, name / 10, 1.0) if name else (0.0, 0.0, 0.0))]

    memory = HistoryMemory(surroundings=True)
    first = memory.recall(looks(9, 1, 2, 3, 4, 5), 0)  # what the first frame shows compares it with nothing
    assert [len(row) for row in first] == [19] * 6
    assert [list(row[7:]) for row in first] == [
        known(0, 0, 1, 2),
        known(0, 1, 2, 3),
        known(1, 2, 3, 4),
        known(2, 3, 4, 5),
        known(3, 4, 5, 0),
        known(4, 5, 0, 0),
    ]
    memory.keep([0, 3, 5])
    later = memory.recall(looks(9, 70, 80, 6), 1)  # changes from other neighbours are not remembered
    assert [list(row[7:]) for row in later] == [known(0, 0, 1, 2), known(2, 3, 4, 5), known(4, 5, 6, 0), known(5, 6, 0, 0)]
    memory.keep([1, 2, 3])
    assert memory.recall(looks(9, 1, 2, 3, 4, 5), 0) == first, "another clip"
