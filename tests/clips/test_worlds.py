"""Worlds: deterministic, disjoint by split, as described, and predictable from the context."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest

from far_env.clips.worlds import WORLDS
from tests.conftest import DATA

SCENERY = slice(0, 48)


def clips(name: str, split: str, count: int = 40) -> list:
    return [WORLDS[name].clip(split, i) for i in range(count)]


@pytest.mark.parametrize("name", WORLDS)
def test_a_clip_is_a_function_of_split_and_id(name):
    first, again = WORLDS[name].clip("test", 7), WORLDS[name].clip("test", 7)
    assert first.frames.shape == ({"orbit": 72}.get(name, 16), 3, 64, 64)
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


@pytest.mark.parametrize("name", WORLDS)
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


@pytest.mark.parametrize("name", WORLDS)
def test_the_schedule_strip_rolls_one_cell_per_frame(name):
    for clip in clips(name, "train", 10):
        length = len(clip.frames)
        strips = clip.frames[:, :, 56:].reshape(length, 3, 2, 4, 8, 8)[:, :, :, 0, :, 0].reshape(length, 3, 16)
        for t in range(length - 1):
            np.testing.assert_array_equal(np.roll(strips[t], -1, axis=1), strips[t + 1])


@pytest.mark.parametrize("name", WORLDS)
def test_the_strip_shows_the_next_action(name):
    colour_of: dict[tuple, int] = {}
    for clip in clips(name, "train", 10):
        if name == "cuts":
            colour_of = {}  # a shot's colour is drawn per clip
        for t in range(len(clip.frames) - 1):
            colour = tuple(clip.frames[t, :, 56, 0])
            assert colour_of.setdefault(colour, clip.actions[t + 1]) == clip.actions[t + 1]


def test_bad_ids_and_splits_are_refused():
    with pytest.raises(IndexError, match="clip id 4096 is out of range: pan/test has clips 0 to 4095"):
        WORLDS["pan"].clip("test", 4096)
    with pytest.raises(IndexError, match="clip id -1"):
        WORLDS["pan"].clip("test", -1)
    with pytest.raises(ValueError, match="unknown split 'val'"):
        WORLDS["pan"].clip("val", 0)
