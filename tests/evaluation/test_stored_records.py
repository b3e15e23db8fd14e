"""A large results folder, whose records are read where they are needed, gives what a small one does."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation import results_folder as module
from far_env.evaluation.comparison import tabulate
from far_env.evaluation.plots import save_plots
from far_env.evaluation.ranking import select_policies
from far_env.evaluation.report import report_data, report_page
from far_env.evaluation.results_folder import Recorder, load
from far_env.evaluation.stored_records import StoredRecords
from far_env.evaluation.table import results_table
from tests.results_folders import MadeUp, make_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "made"
    make_results(folder)
    return folder


@pytest.fixture
def both(folder, monkeypatch):
    """The folder as a small and as a large one."""
    small = load(folder)
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    large = load(folder)
    assert isinstance(small.records, list) and isinstance(large.records, StoredRecords)
    return small, large


def test_the_records_are_the_same(both):
    small, large = both
    assert list(large.records) == small.records and len(large.records) == len(small.records)
    assert large.records[3] == small.records[3] and large.records[-2:] == small.records[-2:]
    assert list(large.episode_keys()) == list(small.episode_keys()) and large.clip_hashes() == small.clip_hashes()


def test_tables_report_and_plots_are_the_same(both, tmp_path):
    small, large = both
    for workload, budget in (("pan", 2), ("cuts", 4), ("pan", UNLIMITED_FRAMES)):
        assert results_table(tabulate(large, workload, budget)) == results_table(tabulate(small, workload, budget))
    assert report_data(large, progress=False) == report_data(small, progress=False)
    assert report_data(small, progress=False)["images"]
    some = [select_policies(results, ["learned", "recent_fill"]) for results in both]
    assert len(some[1].records) == len(some[0].records) < len(small.records)
    assert report_page(some[1], progress=False) == report_page(some[0], progress=False)
    for results, name in ((small, "small"), (large, "large")):
        (tmp_path / name).mkdir()
        save_plots(results, tmp_path / name, progress=False)
    files = sorted(path.name for path in (tmp_path / "small").glob("*.svg"))
    assert files and all((tmp_path / "small" / n).read_bytes() == (tmp_path / "large" / n).read_bytes() for n in files)


def test_records_are_added_and_a_torn_line_is_removed(folder, both, tmp_path):
    small, _ = both
    first, second, third = small.records[:3]
    recorder = Recorder(tmp_path, small.settings)
    recorder.add([first, second])
    recorder.close()
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write(third.line()[:-20])
    recorder = Recorder(tmp_path, small.settings)
    assert isinstance(recorder.results.records, StoredRecords) and list(recorder.results.records) == [first, second]
    recorder.add([third])
    assert list(recorder.results.records) == [first, second, third] == list(load(tmp_path).records)
    recorder.close()


def test_a_repeated_episode_is_refused(both, tmp_path):
    small, _ = both
    recorder = Recorder(tmp_path, small.settings)
    recorder.add([small.records[0], dataclasses.replace(small.records[0], decision_ms=1.0)])
    recorder.close()
    with pytest.raises(ValueError, match="line 2 repeats an episode"):
        load(tmp_path)


def test_memory_does_not_grow_with_plans(monkeypatch, tmp_path):
    """200 bytes per record, where a record of 40 frames takes more than 10,000."""
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    made = MadeUp(workloads={"pan": (3, 40)}, budgets=(8,), policies={"recent_fill": 0.0}, clips=200, show_clips=0, seeds=(42,))
    count = len(make_results(tmp_path, made).records)
    load(tmp_path)
    tracemalloc.start()
    results = load(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(results.records) == count and kept / count < 500
    psnr = np.mean([record.metrics["psnr"] for record in results.records if record.policy == "recent_fill"])
    assert tabulate(results, "pan", 8).scores["recent_fill"]["psnr"].mean() == pytest.approx(psnr)
