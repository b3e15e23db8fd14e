"""Code and commands of the documentation: Python runs, every command is parsed by the program it names, cheap ones are run."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro
import yaml

from far_env.cli import main
from far_env.config import from_dict
from far_env.plugins import entry_points
from tests.docs.blocks import CARDS, PAGES, ROOT, Block, blocks, commands, generator

EXAMPLE = ROOT / "docs" / "examples" / "far-env-example"
EXTENDING, OWN_MODEL = ROOT / "docs" / "extending.md", ROOT / "docs" / "own_model.md"
RUN_FOLDERS = ("runs/pan_tight", "runs/mine")
SHRINK = {r"range\(64\)": "range(2)", r"learn\(6400\)": "learn(64)"}
FEW = {"--clips": "2", "--sample": "2"}
RUN = {"baselines", "benchmark", "evaluate", "export", "report", "tune", "validate"}
"""Commands that are run; of the others, only the options are checked."""


class Parsed(BaseException):
    """Raised once a command has parsed its options, so that it does no more."""


@pytest.fixture
def parse_only(monkeypatch):
    parse = tyro.cli

    def stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder that has what the pages assume to be there: finished runs and a policy file."""
    for folder in RUN_FOLDERS:
        shutil.copytree(ROOT / "agents" / "pretrained" / "general", tmp_path / folder)
    shutil.copy(EXAMPLE / "far_env_example" / "policies.py", tmp_path / "every_second.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


def with_few_clips(command: list[str]) -> list[str]:
    return [FEW.get(before, word) for before, word in zip(["", *command], command, strict=False)]


def names_the_example(command: list[str]) -> bool:
    return not {"mixed", "nearest_frame"}.isdisjoint(command)


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_runs(block, workplace):
    code = block.text
    for long, short in SHRINK.items():
        code = re.sub(long, short, code)
    exec(compile(code, str(block), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, workplace, parse_only):
    for command in commands(page):
        if not names_the_example(command):
            check(command)


def check(command: list[str]) -> None:
    """Have the program that a command names parse its arguments; SystemExit or an assertion names the mistake."""
    program, *args = command
    if program == "far-env" and args != ["--help"]:
        with pytest.raises(Parsed):
            assert not main(args), command
    elif program == "far-env":
        assert main(args) == 0
    elif program == "python" and args[0] == "train_agent.py":
        with pytest.raises(Parsed):
            assert not main(["train", *args[1:]]), command
    elif program == "python" and args[0] == "-m":
        with pytest.raises(Parsed):
            tyro.cli(importlib.import_module(args[1]).Options, args=args[2:])
    elif program == "accelerate":
        at = args.index("far_env.cli")
        assert args[0] == "launch" and args[at - 1] == "-m"
        check(["far-env", *args[at + 1 :]])
    elif program == "python" and args[0].startswith("docs/"):
        assert len(args) == 1 and (ROOT / args[0]).is_file()
    elif program == "python":
        assert args[0] == "-c"
        compile(args[1], " ".join(command), "exec")
    elif program == "make":
        assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif program == "pip":
        assert args[:2] == ["install", "-e"]
        path, _, extra = args[2].partition("[")
        assert (ROOT / path / "pyproject.toml").is_file()
        extras = tomllib.loads((ROOT / path / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
        assert not extra or extra.removesuffix("]") in extras
    elif program in ("pytest", "ruff"):
        assert all((ROOT / word).exists() for word in args if "/" in word)
    else:
        assert program in ("python3", "source", "tensorboard"), command


def test_every_command_is_explained():
    named = {command[1] for page in PAGES for command in commands(page) if command[0] == "far-env"}
    assert set(entry_points("far_env.commands")) <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_cheap_commands_run(page, workplace):
    for command in commands(page):
        program, *args = command
        needs_data = "--data-dir" in args or ("ucf101_short_prediction" in args and "--host" not in args)
        needs_data = needs_data or any("hub:" in word for word in args)
        if program == "far-env" and args[0] in RUN and not needs_data and not names_the_example(command):
            assert main(with_few_clips(args)) == 0, command


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_yaml_is_a_configuration(block):
    command = "train-host" if block.page.name == "hosts.md" else "train"
    settings, _ = generator("option_tables").command_options(entry_points("far_env.commands")[command].load())
    assert from_dict(settings, yaml.safe_load(block.text), str(block))


@pytest.fixture(scope="session")
def installed_example(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH in which the example package counts as installed: its modules and its metadata."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    for package in tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]:
        shutil.copytree(EXAMPLE / package, folder / package)
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{key} = {values[key]}\n" for key in values)
        for group, values in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    return folder


FAR_ENV = "import sys; from far_env.cli import main; sys.exit(main(sys.argv[1:]))"


def run_with(folder: Path, *args: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_package_works_as_its_page_says(installed_example):
    wanted = [command for command in commands(EXTENDING) if names_the_example(command)]
    assert {command[1] for command in wanted} == {"evaluate", "clip-facts"}
    outputs = [run_with(installed_example, "-c", FAR_ENV, *with_few_clips(command[1:])) for command in wanted]
    assert "every_second" in outputs[0] and "2 ODE steps; host embedded_two_steps" in outputs[0]
    assert "frames (16, 3, 64, 64)" in outputs[1]


def test_the_example_host_works_as_its_page_says(installed_example):
    (command,) = [command for command in commands(OWN_MODEL) if names_the_example(command)]
    output = run_with(installed_example, "-c", FAR_ENV, *with_few_clips(command[1:]))
    assert "full_history" in output and "1 ODE steps; host nearest_frame" in output


def test_the_example_package_is_found_by_help_and_gymnasium(installed_example):
    assert "clip-facts" in run_with(installed_example, "-c", FAR_ENV, "--help")
    code = "import far_env, gymnasium as gym; print(gym.make('far_env/Mixed-v0', budget=4).reset(seed=0)[1]['max_frames'])"
    assert run_with(installed_example, "-c", code).strip() == "4"


def test_the_example_workload_draws_both_worlds_and_never_a_clip_twice(installed_example, monkeypatch):
    monkeypatch.syspath_prepend(str(installed_example))
    mixed = importlib.import_module("far_env_example.worlds").Mixed()
    frames = [mixed.clip("test", clip_id).frames.tobytes() for clip_id in range(6)]
    assert len(set(frames)) == 6
    assert frames[2] == mixed.parts[0].clip("test", 1).frames.tobytes()
    assert frames[3] == mixed.parts[1].clip("test", 1).frames.tobytes()
