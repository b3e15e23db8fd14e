"""The leaderboard's order, its intervals and its page, of made-up entries."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from far_env.evaluation.leaderboard_entry import Cell, Entry, Episode, load_suite
from far_env.evaluation.leaderboard_ranking import ranking, ranking_page, ranking_text
from tests.results_folders import NASTY


def entries_of(scores, suite):
    """Made-up entries from name → PSNR (cells, clips); full_history has no budget."""
    made = {}
    for name, table in scores.items():
        cells = [
            Cell(
                cell.workload,
                cell.budget,
                cell.weights,
                tuple(Episode(i, (), {"psnr": v}, "0" * 16) for i, v in enumerate(row)),
            )
            for cell, row in zip(suite.cells, table, strict=True)
        ]
        texts = dict.fromkeys(("author", "link", "policy", "sha256", "family", "source", "note"), "")
        limited = name != "full_history"
        facts = {"inputs": "M" * limited, "limited": limited, "made_with": {}, "cells": tuple(cells)}
        made[name] = Entry(format=1, suite=1, name=name, **texts, **facts)
    return made


@pytest.fixture(scope="module")
def standings():
    """PSNR by name, the ranking, and the suite, which has two cells and 40 clips."""
    rng, suite = np.random.default_rng(0), load_suite()
    wide = dataclasses.replace(suite, clips=40, cells=suite.cells[:2])
    hardness = rng.normal(0, 3, (2, 40))
    levels = {"recent_fill": (15, 20), "good": (30, 24), "even": (22, 26), "full_history": (40, 30), NASTY: (15, 19)}
    scores = {name: np.array(level)[:, None] + hardness + rng.normal(0, 1, (2, 40)) for name, level in levels.items()}
    scores["same"] = scores["even"]
    return scores, ranking(entries_of(scores, wide), wide), wide


def test_the_order_is_that_of_the_mean_over_workloads(standings):
    scores, rows, _ = standings
    assert [(row.entry.name, row.place) for row in rows] == [
        ("full_history", None),
        ("good", 1),
        ("even", 2),
        ("same", 2),
        ("recent_fill", 4),
        (NASTY, 5),
    ]
    for row in rows:
        own = scores[row.entry.name]
        assert row.mean.mean == pytest.approx(own.mean()) and [cell.mean for cell in row.cells] == pytest.approx(
            own.mean(axis=1)
        )
        if row.entry.name != "recent_fill":
            assert row.gain.mean == pytest.approx((own - scores["recent_fill"]).mean())
    assert {row.entry.name: row.mean_place for row in rows}["good"] == (1 + 3) / 2


def test_intervals_draw_the_clips_of_one_number_together(standings):
    scores, rows, _ = standings
    difference = scores["good"] - scores["recent_fill"]
    drawn = np.random.default_rng(1).integers(40, size=(20_000, 40))
    means = (difference[0][drawn].mean(axis=1) + difference[1][drawn].mean(axis=1)) / 2
    gain = next(row.gain for row in rows if row.entry.name == "good")
    assert [gain.low, gain.high] == pytest.approx(list(np.percentile(means, [2.5, 97.5])), abs=0.02)
    assert gain.high - gain.low > 0.3


def test_the_reference_may_be_absent(standings):
    scores, _, wide = standings
    rows = ranking(entries_of({"good": scores["good"]}, wide), wide)
    assert (rows[0].place, rows[0].gain, rows[0].cell_gains) == (1, None, [])
    assert "good" in ranking_text(rows, wide)


def test_the_page_allows_nothing_but_its_own_script_and_shows_names_as_text(standings):
    _, rows, wide = standings
    page = ranking_page(rows, wide)
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page
    assert NASTY not in page and page.count("</script>") == 2 and "{{" not in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [row["name"] for row in data["rows"]] == [row.entry.name for row in rows]
    assert data["rows"][1]["gain"] == pytest.approx([rows[1].gain.mean, rows[1].gain.low, rows[1].gain.high], rel=1e-6)


def test_the_page_ranks_sorts_and_filters_in_a_browser(standings, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    _, rows, wide = standings
    path, events = tmp_path / "page.html", []
    path.write_text(ranking_page(rows, wide), encoding="utf-8")
    shown = "[...document.querySelectorAll('[data-entry]')].map((row) => row.dataset.entry)"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.goto(path.as_uri())
        assert page.evaluate(shown) == ["good", "even", "same", "recent_fill", NASTY, "full_history"]
        page.get_by_role("button", name="cuts 4").click()
        assert page.evaluate(shown)[:4] == ["full_history", "even", "same", "good"]
        page.fill("#filter-text", "GOOD")
        assert page.evaluate(shown) == ["good"]
        page.get_by_role("button", name="Reset").click()
        page.select_option("#filter-inputs", "M")
        assert page.locator("#count").inner_text() == "5 of 6 entries" and "full_history" not in page.evaluate(shown)
        browser.close()
    assert events == []
