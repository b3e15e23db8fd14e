"""Worlds: deterministic, disjoint by split, as described, and predictable from the context."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from far_env.clips.worlds import GRID_WORLDS, WORLDS
from far_env.workloads import make_workload
from tests.conftest import DATA

SCENERY = slice(0, 48)
WIDE = ["pan_wide", "cuts_wide", "orbit_wide"]


def clips(name: str, split: str, count: int = 40, **options: object) -> list:
    world = replace(WORLDS[name], **options)
    return [world.clip(split, i) for i in range(count)]


def plain(name: str, count: int = 40) -> list:
    """Train clips of a world without the effects that all worlds can have."""
    return clips(name, "train", count, objects=0, brightness_drift=0.0, noise=0.0)


@pytest.mark.parametrize("name", WORLDS)
def test_a_clip_is_a_function_of_split_and_id(name):
    first, again = WORLDS[name].clip("test", 7), WORLDS[name].clip("test", 7)
    assert first.frames.shape == (WORLDS[name].num_frames, 3, 64, 64)
    assert first.actions.shape == first.frames.shape[:1]
    assert first.frames.dtype == np.float32
    assert first.frames.min() >= 0 and first.frames.max() <= 1
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.actions, again.actions)


@pytest.mark.parametrize("name", ["pan", "cuts", "orbit"])
def test_the_clips_are_those_that_hosts_and_policies_were_trained_on(name):
    """The fixture was made before the worlds took options."""
    fixture = json.loads((DATA / "world_clips.json").read_text())
    for split in ("train", "validation", "test"):
        digest = hashlib.sha256()
        for clip in clips(name, split, fixture["clips"]):
            digest.update(clip.frames.tobytes() + clip.actions.tobytes())
        assert digest.hexdigest() == fixture["sha256"][f"{name}/{split}"]


@pytest.mark.parametrize("name", GRID_WORLDS)
def test_splits_share_no_scenery(name):
    sceneries = [
        clip.frames[0, :, SCENERY].tobytes() for split in ("train", "validation", "test") for clip in clips(name, split)
    ]
    assert len(set(sceneries)) == len(sceneries)


def test_panning_moves_the_scenery_by_the_action_and_shows_nothing_new_after_the_context():
    for clip in clips("pan", "train"):
        columns = set()
        for t, frame in enumerate(clip.frames):
            if t:
                shift = (int(clip.actions[t]) - 2) * 16
                before, now = clip.frames[t - 1][:, :56], frame[:, :56]
                if shift >= 0:
                    np.testing.assert_array_equal(before[:, :, shift:], now[:, :, : 64 - shift])
                else:
                    np.testing.assert_array_equal(before[:, :, :shift], now[:, :, -shift:])
            visible = {frame[:, :56, x].tobytes() for x in range(0, 64, 4)}
            if t < 5:
                columns |= visible
            else:
                assert visible <= columns


def test_pan_uses_every_action():
    moves = np.concatenate([clip.actions[1:] for clip in clips("pan", "train", 200)])
    assert set(moves) == {0, 1, 2, 3, 4}


def test_orbit_turns_around_a_closed_panorama_and_back_and_shows_nothing_new_after_the_context():
    turns, around = 0, 0
    for clip in clips("orbit", "train", 30):
        places = np.cumsum(np.where(clip.actions == 1, 1, -1)) % 12
        picture: dict[int, np.ndarray] = {}
        for t, (place, frame) in enumerate(zip(places, clip.frames, strict=True)):
            halves = {int(place): frame[:, :56, :32], int(place + 1) % 12: frame[:, :56, 32:]}
            for half, content in halves.items():
                assert t < 36 or half in picture, "everything visible later was visible in the context"
                np.testing.assert_array_equal(picture.setdefault(half, content), content)
        turns += int((np.diff(clip.actions[1:]) != 0).sum())
        around += len(picture) == 12
    assert turns > 30 * 5 and around > 15


def test_cuts_show_every_shot_in_the_context_and_resume_its_block():
    counts = set()
    for clip in clips("cuts", "train", 100):
        shots = clip.actions
        counts.add(len(np.unique(shots)))
        assert set(shots[:5]) == set(shots)
        changes = np.flatnonzero(np.diff(shots)) + 1
        later = changes[changes >= 5]
        assert all(np.diff(later) >= 2), "segments last at least two frames"
        for shot in np.unique(shots):
            white = (clip.frames[shots == shot][:, :, SCENERY] == 1).all(axis=1)
            for before, now in itertools.pairwise(white):
                assert any((np.roll(before, direction * 8, axis=1) == now).all() for direction in (-1, 1))
            assert all(now.sum() == 12 * 8 for now in white), "the lit part of the block is 8 × 12 px"
    assert counts == {2, 3, 4}


@pytest.mark.parametrize("name", GRID_WORLDS)
def test_the_schedule_strip_rolls_one_cell_per_frame(name):
    for clip in plain(name, 10):
        length = len(clip.frames)
        strips = clip.frames[:, :, 56:].reshape(length, 3, 2, 4, 8, 8)[:, :, :, 0, :, 0].reshape(length, 3, 16)
        for t in range(length - 1):
            np.testing.assert_array_equal(np.roll(strips[t], -1, axis=1), strips[t + 1])


@pytest.mark.parametrize("name", GRID_WORLDS)
def test_the_strip_shows_the_next_action(name):
    colour_of: dict[tuple, int] = {}
    for clip in plain(name, 10):
        if "cuts" in name:
            colour_of = {}  # a shot's colour is drawn per clip
        for t in range(len(clip.frames) - 1):
            colour = tuple(clip.frames[t, :, 56, 0])
            assert colour_of.setdefault(colour, clip.actions[t + 1]) == clip.actions[t + 1]


def test_a_wide_pan_moves_in_eight_directions_and_shows_nothing_new_after_the_context():
    directions = set(itertools.product((-1, 0, 1), repeat=2))
    moves = sorted({(step * across, step * down) for step in (1, 2, 3, 4, 6, 8) for across, down in directions})
    used = set()
    for clip in plain("pan_wide", 200):
        places = np.cumsum([moves[action] for action in clip.actions], axis=0)
        seen: dict[tuple[int, int], bytes] = {}
        for t, ((column, row), frame) in enumerate(zip(places, clip.frames, strict=True)):
            cells = frame[:, :48:4, ::4].transpose(1, 2, 0)
            for y, x in np.ndindex(12, 16):
                place = (row + y, column + x)
                assert t < 5 or place in seen, "everything visible later was visible in the context"
                assert seen.setdefault(place, cells[y, x].tobytes()) == cells[y, x].tobytes()
            assert t == 0 or not (frame[:, 52:56] - frame[:, 52:53, :1]).any(), "the ruler's lower row tells the height"
        used |= {moves[action] for action in clip.actions}
    assert used == set(moves)


def test_a_wide_orbit_turns_by_one_length_per_clip_and_shows_nothing_new_after_the_context():
    lengths = set()
    for clip in plain("orbit_wide", 60):
        frames, signs = clip.frames[:, :, :56], 2 * clip.actions - 1

        def turned_by(pixels, frames=frames, signs=signs):
            pairs = [(a, b) if sign > 0 else (b, a) for (a, b), sign in zip(itertools.pairwise(frames), signs[1:], strict=True)]
            return all(np.array_equal(before[..., pixels:], after[..., : 64 - pixels]) for before, after in pairs)

        (length,) = [pixels for pixels in (8, 12, 16, 24, 32, 40, 48) if turned_by(pixels)]
        lengths.add(length)
        columns = [{frame[..., x].tobytes() for x in range(0, 64, 4)} for frame in frames]
        assert set().union(*columns[36:]) <= set().union(*columns[:36])
        assert len(set().union(*columns)) <= 128, "a ring of 512 px"
    assert lengths == {8, 12, 16, 24, 32, 40, 48}


def test_wide_cuts_have_up_to_five_shots_whose_blocks_move_in_six_directions():
    counts, moves = set(), set()
    for clip in plain("cuts_wide", 150):
        shots = clip.actions
        assert set(shots[:5]) == set(shots)
        counts.add(len(np.unique(shots)))
        for shot in np.unique(shots):
            white = (clip.frames[shots == shot][:, :, SCENERY] == 1).all(axis=1)
            possible = {
                (down * pixels, across * pixels)
                for pixels, down, across in itertools.product((4, 8, 12, 16), (-1, 0, 1), (-1, 1))
                if all((np.roll(a, (down * pixels, across * pixels), (0, 1)) == b).all() for a, b in itertools.pairwise(white))
            }
            assert possible
            moves |= possible if len(possible) == 1 else set()
    assert counts == {2, 3, 4, 5}
    assert moves == {(down * p, across * p) for p, down, across in itertools.product((4, 8, 12, 16), (-1, 0, 1), (-1, 1))}


@pytest.mark.parametrize("name", GRID_WORLDS)
def test_effects_change_what_they_should_and_nothing_else(name):
    noises, swings, hidden = [], [], []
    for i, clip in enumerate(plain(name, 12)):

        def changed(i=i, clip=clip, **options):
            other = replace(WORLDS[name], **({"objects": 0, "brightness_drift": 0.0, "noise": 0.0} | options)).clip("train", i)
            assert np.array_equal(other.actions, clip.actions) and other.frames.dtype == np.float32
            assert other.frames.min() >= 0 and other.frames.max() <= 1
            return other.frames

        inside = (clip.frames > 0.2) & (clip.frames < 0.8)
        noises.append((changed(noise=0.04) - clip.frames)[inside].std())
        ratios = (changed(brightness_drift=0.2) / clip.frames.clip(1e-9))[:, 0], inside[:, 0]
        factors = [ratio[frame_inside] for ratio, frame_inside in zip(*ratios, strict=True) if frame_inside.any()]
        assert max(np.ptp(factor) for factor in factors) < 1e-4, "one factor per frame"
        swings.append(max(abs(factor.mean() - 1) for factor in factors))
        differing = (changed(objects=3) != clip.frames).any(axis=1)
        assert not differing[:, 48:].any(), "ruler and strip stay visible"
        hidden.append(differing[:, SCENERY].mean())
    assert min(noises) > 0 and 0.02 < max(noises) <= 0.042
    assert 0.05 < max(swings) <= 0.2001
    assert 0 in hidden and 0.02 < max(hidden) < 0.3


def test_objects_move_straight_at_one_speed():
    speeds = set()
    for i in range(40):
        with_object, without = (replace(WORLDS["orbit"], objects=n).clip("train", i).frames for n in (1, 0))
        masks = [mask[:48:4, ::4] for mask in (with_object != without).any(axis=1)]
        possible = {
            (down, across)
            for down, across in itertools.product(range(-2, 3), repeat=2)
            if all(np.array_equal(np.roll(a, (down, across), (0, 1)), b) for a, b in itertools.pairwise(masks))
        }
        assert possible, i
        speeds |= possible if len(possible) == 1 else set()
    assert len(speeds) > 8


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pan", {"step_pixels": (6,)}, r"world pan: step_pixels must be a list of different multiples of 4 from 4 to 64, got"),
        ("pan", {"step_pixels": ()}, "step_pixels must be"),
        ("pan", {"step_pixels": 16}, r"step_pixels must be .* got 16"),
        ("pan", {"step_pixels": (64,)}, "panorama_width must be a whole number from 320 to 4096, got 192"),
        ("pan", {"moves": (2, 5)}, "moves must be two whole numbers from 1 to 4, the smaller first, got"),
        ("pan", {"moves": (3, 2)}, "the smaller first"),
        ("pan", {"diagonal": "yes"}, "diagonal must be true or false, got 'yes'"),
        ("pan", {"noise": 2}, "noise must be a number from 0 to 0.5, got 2"),
        ("pan", {"noise": float("nan")}, "noise must be a number from 0 to 0.5, got nan"),
        ("cuts", {"objects": True}, "objects must be a whole number from 0 to 16, got True"),
        ("cuts", {"num_shots": (1, 3)}, "num_shots must be two whole numbers from 2 to 5"),
        ("cuts", {"shot_frames": "2-8"}, "shot_frames must be two whole numbers from 1 to 16, the smaller first, got '2-8'"),
        ("orbit", {"panorama_width": 130}, "panorama_width must be a multiple of 4, got 130"),
        ("orbit", {"turn_pixels": [4, 4]}, "turn_pixels must be a list of different multiples"),
    ],
)
def test_options_out_of_range_are_refused_before_a_clip_is_drawn(name, options, message, tiny_host_folder):
    with pytest.raises(ValueError, match=message):
        replace(WORLDS[name], **options)
    with pytest.raises(ValueError, match=message):
        make_workload(name, host=str(tiny_host_folder), device="cpu", **options)


def test_an_orbit_that_cannot_come_back_in_time_is_told_in_one_sentence():
    world = replace(WORLDS["orbit"], turn_pixels=[64], long_runs=[8, 8], short_runs=[1, 1], panorama_width=4096)
    with pytest.raises(
        ValueError, match="in none of 2000 walks by 64 px did the first 36 frames show everything; use a narrower"
    ):
        world.clip("train", 0)


def test_bad_ids_and_splits_are_refused():
    with pytest.raises(IndexError, match="clip id 4096 is out of range: pan/test has clips 0 to 4095"):
        WORLDS["pan"].clip("test", 4096)
    with pytest.raises(IndexError, match="clip id -1"):
        WORLDS["pan"].clip("test", -1)
    with pytest.raises(ValueError, match="unknown split 'val'"):
        WORLDS["pan"].clip("val", 0)
