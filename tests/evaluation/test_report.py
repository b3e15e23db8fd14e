"""The report's numbers against their definition, and its refusals; test_report_page.py tests the page in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from matplotlib import rc_context
from PIL import Image

from far_env import cli
from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation import plots
from far_env.evaluation.ranking import highlighted, make_groups, metric_format, select_policies
from far_env.evaluation.report import report_data, report_page, warnings
from far_env.evaluation.results_folder import load
from far_env.evaluation.statistics import improvement_interval, iqm_interval, mean_interval, sign_flip_p
from tests.results_folders import NASTY, MadeUp, make_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "results"
    make_results(path)
    return path


@pytest.fixture(scope="module")
def results(folder):
    return load(folder)


@pytest.fixture(scope="module")
def page(results):
    return report_page(results, progress=False)


def element(page, name):
    (text,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def embedded(page):
    """The data of the page, with those of its parts in their places."""
    data = element(page, "data")
    for i, group in enumerate(data["groups"]):
        group["differences"] = element(page, f"differences-{i}")
    for i, clip in enumerate(data["clips"]):
        clip["runs"] = element(page, f"clip-{i}")
    return data


def test_the_page_shows_aggregates_before_it_reads_the_rest(page):
    data, whole = element(page, "data"), embedded(page)
    assert all(run.keys() == {"policy", "budget", "seed"} for clip in data["clips"] for run in clip["runs"]) and data["clips"]
    assert all({"plan", "psnr", "image"} <= run.keys() for clip in whole["clips"] for run in clip["runs"])
    for group, all_differences in zip(data["groups"], whole["groups"], strict=True):
        place = [row["policy"] for row in group["rows"]].index(data["reference"])
        for metric, lines in all_differences["differences"].items():
            assert group["toReference"][metric] == [line[place] for line in lines]
    script = page.index("<script>")
    assert page.index('id="data"') < script < page.index('id="differences-0"') < page.index('id="image-0"')


def clip_means(results, workload, budget, policy, value):
    """Mean over seeds of a value of the records, for every clip."""
    values = {
        (r.clip, r.seed): value(r) for r in results.records if (r.workload, r.budget, r.policy) == (workload, budget, policy)
    }
    return np.array([np.mean([values[clip, seed] for seed in results.settings.seeds]) for clip in results.settings.clips])


def episodes_of(results, workload, budget, policy):
    """PSNR (clips, seeds)."""
    values = {r.key: r.metrics["psnr"] for r in results.records}
    settings = results.settings
    return np.array([[values[workload, budget, policy, clip, seed] for seed in settings.seeds] for clip in settings.clips])


def own_budget(group, policy):
    return UNLIMITED_FRAMES if policy == "full_history" else group["budget"]


def triple(interval):
    return pytest.approx([interval.mean, interval.low, interval.high], rel=1e-6, abs=1e-9)


def test_the_pages_means_are_those_of_the_statistics(results, page):
    data = embedded(page)
    assert [(g["workload"], g["budget"]) for g in data["groups"]] == list(product(("pan", "cuts"), (2, 4)))
    for group in data["groups"]:
        names = [data["policies"][row["policy"]]["name"] for row in group["rows"]]
        assert names == ["recent_fill", "learned", "uniform", NASTY, "full_history"]
        for name, row in zip(names, group["rows"], strict=True):
            place = (group["workload"], own_budget(group, name), name)
            for metric in ("psnr", "ssim"):
                means = clip_means(results, *place, lambda record, metric=metric: record.metrics[metric])
                assert row["scores"][metric] == triple(mean_interval(means))
            assert row["iqm"]["psnr"] == triple(iqm_interval(episodes_of(results, *place)))
            for frame, interval in enumerate(row["perFrame"]):
                means = clip_means(results, *place, lambda record, frame=frame: record.psnr_per_frame[frame])
                assert interval == triple(mean_interval(means))
            assert (row["n"], row["missing"]) == (5, 0)
            assert row["ms"] == (None if name == "full_history" else 0.25)


def test_the_pages_differences_are_paired(results, page):
    data = embedded(page)
    for group in data["groups"]:
        names = [data["policies"][row["policy"]]["name"] for row in group["rows"]]
        for (i, name_a), (j, name_b) in product(enumerate(names), repeat=2):
            difference = group["differences"]["psnr"][i][j]
            if name_a == name_b:
                assert difference is None
                continue
            means = [
                clip_means(results, group["workload"], own_budget(group, name), name, lambda record: record.metrics["psnr"])
                for name in (name_a, name_b)
            ]
            assert difference[:3] == triple(mean_interval(means[0] - means[1])) and difference[3] == 5
            assert difference[4] == pytest.approx(sign_flip_p(means[0] - means[1]))
            episodes = [episodes_of(results, group["workload"], own_budget(group, name), name) for name in (name_a, name_b)]
            assert difference[5:] == triple(improvement_interval(episodes[0] - episodes[1]))


def pictures(page):
    """The pictures of the page, each a part of its own, in the order of their numbers."""
    found = re.findall(r'<script type="text/plain" id="image-(\d+)">([^<]*)</script>', page)
    assert [number for number, _ in found] == [str(i) for i in range(len(found))] != []
    return [uri for _, uri in found]


def test_names_cannot_end_the_data_or_become_markup(page):
    assert NASTY not in page and "<img" not in page
    data = embedded(page)
    scripts, of_data = 1, 1 + len(data["groups"]) + len(data["clips"])
    assert page.count("</script>") == scripts + of_data + len(pictures(page))
    assert NASTY in [policy["name"] for policy in embedded(page)["policies"]]


def test_only_the_pages_own_style_and_script_are_allowed(page):
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page and "{{" not in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_pictures_are_embedded_once_and_unaltered(folder, results, page):
    data, images = embedded(page), pictures(page)
    assert [(clip["workload"], clip["clip"]) for clip in data["clips"]] == list(product(("pan", "cuts"), (0, 1)))
    for clip in data["clips"]:
        assert {data["policies"][run["policy"]]["name"] for run in clip["runs"]} == {*results.settings.policies} - {NASTY}
        truth = base64.b64decode(images[clip["truth"]].removeprefix("data:image/png;base64,"))
        assert truth == results.truth_picture(clip["workload"], clip["clip"]).read_bytes()
    assert len(set(images)) == len(images)
    assert len(embedded(report_page(results, show_clips=1, progress=False))["clips"]) == 2


def test_unfinished_episodes_are_counted_and_left_out(results):
    first = results.records[0]
    partial = replace(results, records=results.records[1:])
    row = make_groups(partial)[0].rows[0]
    assert (row.policy, row.missing, row.clips) == (first.policy, 1, (1, 2, 3, 4))
    means = clip_means(results, first.workload, first.budget, first.policy, lambda record: record.metrics["psnr"])
    assert row.intervals["psnr"] == mean_interval(means[1:])
    difference = make_groups(partial)[0].differences("psnr")[0][1].interval
    rival = clip_means(results, first.workload, first.budget, "learned", lambda record: record.metrics["psnr"])
    assert [difference.mean, difference.low, difference.high] == triple(mean_interval((means - rival)[1:]))
    without = report_data(replace(results, records=[r for r in results.records if r.policy != "learned"]), progress=False)
    assert [policy["name"] for policy in without["policies"]] == ["recent_fill", "uniform", NASTY, "full_history"]
    assert without["warnings"] == ["No episode of learned is finished."]
    nothing = replace(results, records=[r for r in results.records if r.policy != first.policy or r.seed != 42])
    assert make_groups(nothing)[0].rows[0].intervals["psnr"] == "no clip is finished with every noise seed"


def test_an_infinite_psnr_is_absent_with_its_reason(results):
    records = [replace(results.records[0], metrics={"psnr": np.inf, "ssim": 1.0}), *results.records[1:]]
    data = report_data(replace(results, records=records), progress=False)
    reason = data["groups"][0]["rows"][0]["scores"]["psnr"]
    assert reason == "PSNR is inf on clip 0, seed 42"
    assert data["groups"][0]["differences"]["psnr"][0] == [None] * 5
    assert "psnr" not in data["clips"][0]["runs"][0]["metrics"]


def test_facts_that_differ_are_warned_of(results):
    assert warnings(results) == []
    records = [replace(results.records[0], facts={**results.records[0].facts, "weights": "0badf00d"}), *results.records[1:]]
    (warning,) = warnings(replace(results, records=records))
    assert warning.startswith("The episodes of pan do not have the same weights: 0badf00d (1 episodes), c0ffee00 (")


def test_the_best_policies_and_the_reference_are_highlighted(results):
    groups = make_groups(results)
    assert highlighted(groups, "psnr", "recent_fill") == ["learned", "uniform", NASTY, "recent_fill"]
    assert highlighted(groups, "psnr", "recent_fill", count=2) == ["learned", "recent_fill"]
    assert highlighted(groups, "psnr", "full_history", count=2) == ["learned", "uniform"]
    lower = replace(groups[0], rows=[replace(row, intervals={"lpips": row.intervals["psnr"]}) for row in groups[0].rows])
    assert [row.policy for row in lower.ranked("lpips")] == [row.policy for row in groups[0].ranked("psnr")][::-1]


def test_a_workload_without_limited_budgets_is_one_group(results):
    only = select_policies(results, ["full_history"])
    assert [(group.workload, group.budget) for group in make_groups(only)] == [("pan", 9999), ("cuts", 9999)]
    assert report_data(only, progress=False)["reference"] == 0


def test_curves_of_the_plots_are_the_means(results):
    groups = [group for group in make_groups(results) if group.workload == "pan"]
    looks = {"learned": plots._Style("#123456", "o")}
    with rc_context(plots.STYLE):
        (axes,) = plots.budget_figure(groups, metric_format("psnr"), looks).axes
        (line,) = [c.lines[0] for c in axes.containers if c.get_label() == "learned"]
        assert line.get_ydata() == pytest.approx([g.rows[1].intervals["psnr"].mean for g in groups])
        (axes,) = plots.frame_figure(groups[0], 3, looks).axes
        (line,) = [line for line in axes.lines if line.get_label() == "learned"]
        assert list(line.get_xdata()) == [3, 4, 5, 6, 7, 8]
        assert line.get_ydata() == pytest.approx([interval.mean for interval in groups[0].rows[1].per_frame])
        (axes,) = plots.ranking_figure(groups[0], metric_format("psnr"), "recent_fill").axes
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["full_history", "learned", "uniform", "recent_fill", NASTY]


def test_the_command_writes_the_page_and_the_plots(tmp_path, capsys):
    made = MadeUp(workloads={"pan": (2, 3)}, budgets=(2,), policies={"recent_fill": 0.0, "learned": 3.0})
    make_results(tmp_path / "results", made)
    out, drawn = tmp_path / "page.html", tmp_path / "plots"
    command = ["report", str(tmp_path / "results"), "--out", str(out), "--reference", "learned", "--plots", str(drawn)]
    assert cli.main(command) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    data = embedded(out.read_text(encoding="utf-8"))
    assert data["policies"][data["reference"]]["name"] == "learned"
    stems = ["budget_pan_psnr", "budget_pan_ssim", "frames_pan_b2", "gaps_pan_b2", "ranking_pan_b2_psnr", "ranking_pan_b2_ssim"]
    expected = sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    assert sorted(path.name for path in drawn.iterdir()) == expected
    for path in drawn.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 5 and "weights c0ffee00" in image.info["Description"]
    text = (drawn / "ranking_pan_b2_psnr.svg").read_text()
    assert "learned" in text and "PSNR (dB)" in text
    before = {path: path.read_bytes() for path in drawn.iterdir()}
    assert cli.main(command) == 0
    assert {path: path.read_bytes() for path in drawn.iterdir()} == before
    assert cli.main([*command[:4], "--policies", "learned,recent_fill"]) == 0
    assert [policy["name"] for policy in embedded(out.read_text(encoding="utf-8"))["policies"]] == ["learned", "recent_fill"]


def refused(capsys, status, *fragments):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in error and error.count("error:") == 1
    for fragment in fragments:
        assert fragment in error


def test_folders_that_are_none_and_wrong_options_are_one_sentence(capsys, folder, tmp_path):
    report = ["report", str(folder), "--out", str(tmp_path / "page.html")]
    refused(capsys, cli.main(["report", str(tmp_path / "none"), *report[2:]]), "evaluation.json", "far-env evaluate --out")
    refused(capsys, cli.main([*report, "--policies", "learnt"]), "unknown policy 'learnt'; did you mean 'learned'?")
    refused(capsys, cli.main([*report, "--reference", "learnt"]), "unknown reference 'learnt'; did you mean 'learned'?")
    refused(capsys, cli.main([*report, "--show-clips", "-1"]), "--show-clips must be at least 0, got -1")
    refused(capsys, cli.main([*report[:3], str(tmp_path / "none" / "page.html")]), "cannot write")
    refused(capsys, cli.main([*report, "--plots", str(folder / "records.jsonl")]), "cannot be written")
    assert not (tmp_path / "page.html").exists()


def broken(tmp_path, change):
    path = tmp_path / "broken"
    make_results(path, MadeUp(workloads={"pan": (2, 3)}, budgets=(2,), policies={"recent_fill": 0.0}, clips=2, show_clips=1))
    change(path)
    return ["report", str(path), "--out", str(tmp_path / "page.html")]


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda path: (path / "evaluation.json").write_text("{"), ["evaluation.json is damaged"]),
        (lambda path: (path / "evaluation.json").write_text('{"format": 2}'), ["evaluation.json is not of format 1"]),
        (lambda path: (path / "records.jsonl").write_text(""), ["holds no finished episode"]),
        (lambda path: (path / "records.jsonl").write_text("{]\n"), ["records.jsonl, line 1", "JSON"]),
        (lambda path: (path / "records.jsonl").write_text('{"workload": "pan"}\n'), ["records.jsonl, line 1", "budget"]),
        (lambda path: (path / "frames/pan/truth_c0.png").write_bytes(b"GIF"), ["truth_c0.png cannot be read as a picture"]),
        (
            lambda path: Image.new("RGB", (12, 12)).save(path / "frames/pan/b2/recent_fill/s42_c0.png"),
            ["s42_c0.png should be a PNG of 3 frames, 36×12 pixels; it is a PNG of 12×12"],
        ),
    ],
    ids=["settings", "format", "empty", "json", "record", "picture", "size"],
)
def test_damaged_folders_are_one_sentence(capsys, tmp_path, change, fragments):
    refused(capsys, cli.main(broken(tmp_path, change)), *fragments)
    assert not (tmp_path / "page.html").exists()


def test_policies_without_pictures_have_no_player(tmp_path):
    make_results(tmp_path, MadeUp(show_clips=0))
    assert embedded(report_page(load(tmp_path), progress=False))["clips"] == []
