"""Sentences about errors: bounded, whatever a library quotes in its message."""

from __future__ import annotations

import numpy as np
import pytest

from far_env.clips.arrays import read_episode
from far_env.errors import VideoError, first_line
from tests.damage import assert_sentence


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("one\ntwo", "one"),
        ("", "ValueError"),
        ("\nsecond", "ValueError"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_the_first_line_has_at_most_300_characters(message, line):
    assert first_line(ValueError(message)) == line


def test_an_array_whose_name_is_quoted_by_the_library_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "clip.npz"
    np.savez(path, video=np.zeros((16, 8, 8, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[27] = 8  # the length of the first array's name: 2057 bytes of the file become its name
    path.write_bytes(content)
    with pytest.raises(VideoError) as caught:
        read_episode(path)
    assert_sentence(caught.value, path)
    assert len(str(caught.value.__cause__)) > 2000
