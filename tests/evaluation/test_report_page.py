"""The report's page in headless Chromium: it plays, steps, filters and compares, on a desk and on a phone, light and dark."""

from __future__ import annotations

import dataclasses
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from far_env.evaluation.gaps import gap_bins
from far_env.evaluation.ranking import make_groups
from far_env.evaluation.report import report_page
from far_env.evaluation.results_folder import load
from far_env.evaluation.statistics import mean_interval
from far_env.evaluation.table import Comparison, family_line
from tests.results_folders import NASTY, make_results

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[dev]'")
FRAME = "+document.querySelector('.panel').dataset.frame"
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "results"
    make_results(folder)
    return load(folder)


@pytest.fixture(scope="module")
def address(results):
    path = results.folder / "report.html"
    path.write_text(report_page(results, progress=False), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root may not have a sandbox
        yield chromium
        chromium.close()


def until(page, condition):
    """Wait for a condition; Playwright's own wait would need eval, which the page's policy forbids."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"never came true: {condition}")


def to_player(page):
    """Bring the player into view, where its keys work."""
    page.locator("#player").scroll_into_view_if_needed()
    page.wait_for_timeout(60)


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a fresh context; afterwards, nothing may have been logged, asked of a network or popped up."""
    contexts, events = [], []

    def open_one(width=1280, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("dialog", lambda dialog: events.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: None if request.url.startswith(("data:", address)) else events.append(request.url))
        page.goto(address)
        until(page, "[...document.querySelectorAll('.panel')].every((panel) => panel.dataset.frame)")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert events == []


def names(page, table=0):
    return page.locator("table.scores").nth(table).locator("tbody tr").evaluate_all("rows => rows.map(r => r.dataset.policy)")


def pixels(page, side, picture):
    """RGB of one of a panel's three canvases, uint8 (size, size, 3)."""
    canvas = page.locator(".panel").nth(side).locator("canvas").nth(picture)
    flat = canvas.evaluate("c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    return np.array(flat[1:], dtype=np.uint8).reshape(flat[0], flat[0], 4)[..., :3]


def frame_of(path, index):
    strip = np.asarray(Image.open(path))
    size = len(strip)
    return strip[:, index * size : (index + 1) * size]


def record(results, policy, budget, clip=0, seed=42, workload="pan"):
    key = (workload, budget, policy, clip, seed)
    return next(candidate for candidate in results.records if candidate.key == key)


def frame(page):
    return page.evaluate(FRAME)


def choose(page, side, text):
    page.locator(".panel select").nth(side).select_option(label=text)


def test_it_opens_with_the_ranking(open_page, results):
    page = open_page()
    assert page.locator("table.scores").count() == 4
    for table, group in enumerate(make_groups(results)):
        ranked = group.ranked("psnr")
        assert names(page, table) == [row.policy for row in ranked]
        cells = page.locator("table.scores").nth(table).locator("tbody tr").first.locator("td").all_inner_texts()
        best = ranked[0].intervals["psnr"]
        assert f"{best.mean:.2f}[{best.low:.2f}, {best.high:.2f}]" in cells
    assert page.locator("#absent").inner_text() == "No LPIPS column: LPIPS needs weights <that> are not here"
    assert "host made_up (weights c0ffee00)" in page.locator("#summary").inner_text()
    assert "abc1234" in page.locator("#facts").inner_text()
    assert NASTY in page.locator("#reference").inner_text()
    assert page.locator("#budget-charts svg").count() == 2 and page.locator("#frame-charts svg").count() == 4
    gaps = page.locator("#gap-charts figure")
    assert gaps.count() == 4 and "within 1 dB of the best one" in page.locator("#gap-measure").inner_text()
    group = make_groups(results)[0]
    row = next(row for row in group.rows if row.policy == "full_history")
    cells = gaps.first.locator("tbody tr").filter(has_text="full_history").locator("td").all_text_contents()
    heads = gaps.first.locator("thead th").all_text_contents()
    assert heads[1:] == gap_bins(group.rows) and cells == [f"{row.by_gap[name].mean:.2f}" for name in heads[1:]]


def test_differences_follow_the_chosen_reference_and_columns_sort(open_page, results):
    page = open_page()
    page.locator("#reference").select_option(label="uniform")
    group = make_groups(results)[0]
    rows = {row.policy: row.scores["psnr"] for row in group.rows}
    interval = mean_interval(rows["learned"] - rows["uniform"])
    row = page.locator("table.scores").first.locator("tr[data-policy=learned]")
    expected = f"{interval.mean:+.2f}[{interval.low:+.2f}, {interval.high:+.2f}]".replace("-", "\u2212")
    assert expected in row.locator("td").all_text_contents()
    difference = group.differences("psnr")[1][2]
    assert [one.policy for one in group.rows[1:3]] == ["learned", "uniform"]
    better = difference.better
    assert f"{better.mean:.2f}[{better.low:.2f}, {better.high:.2f}]" in row.locator("td").all_text_contents()
    others = [i for i in range(len(group.rows)) if i != 2]
    compared = [
        Comparison("", group.rows[i].policy, group.differences("psnr")[i][2].interval, group.differences("psnr")[i][2].p)
        for i in sorted(others, key=lambda i: group.differences("psnr")[i][2].p)
    ]
    assert page.locator("li.family").first.inner_text() == family_line(compared, "uniform") + "."
    page.get_by_role("button", name="Policy", exact=True).first.click()
    assert names(page) == sorted(rows, key=str.lower)
    page.get_by_role("button", name="Policy ▲").first.click()
    assert names(page) == sorted(rows, key=str.lower)[::-1]
    assert page.evaluate("document.activeElement.textContent") == "Policy ▼"


def test_filters_narrow_tables_charts_and_player(open_page):
    page = open_page()
    page.locator("#filter-workload").select_option("cuts")
    page.locator("#filter-budget").select_option("4")
    assert page.locator("table.scores").count() == 1 and page.locator("#budget-charts svg").count() == 1
    assert page.locator(".panel select").first.locator("option:checked").inner_text() == "recent_fill, budget 4"
    page.locator("#filter-family").select_option("recency")
    assert names(page) == ["recent_fill", NASTY]
    page.locator("#filter-tier").select_option("A")
    assert page.locator("#tables").inner_text() == "No policy matches the filters."
    assert page.locator("#no-clips").is_visible() and not page.locator("#player").is_visible()
    page.locator("button[type=reset]").click()
    assert page.locator("table.scores").count() == 4 and page.locator("#player").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("LEARN")
    assert names(page) == ["learned"] and page.locator("#count").inner_text() == "1 of 5 policies"
    page.locator("#filter-text").fill("2500.00002")
    assert names(page) == ["uniform"]


def test_it_steps_by_keys_and_shows_the_true_pixels(open_page, results):
    page = open_page()
    to_player(page)
    truth = results.truth_picture("pan", 0)
    pictures = [results.picture(record(results, name, 2)) for name in ("recent_fill", "learned")]
    assert frame(page) == 0 and not pixels(page, 0, 2)[..., 1:].max(initial=0) > 4
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert frame(page) == 4
    for side in (0, 1):
        true_frame, generated_frame = frame_of(truth, 4), frame_of(pictures[side], 4 - 3)
        np.testing.assert_array_equal(pixels(page, side, 0), true_frame)
        np.testing.assert_array_equal(pixels(page, side, 1), generated_frame)
        error = np.abs(true_frame.astype(int) - generated_frame).mean(axis=2).ravel()
        lightness = pixels(page, side, 2).sum(axis=2).ravel()[np.argsort(error)].astype(int)
        assert (np.diff(lightness) >= -6).all() and lightness[-1] - lightness[0] > 100
    page.keyboard.press("ArrowLeft")
    assert frame(page) == 3
    page.keyboard.press("End")
    assert frame(page) == 8 and page.locator("#position").inner_text() == "frame 8 of 8, step 5"
    page.keyboard.press("Home")
    assert frame(page) == 0
    page.keyboard.press("n")
    assert page.locator("#clip-number").input_value() == "1"
    page.keyboard.press("p")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible() and frame(page) == 0


def test_it_plays_loops_stops_and_scrubs(open_page):
    page = open_page()
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => seen.push(document.querySelector('.panel').dataset.frame))"
        ".observe(document.querySelector('.panel'), { attributeFilter: ['data-frame'] }) }"
    )
    page.locator("#speed").select_option("30")
    page.locator("#play").click()
    until(page, "seen.length >= 10")
    assert page.locator("#play").get_attribute("aria-label") == "Pause"
    page.locator("#loop").uncheck()
    until(page, "document.getElementById('play').getAttribute('aria-label') == 'Play'")
    visited = "".join(page.evaluate("seen"))
    assert frame(page) == 8 and ("012345678" * len(visited))[1:].startswith(visited)
    page.evaluate("() => { document.activeElement.blur(); seen.length = 0 }")
    to_player(page)
    page.keyboard.press("Space")
    until(page, "seen.length == 9")
    assert "".join(page.evaluate("seen")) == "012345678"
    page.locator("#speed").select_option("2")
    page.locator("#scrub").fill("5")
    page.locator("#play").click()
    page.locator("#play").blur()
    page.keyboard.press("Space")
    assert page.locator("#play").get_attribute("aria-label") == "Play" and frame(page) in (5, 6)


def test_two_policies_stand_side_by_side(open_page, results):
    page = open_page()
    to_player(page)
    page.keyboard.press("End")
    choose(page, 0, "uniform, budget 4")
    choose(page, 1, "full_history, full history")
    strips = [results.picture(record(results, "uniform", 4)), results.picture(record(results, "full_history", 9999))]
    page.wait_for_timeout(50)
    for side, strip in enumerate(strips):
        np.testing.assert_array_equal(pixels(page, side, 1), frame_of(strip, 5))
    episode = record(results, "uniform", 4)
    scores = page.locator(".panel .score")
    assert scores.first.inner_text() == f"PSNR {episode.metrics['psnr']:.2f} dB · SSIM {episode.metrics['ssim']:.3f}"
    page.keyboard.press("s")
    page.wait_for_timeout(50)
    np.testing.assert_array_equal(pixels(page, 1, 1), frame_of(strips[0], 5))
    page.locator("#clip-seed").select_option("7")
    other = record(results, "uniform", 4, seed=7)
    assert scores.nth(1).inner_text().startswith(f"PSNR {other.metrics['psnr']:.2f} dB")
    page.locator("table.scores").nth(2).get_by_role("button", name="Watch learned").click()
    assert page.locator("#clip-workload").input_value() == "cuts"
    assert page.locator(".panel select").nth(1).locator("option:checked").inner_text() == "learned, budget 2"
    assert page.evaluate("document.activeElement.id") == "play"
    assert page.get_by_role("button", name=f"Watch {NASTY}").count() == 0


def test_the_timeline_tells_the_plan_and_follows(open_page, results):
    page = open_page()
    to_player(page)
    panel = page.locator(".panel").first
    plan = {entry["step"]: entry for entry in record(results, "recent_fill", 2).plan}
    positions = set()
    for number in range(9):
        step = number - 3
        cursor = panel.locator(".cursor").first
        assert cursor.get_attribute("data-step") == str(max(step, -1))
        positions.add(cursor.get_attribute("x"))
        if step in plan:
            readout = panel.locator(".readout").inner_text()
            kept, demoted = (re.search(rf"{word} ([\d, –]+)\.", readout)[1] for word in ("kept", "Demoted"))
            assert [kept, demoted] == [", ".join(map(str, plan[step][key])) for key in ("kept", "demoted")]
        page.keyboard.press("ArrowRight")
    assert len(positions) == 7  # one column for what is given, and six steps
    counts = {kind: panel.locator(f".timeline path.{kind}").get_attribute("d").count("M") for kind in ("demoted", "dropped")}
    assert counts["dropped"] == 2 * (3 + 6 - 2 - 1)  # strokes: all frames but two, and the last frame is never decided about
    assert counts["demoted"] == 2 * len(plan)  # a frame and its hole, once per decision
    box = panel.locator(".timeline svg").bounding_box()
    at = float(panel.locator(".cursor").first.get_attribute("width"))
    page.mouse.click(box["x"] + 40 + at * 2.5, box["y"] + 80)
    assert frame(page) == 3 + 1


def test_charts_show_what_is_chosen_and_tell_numbers(open_page, results):
    page = open_page()
    legend = page.locator("#quality .legend button")
    chart = page.locator("#budget-charts svg").first
    assert chart.locator("g.slot").count() == 4
    legend.filter(has_text="uniform").click()
    assert chart.locator("g.slot").count() == 3 and chart.locator("g.quiet").count() == 1
    assert legend.filter(has_text="uniform").get_attribute("aria-pressed") == "false"
    page.locator("table.scores").first.get_by_role("button", name="Show uniform in the charts").click()
    assert chart.locator("g.slot").count() == 4
    chart.locator("g.slot .point").first.hover()
    assert re.search(r"\nbudget [24]\n[\d.]+ dB \[", page.locator("#tooltip").inner_text())
    page.locator("#budget-charts summary").first.click()
    row = next(row for row in make_groups(results)[0].rows if row.policy == "learned")
    cells = page.locator("#budget-charts details").first.locator("tr", has_text="learned").locator("td").all_inner_texts()
    assert cells[0] == f"{row.intervals['psnr'].mean:.2f}"
    page.locator("#metric").select_option(label="SSIM")
    assert "SSIM" in page.locator("#budget-charts figcaption").first.inner_text()


def test_nothing_scrolls_sideways_on_a_phone(open_page):
    width = 340
    page = open_page(width, 800, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("visualViewport.width") == width
    page.locator("#forward").tap()
    assert frame(page) == 1
    for button in page.locator(".transport button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 40 and box["x"] + box["width"] <= width
    for canvas in page.locator(".panel canvas").all():
        box = canvas.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 80


def luminance(colour):
    """Relative luminance of an sRGB colour in [0, 255] (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.asarray(colour) / 255]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def resolved(page, variable):
    script = "v => { document.body.style.outlineColor = `var(${v})`; return getComputedStyle(document.body).outlineColor }"
    return [float(part) for part in re.findall(r"[\d.]+", page.evaluate(script, variable))[:3]]


def test_dark_and_light_are_legible_and_the_button_overrides_the_system(open_page):
    page = open_page(color_scheme="dark")
    shades = []
    for theme in ("system", "light", "dark"):
        assert page.locator("#theme-button").inner_text() == f"Theme: {theme}"
        ground = luminance(resolved(page, "--page"))
        shades.append(ground < 0.05)
        for variable in ("--text", "--muted", "--accent", "--warning", *(f"--series-{slot}" for slot in range(8))):
            light, dark = sorted([luminance(resolved(page, variable)), ground], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (theme, variable)
        page.locator("#theme-button").click()
    assert shades == [True, False, True]
    page.reload()
    assert page.locator("#theme-button").inner_text() == "Theme: system"


def test_every_control_has_a_name_and_can_be_reached(open_page):
    page = open_page()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, [role=img], [role=region]')].filter((node) =>"
        " !(node.getAttribute('aria-label') || node.textContent.trim() || node.closest('label')?.textContent.trim()))"
        ".map((node) => node.outerHTML)"
    )
    assert unnamed == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_policies_that_decided_alike_share_a_row_and_tuned_ones_have_a_column(results, browser, tmp_path):
    twin = [dataclasses.replace(r, policy="twin") for r in results.records if (r.policy, r.budget) == ("uniform", 4)]
    facts = {"label": "uniform tuned on pan 4", "family": "anchor", "validation_rollouts": "64"}
    settings = dataclasses.replace(results.settings, policies={**results.settings.policies, "twin": facts})
    changed = dataclasses.replace(results, settings=settings, records=[*results.records, *twin])
    path = tmp_path / "report.html"
    path.write_text(report_page(changed, progress=False), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(path.as_uri())
    assert names(page, 0).count("uniform tuned on pan 4") == 0 and len(names(page, 0)) == 5
    assert len(names(page, 1)) == 5  # budget 4: six policies, two of which decided alike
    row = page.locator("table.scores").nth(1).locator("tr[data-policy=uniform]")
    assert "= uniform tuned on pan 4" in row.locator("th").inner_text()
    numbers = page.locator("table.scores").nth(1).locator("tbody tr td:first-child").all_inner_texts()
    assert numbers == ["1", "2", "3", "4", "5"]
    heads = page.locator("table.scores").nth(1).locator("thead th").all_inner_texts()
    cells = page.locator("table.scores").nth(1).locator("tr[data-policy=learned]").locator("th, td").all_inner_texts()
    assert cells[heads.index("Validation rollouts")] == "trained"
    page.locator("#filter-text").fill("tuned on pan")
    assert names(page, 0) == ["uniform tuned on pan 4"]
    page.close()
