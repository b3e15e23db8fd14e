"""The leaderboard's entries: they hold what was played, are checked without the policy, and are read or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from far_env import cli
from far_env.baselines import make
from far_env.evaluation import leaderboard_entry
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.leaderboard import entry_name, replayed
from far_env.evaluation.leaderboard_entry import (
    Cell,
    Entry,
    Episode,
    SuiteCell,
    load_entries,
    load_entry,
    load_suite,
    save_entry,
)
from far_env.workloads import make_workload
from tests.test_fuzz import FUZZ, VALUES, refused

SHIPPED = sorted(Path(str(files("far_env.leaderboard"))).glob("*.json"))
NEW_DROPS = [[0, 1], *([number] for number in range(2, 11))]
"""What recent_fill drops of 5 given and 11 predicted frames with a budget of 4: at the first decision there are 6."""
POLICY = """
import random

from far_env.contract import ChunkDecision, TemporalCachePlan


class RandomHalf:
    signals = ("lat_cos",)

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        ids = [meta.chunk_id for meta in chunk_meta_list]
        kept = {ids[-1], *random.sample(ids[:-1], 2)}
        return TemporalCachePlan([ChunkDecision(i, "keep" if i in kept else "drop") for i in ids])
"""


@pytest.fixture(scope="module")
def suite():
    """The suite with two cells and three clips."""
    whole = load_suite()
    return dataclasses.replace(whole, clips=3, cells=whole.cells[:2])


@pytest.fixture(autouse=True)
def small(monkeypatch, suite):
    monkeypatch.setattr(leaderboard_entry, "load_suite", lambda: suite)
    monkeypatch.setattr(leaderboard_entry, "SHIPPED_PACKAGE", "far_env.configs")  # a package without entries


@pytest.fixture(scope="module")
def made(suite, tmp_path_factory):
    """A folder with the entries of two baselines, a policy file and full history, made by the command."""
    root = tmp_path_factory.mktemp("leaderboard")
    (root / "half.py").write_text(POLICY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaderboard_entry, "load_suite", lambda: suite)
        patch.setattr(leaderboard_entry, "SHIPPED_PACKAGE", "far_env.configs")
        policies = ["recent_fill", "path_tracker", "full_history", str(root / "half.py")]
        link = ["--author", "A. Uthor", "--link", "https://example.org/policies", "--policy-seconds", "120"]
        assert cli.main(["leaderboard", "add", *policies, *link, "--folder", str(root / "entries"), "--device", "cpu"]) == 0
    return root / "entries"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "entries")


def change(path, alter):
    values = json.loads(path.read_text())
    alter(values)
    path.write_text(json.dumps(values))


def check(capsys, path, *options):
    status = cli.main(["leaderboard", "check", str(path), "--device", "cpu", *options])
    return status, capsys.readouterr().out.strip()


def test_scores_are_those_of_an_evaluation(made, suite):
    for cell in suite.cells:
        workload = make_workload(cell.workload, device="cpu")
        policies = {"path_tracker": make("path_tracker"), "full_history": None}
        expected = evaluate(workload, cell.budget, policies, range(3), metrics=("psnr", "ssim"), progress=False).scores
        for name in policies:
            entry = load_entry(made / f"{name}.json", suite)
            for metric in ("psnr", "ssim"):
                own = entry.scores(metric)[suite.cells.index(cell)]
                assert own == pytest.approx(expected[name][metric][:, 0], abs=1e-4)


def test_an_entry_holds_the_decisions_and_where_it_comes_from(made, suite):
    entry = load_entry(made / "recent_fill.json", suite)
    assert [episode.dropped for cell in entry.cells for episode in cell.episodes] == [tuple(map(tuple, NEW_DROPS))] * 6
    assert (entry.inputs, entry.family, entry.sha256, entry.limited) == ("M", "recency", "", True)
    assert entry.made_with["device"] == "cpu" and entry.made_with["torch"]
    full = load_entry(made / "full_history.json", suite)
    assert (full.inputs, full.limited) == ("", False) and not any(e.dropped for cell in full.cells for e in cell.episodes)


def test_a_policy_file_is_named_by_its_hash_not_by_its_place(made, suite):
    text, source = (made / "half.json").read_text(), made.parent / "half.py"
    entry = load_entry(made / "half.json", suite)
    assert entry.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (entry.policy, entry.inputs, entry.author) == ("half.py", "L", "A. Uthor")
    assert str(made.parent) not in text
    assert {len(frames) for cell in entry.cells for episode in cell.episodes for frames in episode.dropped} == {2, 3}


def test_honest_entries_are_confirmed_without_the_policy(capsys, folder):
    for name in ("half", "full_history"):
        status, out = check(capsys, folder / f"{name}.json", "--all")
        assert (status, out) == (0, f"{folder / name}.json: 6 of 6 episodes played again match (it has 6)")
    assert "2 of 2 episodes" in check(capsys, folder / "recent_fill.json", "--clips", "1")[1]


def better(values):
    values["cells"][1]["episodes"][2]["metrics"]["psnr"] += 0.05


def other_frames(values):
    values["cells"][0]["episodes"][0]["dropped"][:3] = [[1, 2], [0], [3]]


def other_clip(values):
    values["cells"][0]["episodes"][1]["clip_sha256"] = "0" * 16


@pytest.mark.parametrize(
    ("alter", "sentence"),
    [
        (better, "cuts, clip 2: its psnr is"),
        (other_frames, "pan, clip 0: its psnr is"),
        (other_clip, "pan, clip 1: its clip is a different one here"),
    ],
)
def test_altered_scores_decisions_and_clips_are_found(capsys, folder, alter, sentence):
    path = folder / "recent_fill.json"
    change(path, alter)
    status, out = check(capsys, path, "--all")
    assert status == 1 and out.splitlines()[0].startswith(f"{path}: {sentence}") and "5 of 6 episodes" in out


def setting(*keys, value):
    def alter(values):
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return alter


FIRST = ("cells", 0, "episodes", 0)


@pytest.mark.parametrize(
    ("alter", "fragments"),
    [
        (setting("format", value=2), ["format is not 1"]),
        (setting("suite", value=7), ["suite is 7", "plays suite 1", "make it again"]),
        (setting("name", value="other"), ["name is 'other'", "the file is named 'recent_fill'"]),
        (setting("author", value="\x1b[2J"), ["author is not one line"]),
        (setting("link", value="javascript:alert(1)"), ["link is 'javascript:alert(1)'", "https://"]),
        (setting("sha256", value="abc"), ["sha256 is 'abc'"]),
        (setting("inputs", value="everything"), ["inputs is 'everything'"]),
        (setting("made_with", "torch", value=2), ["made_with: torch", "expected str, got 2"]),
        (setting("more", value=1), ["unknown key 'more'"]),
        (lambda values: values.pop("note"), ["note"]),
        (lambda values: values["cells"].pop(), ["cells is not a list of 2, pan 4, cuts 4"]),
        (setting("cells", 1, "budget", value=8), ["cell cuts 4: budget is 8, and suite 1 has 4"]),
        (setting("cells", 0, "weights", value="0badf00d"), ["cell pan 4: weights is '0badf00d'"]),
        (lambda values: values["cells"][0]["episodes"].pop(), ["cell pan 4: episodes has 2 clips", "has 3"]),
        (setting(*FIRST, "clip", value=5), ["cell pan 4, clip 0: clip is 5"]),
        (setting(*FIRST, "metrics", value={"psnr": 99.0}), ["cell pan 4, clip 0: metrics has psnr, not psnr, ssim"]),
        (setting(*FIRST, "metrics", "psnr", value=float("inf")), ["psnr: expected float, got inf"]),
        (setting(*FIRST, "clip_sha256", value="x"), ["cell pan 4, clip 0: clip_sha256 is 'x'"]),
        (setting(*FIRST, "dropped", 0, value=[0]), ["clip 0: dropped leaves [1, 2, 3, 4, 5] at step 0, with a budget of 4"]),
        (
            setting(*FIRST, "dropped", 0, value=[0, 5]),
            ["dropped has [0, 5] at step 0, where some of [0, 1, 2, 3, 4] can"],
        ),
        (
            setting(*FIRST, "dropped", 1, value=[0]),
            ["clip 0: dropped has [0] at step 1, where some of [2, 3, 4, 5]"],
        ),
        (setting(*FIRST, "dropped", value=NEW_DROPS[:-1]), ["dropped has 9 decisions; its budget needs one at step 9"]),
        (setting(*FIRST, "dropped", value=[*NEW_DROPS, [11]]), ["dropped has 11 decisions; its budget needs 10"]),
        (setting("limited", value=False), ["inputs is 'M'; it must be empty, for full history"]),
    ],
)
def test_a_wrong_field_is_one_sentence_with_file_and_field(capsys, folder, suite, alter, fragments):
    path = folder / "recent_fill.json"
    change(path, alter)
    status, out = check(capsys, path)
    assert status == 2 and out.startswith(str(path)) and len(out.splitlines()) == 1
    for fragment in fragments:
        assert fragment in out


@FUZZ
@given(
    place=st.sampled_from(
        [("name",), ("cells",), ("cells", 0), ("cells", 0, "episodes"), FIRST, (*FIRST, "dropped"), ("inputs",)]
    ),
    value=VALUES,
)
def test_random_content_is_read_or_refused(made, tmp_path_factory, suite, place, value):
    path = tmp_path_factory.mktemp("fuzz") / "recent_fill.json"
    shutil.copy(made / "recent_fill.json", path)
    change(path, setting(*place, value=value))
    refused(path, load_entry, path, suite)


def test_a_stopped_evaluation_resumes(capsys, monkeypatch, tmp_path):
    import far_env.evaluation.batches as module

    played, play = [], module.play

    def stopping(workload, clips, *args, **kwargs):
        if workload.name == "cuts" and len(played) < 2:
            played.append("stop")
            raise KeyboardInterrupt
        played.append(workload.name)
        return play(workload, clips, *args, **kwargs)

    monkeypatch.setattr(module, "play", stopping)
    command = ["leaderboard", "add", "uniform", "--folder", str(tmp_path), "--device", "cpu"]
    assert cli.main(command) == 130 and "the same command resumes" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
    assert cli.main(command) == 0
    assert played == ["pan", "stop", "cuts"]
    assert [path.name for path in tmp_path.iterdir()] == ["uniform.json"]


def test_wrong_commands_are_one_sentence(capsys, folder):
    def refuse(*args, fragment):
        assert cli.main(["leaderboard", *args]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("far-env: error: ") and fragment in line

    refuse("add", "recent_fill", "--folder", str(folder), fragment="exists; add --replace")
    refuse("add", "uniform", "random", "--name", "x", fragment="--name is for a single policy")
    refuse("add", "uniform", "--name", "../x", fragment="an entry's name is")
    refuse("add", "uniform", "--link", "http://x", "--folder", str(folder), fragment="link is 'http://x'")
    refuse("add", "runs/a/x", "runs/b/x", fragment="several policies would be written to")
    refuse("add", fragment="needs a policy")
    refuse("add", "unifrom", "--folder", str(folder), fragment="no policy 'unifrom'")
    refuse("check", fragment="needs the file")
    refuse("check", "x.json", "--clips", "0", fragment="clips must be at least 1")
    (folder / "uniform.json").write_text("{")
    refuse("show", "--folder", str(folder), fragment="uniform.json is damaged")


def test_names_of_entries():
    names = {"a/b.py": "b", "runs/mine/": "mine", "hub:me/p@v1": "p_v1", "sink_recent:n_sink=2": "sink_recent_n_sink_2"}
    assert {policy: entry_name(policy) for policy in names} == names


def test_the_command_ranks_a_folder_and_writes_the_page(capsys, folder, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["leaderboard", "show", "--folder", str(folder), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    first_cells = [line.split()[0] for line in out.splitlines()[2:6]]
    assert first_cells == ["full_history", "path_tracker", "half", "recent_fill"]
    assert page.stat().st_size < 100_000


def test_the_folder_replaces_entries_that_ship(monkeypatch, tmp_path, folder, suite):
    package = tmp_path / "shipped_entries"
    shutil.copytree(folder, package)
    (package / "__init__.py").touch()
    change(package / "half.json", setting("author", value="theirs"))
    change(package / "path_tracker.json", setting("author", value="theirs"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(leaderboard_entry, "SHIPPED_PACKAGE", "shipped_entries")
    (folder / "path_tracker.json").unlink()
    authors = {name: entry.author for name, entry in load_entries(folder, suite).items()}
    assert (authors["half"], authors["path_tracker"]) == ("A. Uthor", "theirs")


def test_reading_what_was_written_gives_the_same_entry(made, tmp_path, suite):
    for path in made.glob("*.json"):
        entry = load_entry(path, suite)
        save_entry(entry, tmp_path / path.name)
        assert load_entry(tmp_path / path.name, suite) == entry
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def schema():
    return json.loads((files("far_env") / "assets" / "leaderboard" / "entry.schema.json").read_text(encoding="utf-8"))


def test_the_schema_has_the_fields_of_the_entry():
    definitions = schema()["$defs"]
    for cls, part in ((Entry, schema()), (Cell, definitions["cell"]), (Episode, definitions["episode"])):
        names = [field.name for field in dataclasses.fields(cls)]
        assert list(part["properties"]) == part["required"] == names


def test_the_schema_takes_entries_and_refuses_others(made):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install -e '.[dev]'")
    jsonschema.Draft202012Validator.check_schema(schema())
    for path in [*made.glob("*.json"), *SHIPPED]:
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema())
    for alter in (
        setting("author", value="two\nlines"),
        setting(*FIRST, "dropped", 0, value=[1, 1]),
        setting("link", value="http://x"),
        setting("cells", 0, "weights", value=""),
    ):
        values = json.loads((made / "recent_fill.json").read_text())
        alter(values)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values, schema())


def test_the_reference_and_other_entries_ship():
    names = {path.stem for path in SHIPPED}
    assert {load_suite().reference, "full_history", "random_mid"} <= names
    assert all(path.stat().st_size < 100_000 for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_entries_are_confirmed(path):
    suite = load_suite()
    findings = replayed(load_entry(path, suite), suite, sample=1, device="cpu", progress=False)
    assert len(findings) == len(suite.cells) and not [finding.difference for finding in findings if finding.difference]


def test_another_host_than_that_of_the_suite_is_refused(suite):
    other = dataclasses.replace(suite, cells=(SuiteCell("pan", 4, "0badf00d", 4),))
    with pytest.raises(ValueError, match="plays pan with weights 0badf00d; this version of far-env has c004cbaa"):
        other.workload(other.cells[0], "cpu")
