"""The trackers on videos of which the shots, or the camera's path, are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from far_env.baselines import make
from far_env.baselines.tracking import PathTracking
from far_env.contract import RetentionPolicy, RolloutState, apply_plan
from far_env.frame_meta import frame_features, frame_meta_list

SIZE = 0.0039


def pictures(numbers: list[int], seed: int, noise: float = 0.02) -> torch.Tensor:
    """Latents (T, 4, 8, 8) of frames that show the picture of these numbers, with a little noise.

    Pictures are unrelated, so that every change from one to another has its own size and direction.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randn((max(numbers) + 1, 4, 8, 8), generator=generator)
    shown *= torch.linspace(0.7, 1.3, len(shown))[:, None, None, None]
    return shown[numbers] + noise * torch.randn((len(numbers), 4, 8, 8), generator=generator)


def play(policy: RetentionPolicy, latents: torch.Tensor, num_context: int, budget: int) -> list[tuple[list[int], list[int]]]:
    """Frames before and after each call, as in the benchmark."""
    kept, calls = list(range(num_context)), []
    total = len(latents) - num_context
    for step in range(total):
        kept.append(num_context + step)
        if len(kept) > budget:
            metas = frame_meta_list(frame_features(latents[None, kept])[0], step, SIZE)
            state = RolloutState(step, budget * SIZE, total)
            plan = policy.build_temporal_cache_plan(metas, state, {"max_frames": budget, "capacity_mb": budget * SIZE})
            before = list(kept)
            kept = [kept[i] for i in apply_plan(plan, len(kept), budget)]
            calls.append((before, kept))
    return calls


def random_cuts(rng: np.random.Generator, num_shots: int, length: int) -> list[int]:
    """All shots at first, then segments of 2 to 6 frames, each of another shot than the one before."""
    shots = list(range(num_shots))
    while len(shots) < length:
        shot = int((shots[-1] + rng.integers(1, num_shots)) % num_shots)
        shots += [shot] * int(rng.integers(2, 7))
    return shots[:length]


@pytest.mark.parametrize("fill", ["newest", "shots"])
def test_the_scene_tracker_keeps_the_newest_frame_of_every_shot(fill):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shots = random_cuts(rng, 3, 40)
        calls = play(make("scene_tracker", fill=fill), pictures(shots, seed), 5, 4)
        assert len(calls) == 35
        for before, kept in calls:
            newest_of = {shots[frame]: frame for frame in before}
            assert set(newest_of.values()) <= set(kept)


def test_the_scene_tracker_forgets_the_shot_that_was_seen_longest_ago():
    shots = [0, 0, 1, 1, 2, 2, 1, 1]
    _, kept = play(make("scene_tracker"), pictures(shots, 0), 5, 2)[-1]
    assert kept == [5, 7]


def walk(rng: np.random.Generator, num_points: int, length: int, ring: bool) -> list[int]:
    """A way along points, a turn now and then, after a first pass that shows them all."""
    points = list(range(num_points))
    if ring:
        points += [0, 1]
    direction = 1 if ring else -1
    while len(points) < length:
        for _ in range(int(rng.integers(2, num_points))):
            following = points[-1] + direction
            if not ring and not 0 <= following < num_points:
                break
            points.append(following % num_points)
        direction = -direction
    return points[:length]


@pytest.mark.parametrize("ring", [False, True])
def test_the_path_is_found_from_the_changes_alone(ring):
    right = total = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        points = walk(rng, 7, 40, ring)
        latents = pictures(points, seed, noise=0.0)
        tracking = PathTracking()
        tracking.observe(1, -1)
        features = frame_features(latents[None])[0]
        for frame in range(1, len(points)):
            tracking.births.append(frame)
            similarity, motion = features[frame, 2].item(), features[frame, 3].item()
            tracking.follow((similarity, motion / (1 + motion)))
        ahead, length = tracking.along_path()
        assert length == (7 if ring else 0)
        relative = [(point - points[-1] + 3) % 7 - 3 if ring else point - points[-1] for point in points]
        # Which way is ahead is not known.
        agreement = max(np.mean(np.array(ahead) == sign * np.array(relative)) for sign in (1, -1))
        right += agreement * len(points)
        total += len(points)
    assert right / total > 0.95


def test_the_path_tracker_keeps_each_point_once_and_the_frame_that_was_seen_first():
    points = [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
    calls = play(make("path_tracker"), pictures(points, 3, noise=0.0), 5, 5)
    for before, kept in calls:
        assert len({points[frame] for frame in kept}) == len({points[frame] for frame in before})
    assert calls[-1][1][:4] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("scene_tracker", {"fill": "newst"}, "unknown fill 'newst'; did you mean 'newest'"),
        ("path_tracker", {"near": -1.0}, "near must be at least 0"),
        ("path_tracker", {"drop": "old"}, "unknown drop 'old'"),
    ],
)
def test_parameters_out_of_range_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(name, **parameters)
