"""The programs beside the documentation that measure something of their own."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest

from far_env.clips.worlds import WORLDS
from tests.docs.blocks import ROOT


@pytest.fixture
def compare_copies(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("compare_copies")


def test_copies_are_compared_on_clips_with_options(compare_copies, capsys):
    options = {"objects": 2, "noise": 0.03}
    compare_copies.main(
        compare_copies.Options((), "pan", (4,), clips=2, host="embedded", clip_options="{objects: 2, noise: 0.03}")
    )
    expected = []
    for clip_id in range(2):
        frames = replace(WORLDS["pan"], **options).clip("test", clip_id).frames
        errors = [min(np.mean((frames[t] - frames[s]) ** 2) for s in range(t)) for t in range(5, 16)]
        expected.append(-10 * np.log10(np.mean(errors)))
    printed = capsys.readouterr().out
    assert "pan test, budget 4, 2 clips" in printed and f"| full_history | {np.mean(expected):.2f} [" in printed


def test_wrong_options_of_clips_are_refused(compare_copies):
    for text, message in (("objects", "--clip-options needs names with values"), ("{object: 2}", "workload pan does not take")):
        with pytest.raises(ValueError, match=message):
            compare_copies.main(compare_copies.Options((), "pan", host="embedded", clip_options=text))
