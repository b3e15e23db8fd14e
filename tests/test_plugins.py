"""Another distribution's policy, host, workload and command are found; a broken one affects no other command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import far_env
from far_env import plugins
from far_env.host.weights import load_host
from far_env.policies import load_policy, policy_facts, policy_names
from far_env.workloads import WORKLOADS, make_workload

PACKAGE = Path(__file__).parent / "plugin_package"
USE_EVERYTHING = """
import json, sys
import gymnasium as gym
import far_env
assert "torch" not in sys.modules and "far_env_example" not in sys.modules, "importing far_env imports no plugin"
from far_env.cli import main
env = gym.make("far_env/ShortPan-v0", budget=4, device="cpu")
observation, info = env.reset(seed=0)
observation, reward, terminated, truncated, info = env.step(env.action_space.sample() | 1)
status = main(["evaluate", "--policies", "keep_oldest,recent_fill", "--workload", "short_pan", "--clips", "2",
               "--device", "cpu", "--metrics", "psnr", "--out", sys.argv[1], "--json", sys.argv[1] + ".json"])
print(json.dumps({"steps": 1, "terminated": bool(terminated), "status": status}))
"""


def install(package: Path, target: Path) -> None:
    """Write what pip writes for a pure Python package, without pip: the modules, the metadata and the entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("pyproject.toml", "__pycache__"), dirs_exist_ok=True)
    info = target / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


def python(target: Path, *args: str) -> subprocess.CompletedProcess[str]:
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    install(PACKAGE, target)
    broken = target / "broken-0.1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    groups = {"policies": "lost", "hosts": "lost_host", "workloads": "lost_world", "commands": "lost-command"}
    text = "".join(f"[far_env.{group}]\n{name} = no_such_module:thing\n" for group, name in groups.items())
    (broken / "entry_points.txt").write_text(text)
    return target


def test_its_policy_host_workload_and_environment_are_used_by_name(installed, tmp_path):
    result = python(installed, "-c", USE_EVERYTHING, str(tmp_path / "results"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"steps": 1, "terminated": False, "status": 0}
    table = json.loads((tmp_path / "results.json").read_text())
    assert (table["workload"], table["host"], table["predict"], table["ode_steps"]) == ("short_pan", "example_host", 3, 1)
    assert set(table["policies"]) == {"keep_oldest", "recent_fill"}
    lines = (tmp_path / "results" / "records.jsonl").read_text().splitlines()
    plans = {record["policy"]: record["plan"] for record in map(json.loads, lines) if record["clip"] == 0}
    assert [entry["kept"] for entry in plans["keep_oldest"]] == [[0, 1, 2, 5], [0, 1, 2, 6]]
    settings = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    assert settings["policies"]["keep_oldest"] == {
        "family": "plugin",
        "source": "far-env-example 1.2 (far_env_example.policy:KeepOldest)",
        "note": "Keeps the oldest frames and the newest one.",
    }


def test_its_command_is_listed_and_run_beside_one_that_cannot_be_imported(installed):
    listed = python(installed, "-m", "far_env.cli", "--help")
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("  count-letters ")]
    assert listed.returncode == 0 and line.endswith(" Print how many letters the arguments have. (from far-env-example)")
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("  lost-command ")]
    assert "the distribution broken" in line and "No module named 'no_such_module'" in line
    ran = python(installed, "-m", "far_env.cli", "count-letters", "two", "words")
    assert (ran.returncode, ran.stdout) == (3, "8 letters\n")
    lost = python(installed, "-m", "far_env.cli", "lost-command")
    assert lost.returncode == 2 and lost.stderr.count("\n") == 1
    assert "the plugin 'lost-command' of the distribution broken (no_such_module:thing) cannot be imported" in lost.stderr


def test_a_policy_or_workload_that_cannot_be_imported_is_one_sentence(installed):
    for args, name in (
        (["--policies", "lost"], "'lost'"),
        (["--policies", "recent_fill", "--workload", "lost_world"], "'lost_world'"),
    ):
        result = python(installed, "-m", "far_env.cli", "evaluate", *args)
        error = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert f"the plugin {name} of the distribution broken" in error and "No module named 'no_such_module'" in error


def entry(group, name, value, distribution):
    declared = EntryPoint(name, value, group)
    vars(declared)["dist"] = type("Distribution", (), {"name": distribution, "version": "1"})
    return declared


def test_a_name_that_two_distributions_declare_belongs_to_far_env(monkeypatch):
    declared = [
        entry(plugins.WORKLOADS, "pan", value, owner) for owner, value in (("aaa", "x:y"), ("far-env", "far_env.workloads:PAN"))
    ]
    declared += [entry(plugins.WORKLOADS, "other", "x:y", owner) for owner in ("zzz", "bbb")]
    monkeypatch.setattr(plugins, "_all_entry_points", lambda: EntryPoints(declared))
    entries = plugins.entry_points(plugins.WORKLOADS)
    assert {name: plugins.distribution_name(point) for name, point in entries.items()} == {
        "pan": "far-env",
        "other": "bbb",
    }


def test_missing_metadata_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(plugins, "_all_entry_points", lambda: EntryPoints([]))
    with pytest.raises(ValueError, match=r"declare no far_env\.policies.*run pip install again"):
        load_policy("recent_fill")
    from far_env.cli import main

    assert main(["--help"]) == 2
    error = capsys.readouterr().err
    assert "the package is not installed in this environment" in error and error.count("\n") == 1
    with pytest.warns(UserWarning, match="no environments are registered: the installed metadata"):
        far_env._register_environments()


def test_what_is_declared_can_be_imported():
    for group in (plugins.POLICIES, plugins.HOSTS, plugins.WORKLOADS, plugins.COMMANDS):
        for declared in plugins.entry_points(group).values():
            if plugins.distribution_name(declared) == "far-env":
                plugins.load(declared)


def test_a_workload_that_is_none_is_one_sentence(monkeypatch):
    wrong = [entry(plugins.WORKLOADS, "number", "math:pi", "far-env"), entry(plugins.WORKLOADS, "text", "os:getcwd", "far-env")]
    monkeypatch.setattr(plugins, "_all_entry_points", lambda: EntryPoints(wrong))
    with pytest.raises(ValueError, match="the workload number of the distribution far-env cannot be made: TypeError"):
        WORKLOADS["number"]
    with pytest.raises(ValueError, match="must be a WorkloadSpec or a function that returns one, got str"):
        make_workload("text")


def test_a_host_that_cannot_be_made_is_one_sentence(monkeypatch):
    wrong = [entry(plugins.HOSTS, "number", "math:sqrt", "far-env")]
    monkeypatch.setattr(plugins, "_all_entry_points", lambda: EntryPoints(wrong))
    with pytest.raises(ValueError, match="the host number of the distribution far-env cannot be made: TypeError"):
        load_host("number", "cpu")


def test_environment_names_follow_from_workload_names():
    assert far_env.environment_id("my_world-2") == "far_env/MyWorld2-v0"
    names = ["Pan", "Cuts", "Orbit", "UCF101Short", "DMLabLong", "UCF101C4P12", "BAIRC2P14", "BAIRC2P28", "DMLabC144P156"]
    names += ["DMLabC36P264", "MinecraftC144P156", "MinecraftC36P264", "PanWide", "CutsWide", "OrbitWide", "Recorded", "Doom"]
    names += ["Prompted", "PromptedVideo"]
    names += ["Maze", "MazeLong", "MazeRetrieval", "MazeRetrievalC36P36", "Ucf101C0p16128", "Ucf101C0p16256"]
    built_in = [
        declared.name
        for declared in plugins.entry_points(plugins.WORKLOADS).values()
        if plugins.distribution_name(declared) == "far-env"
    ]
    assert {far_env.environment_id(name) for name in built_in} == {f"far_env/{name}-v0" for name in names}


def test_policy_names_and_facts():
    names = policy_names()
    assert {"recent_fill", "pretrained/general", "full_history"} <= set(names)
    assert policy_facts("recent_fill")["tier"] == "M" and policy_facts("full_history") == {"note": "nothing is dropped"}
    assert load_policy("full_history") is None


def test_a_folder_does_not_hide_a_policy_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recent_fill").mkdir()
    assert load_policy("recent_fill").name == "recent_fill"
