"""Configurations: YAML into dataclasses, typed, overridden from the command line, saved and read back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from far_env.agents.ppo import AgentTraining
from far_env.agents.sweep import Sweep

from far_env.config import from_dict, load_yaml, parse, save_yaml
from far_env.host.training.config import HostTraining
from far_env.io import make_run_dir

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ("a",)
    size: int | str = 1
    where: str | None = None
    count: int = 0


def test_values_are_typed():
    config = from_dict(Outer, {"inner": {"rate": "1e-3", "flag": True}, "names": ["x", "y"], "size": "big", "where": None}, "f")
    assert config == Outer(Inner(0.001, True), ("x", "y"), "big", None)
    assert isinstance(from_dict(Outer, {"inner": {"rate": 2}}, "f").inner.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"rate": "fast"}}, r"f: inner: rate: expected float, got 'fast'"),
        ({"count": 1.5}, r"f: count: expected int, got 1.5"),
        ({"count": True}, r"f: count: expected int, got True"),
        ({"names": "x"}, r"f: names: expected tuple\S*, got 'x'"),
        ({"inner": 3}, r"f: inner: expected a mapping of settings, got int"),
        ({"where": 3}, r"f: where: expected str or NoneType, got 3"),
        ({"inner": {"flagg": True}}, r"f: inner: unknown key 'flagg'; did you mean 'flag'\?"),
        ({"zzz": 1}, r"f: unknown key 'zzz'; known: inner, names, size, where, count"),
    ],
)
def test_wrong_keys_and_types_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Outer, values, "f")


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner: {rate: 0.5}\ncount: 3\n")
    config = parse(Outer, ["--config", str(path), "--count", "4", "--inner.flag"], "prog", "")
    assert config == Outer(Inner(0.5, True), count=4)


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("*.yaml")} - {CONFIGS / "results.yaml"}), ids=lambda path: path.name)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    cls = HostTraining if path.name.startswith("host") else Sweep if path.name == "sweep.yaml" else AgentTraining
    config = load_yaml(cls, path)
    save_yaml(config, tmp_path / "saved.yaml")
    assert load_yaml(cls, tmp_path / "saved.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["saved.yaml"]


def test_unwritable_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        make_run_dir(tmp_path / "file" / "run")
    folder = make_run_dir(tmp_path / "a" / "b")
    assert list(folder.iterdir()) == []
    if os.geteuid() != 0:
        folder.chmod(0o500)
        with pytest.raises(ValueError, match="cannot be written: Permission denied"):
            make_run_dir(folder)
