"""Gap curves: how long ago the evidence of a frame was in view, and PSNR by that."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from far_env.clips.clip import Clip
from far_env.clips.copying import evidence_gaps
from far_env.clips.worlds import WORLDS
from far_env.evaluation.aggregate import collect_episodes
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.gaps import bin_of, bins, psnr_by_gap
from far_env.evaluation.plots import save_plots
from far_env.evaluation.ranking import make_groups
from far_env.evaluation.report import report_data
from far_env.evaluation.results_folder import load
from far_env.evaluation.statistics import mean_interval
from tests.results_folders import make_results


class Source:
    """Clips whose frames have one grey each; the last row of pixels is another one's."""

    def __init__(self, **known):
        for name, value in known.items():
            setattr(self, name, value)

    @staticmethod
    def clip(greys, below=None):
        frames = np.empty((len(greys), 3, 4, 4), dtype=np.float32)
        frames[:] = np.array(greys, dtype=np.float32)[:, None, None, None]
        if below is not None:
            frames[:, :, 3] = np.array(below, dtype=np.float32)[:, None, None]
        return Clip(0, frames)


def grey_after(other, decibels):
    """A grey whose copy from another one has this PSNR."""
    return other + 10 ** (-decibels / 20)


def test_the_newest_frame_that_is_as_good_as_the_best_copy_counts():
    first = 0.2
    near, nearer, far = grey_after(first, 30.5), grey_after(first, 31.0), grey_after(first, 29.9)
    # frame 4 is copied from frame 1 at 31 dB, and from frame 2 at 30.5 dB, which is within 1 dB; frame 3 is not
    assert evidence_gaps(Source(), Source.clip([0.9, nearer, near, far, first]), 4, 5) == [2]
    # nothing that was in view before
    assert evidence_gaps(Source(), Source.clip([0.9, 0.7, grey_after(first, 19.9), first]), 3, 4) == [None]
    assert evidence_gaps(Source(), Source.clip([0.9, 0.7, grey_after(first, 20.1), first]), 3, 4) == [1]
    # equal frames: the best copy has 100 dB
    assert evidence_gaps(Source(), Source.clip([0.1, 0.5, 0.1, 0.5, 0.9, 0.1]), 2, 6) == [2, 2, None, 3]
    # with rows that show something else the frames differ by it
    clip = Source.clip([0.1, 0.5, 0.1], below=[0.0, 1.0, 1.0])
    assert evidence_gaps(Source(), clip, 2, 3) == [None] and evidence_gaps(Source(view_rows=3), clip, 2, 3) == [2]
    assert evidence_gaps(Source(), Source.clip([0.1, 0.1]), 0, 2) == [None, 1], "without context"
    scenes = Source(scenes=lambda clip: np.array([7, 8, 7, 9, 7]))
    assert evidence_gaps(scenes, Source.clip([0.1, 0.2, 0.3, 0.4, 0.5]), 2, 5) == [2, None, 2]


@pytest.mark.parametrize(("name", "num_context"), [("pan", 5), ("orbit", 36), ("cuts", 5)])
def test_worlds_have_the_gaps_of_their_ruler(name, num_context):
    """The ruler's colours tell where the camera is (in cuts: which shot it is)."""
    world = WORLDS[name]
    for clip_id in range(6):
        clip = world.clip("test", clip_id)
        ruler = [clip.frames[t, :, 48:56, ::4].tobytes() for t in range(world.num_frames)]
        expected = []
        for t in range(num_context, world.num_frames):
            earlier = [s for s in range(t) if ruler[s] == ruler[t]]
            expected.append(t - earlier[-1] if earlier else None)
        gaps = evidence_gaps(world, clip, num_context, world.num_frames)
        # A view that was never there may resemble another one; whatever was there has the same pixels.
        assert [g for g, e in zip(gaps, expected, strict=True) if e] == [e for e in expected if e]
        assert len(set(gaps)) > 2


def test_bins_are_single_gaps_then_powers_of_two():
    expected = {1: "1", 4: "4", 5: "5–8", 8: "5–8", 9: "9–16", 16: "9–16", 17: "17–32", 64: "33–64", 65: "65–128"}
    assert {gap: bin_of(gap) for gap in expected} == expected and bin_of(math.nan) == "new"
    assert bins(20) == ["1", "2", "3", "4", "5–8", "9–16", "17–32", "new"] and bins(2) == ["1", "2", "new"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaps") / "results"
    make_results(folder)
    return load(folder)


def test_curves_are_means_over_clips_of_means_over_frames_and_seeds(results):
    for episodes in collect_episodes(results, "pan"):
        curve = psnr_by_gap(episodes)
        assert len(curve) > 4
        for name, interval in curve.items():
            by_clip = []
            for clip in results.settings.clips:
                own = ("pan", episodes.budget, episodes.policy, clip)
                records = [r for r in results.records if r.key[:4] == own]
                values = [
                    value
                    for record in records
                    for value, gap in zip(record.psnr_per_frame, record.evidence_gaps, strict=True)
                    if bin_of(math.nan if gap is None else gap) == name
                ]
                by_clip += [np.mean(values)] if values else []
            assert interval.n == len(by_clip) and interval.mean == pytest.approx(np.mean(by_clip))
            if len(by_clip) == len(results.settings.clips):
                expected = mean_interval(np.array(by_clip))
                assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_folders_of_older_versions_have_no_curve_and_say_so(results, tmp_path):
    records = [dataclasses.replace(record, evidence_gaps=None) for record in results.records]
    older = dataclasses.replace(results, records=records)
    groups = make_groups(older)
    assert all("older version" in row.by_gap for group in groups for row in group.rows)
    data = report_data(older, progress=False)
    assert all(group["gaps"] == [] and isinstance(row["byGap"], str) for group in data["groups"] for row in group["rows"])
    written = {path.name for path in save_plots(older, tmp_path, progress=False)}
    assert not any(name.startswith("gaps_") for name in written) and "frames_pan_b4.png" in written
    unseen = [dataclasses.replace(record, evidence_gaps=[None] * len(record.psnr_per_frame)) for record in results.records]
    for episodes in collect_episodes(dataclasses.replace(results, records=unseen), "pan"):
        assert list(psnr_by_gap(episodes)) == ["new"]


def test_curves_are_drawn(results, tmp_path):
    written = {path.name for path in save_plots(results, tmp_path, progress=False)}
    expected = {f"gaps_{w}_b{b}.{kind}" for w in ("pan", "cuts") for b in (2, 4) for kind in ("png", "svg")}
    assert expected <= written
    text = (tmp_path / "gaps_pan_b4.svg").read_text(encoding="utf-8")
    assert "frames since the evidence was last in view" in text and "5–8" in text and "recent_fill" in text


def test_evaluation_records_the_gaps_and_damaged_ones_are_refused(tiny_workload, tmp_path):
    evaluate_grid(
        [tiny_workload], [9999], {"full_history": None}, range(2), metrics=["psnr"], out=tmp_path / "r", progress=False
    )
    for record in load(tmp_path / "r").records:
        clip = tiny_workload.clips.clip("test", record.clip)
        assert record.evidence_gaps == evidence_gaps(tiny_workload.clips, clip, 5, 16)
    path = tmp_path / "r" / "records.jsonl"
    first, second = path.read_text().splitlines()
    for wrong in ([1] * 10, [0] * 11, [1.5] * 11, [True] * 11, "x", 3):
        path.write_text("\n".join([first, json.dumps(json.loads(second) | {"evidence_gaps": wrong})]) + "\n")
        with pytest.raises(ValueError, match=r"line 2 needs 11 evidence_gaps"):
            load(tmp_path / "r")
    older = json.loads(second)
    del older["evidence_gaps"]
    path.write_text(json.dumps(older) + "\n")
    assert load(tmp_path / "r").records[0].evidence_gaps is None
