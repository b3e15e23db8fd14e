"""Births: true frame numbers from a policy's calls, against a rollout that counts its frames."""

from __future__ import annotations

import numpy as np

from far_env.births import FrameBirths


def test_numbers_are_those_of_the_frames_whatever_is_kept_and_however_rarely_the_policy_is_called():
    rng = np.random.default_rng(0)
    births = FrameBirths()
    for _ in range(50):  # clips in sequence
        num_context = int(rng.integers(1, 7))
        frames, step, begins = list(range(num_context)), -1, True
        for _ in range(12):
            for _ in range(int(rng.integers(1, 4))):
                step += 1
                frames.append(num_context + step)
            grown = step - births.last_step
            if begins and births.births and grown > 0 and len(frames) == len(births.births) + grown:
                break  # this call cannot be distinguished from a continuation of the last clip
            assert births.observe(len(frames), step) == begins
            assert births.births == frames and births.num_context == num_context
            begins = False
            kept = sorted({*np.flatnonzero(rng.random(len(frames)) < 0.5).tolist(), len(frames) - 1})
            births.keep(kept)
            frames = [frames[i] for i in kept]
