"""The README's commands exist, and its Python runs as printed."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tyro

from far_env.agents.commands import ExportOptions
from far_env.agents.ppo import AgentTraining
from far_env.agents.reproduce import ReproduceOptions, load_tables
from far_env.agents.sweep import Sweep
from far_env.baselines.command import BaselinesOptions
from far_env.cli.benchmark import BenchmarkOptions
from far_env.cli.data import DataOptions
from far_env.cli.evaluate import EvaluateOptions
from far_env.cli.extended import ExtendedOptions
from far_env.cli.report import ReportOptions
from far_env.cli.selftest import SelfTestOptions
from far_env.cli.validate import ValidateOptions
from far_env.cli.weights import WeightsOptions
from far_env.config import load_yaml, parse
from far_env.host.training.config import HostTraining
from far_env.host.training.train import check_models
from far_env.host.weights import load_host
from far_env.plugins import entry_points

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPTIONS = {
    "baselines": BaselinesOptions,
    "benchmark": BenchmarkOptions,
    "data": DataOptions,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
    "extended": ExtendedOptions,
    "report": ReportOptions,
    "reproduce": ReproduceOptions,
    "selftest": SelfTestOptions,
    "train-host": HostTraining,
    "validate": ValidateOptions,
    "weights": WeightsOptions,
}


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 6
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_commands_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for program, *args in commands():
        if program == "far-env":
            name, *args = args
            assert name in entry_points("far_env.commands")
            parse(OPTIONS[name], args, program, "")
            seen.add(name)
        elif args[:1] == ["train_agent.py"]:
            parse(AgentTraining, args[1:], "train_agent.py", "")
            seen.add("train_agent.py")
        elif args[:2] == ["-m", "far_env.agents.sweep"]:
            parse(Sweep, args[2:], "far_env.agents.sweep", "")
            seen.add("far_env.agents.sweep")
        elif args[:1] == ["-m"]:
            tyro.cli(importlib.import_module(args[1]).Options, args=args[2:])
            seen.add(args[1])
        elif program == "pip":
            extra = re.fullmatch(r"\.\[(\w+)\]", args[-1])[1]
            assert (
                args[:2] == ["install", "-e"]
                and extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            )
        else:
            assert (program, args[:1]) == ("tensorboard", ["--logdir"])
    assert seen == {
        *entry_points("far_env.commands"),
        "train_agent.py",
        "benchmarks.rollout",
        "benchmarks.parts",
        "benchmarks.host",
        "far_env.agents.learning_curves",
        "far_env.agents.publish",
        "far_env.agents.regret",
        "far_env.agents.sweep",
    }


def test_the_files_it_names_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    paths = re.findall(r"`((?:configs|far_env|agents|baselines|benchmarks)/[\w/.]*)`", README)
    assert links and paths
    for name in links + paths:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path):
    if path.name.startswith("host"):
        config = load_yaml(HostTraining, path)
        check_models(config, None if config.start_from is None else load_host(config.start_from, "cpu"))
    elif path.name == "results.yaml":
        assert load_tables(path)[0]
    elif path.name == "sweep.yaml":
        assert load_yaml(Sweep, path).search
    else:
        load_yaml(AgentTraining, path)
