"""Configurations: YAML into dataclasses, typed, overridden from the command line, saved and read back."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from far_env.agents.config import AgentTraining
from far_env.agents.options import Sweep
from far_env.clips.recorder.settings import RecordSettings
from far_env.config import config_names, config_path, from_dict, load_yaml, parse, save_yaml
from far_env.host.training.compressor_config import CompressorTraining
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
        ({"where": True}, r"f: where: expected str or NoneType, got True; put it in quotes if it is meant as text"),
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


def test_clip_options_are_a_mapping_in_a_file_and_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("clip_options: {diagonal: true, step_pixels: [4, 8]}\ndata_dir: videos\n")
    config = load_yaml(AgentTraining, path)
    assert config.source_options == {"diagonal": True, "step_pixels": [4, 8], "data_dir": "videos"}
    save_yaml(config, path)
    assert load_yaml(AgentTraining, path) == parse(AgentTraining, ["--config", str(path)], "prog", "") == config
    given = parse(AgentTraining, ["--config", str(path), "--clip-options", "{objects: 2}"], "prog", "")
    assert given.source_options == {"objects": 2, "data_dir": "videos"}
    save_yaml(AgentTraining(), path)
    assert load_yaml(AgentTraining, path).source_options == {}
    for text, message in (
        ("[1]", r"--clip-options needs names with values, such as '\{objects: 2\}', got '\[1\]'"),
        ("{a: [", "--clip-options is not valid YAML: expected the node content"),
        ("{1: 2}", r"clip_options must be a mapping of names to values, got \{1: 2\}"),
        ("{host: embedded}", "clip_options has 'host', which is no option of a clip source"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(AgentTraining, ["--clip-options", text], "prog", "")


@pytest.mark.parametrize("text", ["true", '"true"', "'true'", "generated", "false", "null"])
def test_feedback_is_a_word_or_what_yaml_makes_of_it(text, tmp_path):
    path, expected = tmp_path / "c.yaml", {"generated": "generated", "false": "generated", "null": None}.get(text, "true")
    path.write_text(f"feedback: {text}\n")
    config = load_yaml(AgentTraining, path)
    assert config.feedback == expected
    save_yaml(config, path)
    assert load_yaml(AgentTraining, path) == config
    if expected:
        assert parse(AgentTraining, ["--feedback", expected], "prog", "").feedback == expected
    assert parse(AgentTraining, ["--config", str(path), "--seed", "1"], "prog", "").feedback == expected
    path.write_text("feedback: some\n")
    with pytest.raises(ValueError, match=r"unknown feedback 'some'; .*generated"):
        load_yaml(AgentTraining, path)
    with pytest.raises(ValueError, match="unknown feedback 'some'"):
        parse(AgentTraining, ["--feedback", "some"], "prog", "")


@pytest.mark.parametrize("path", sorted({*CONFIGS.glob("*.yaml")} - {CONFIGS / "results.yaml"}), ids=lambda path: path.name)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    kinds = {"host": HostTraining, "record": RecordSettings, "sweep": Sweep, "compressor": CompressorTraining}
    cls = kinds.get(path.stem.partition("_")[0], AgentTraining)
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


@dataclass(frozen=True)
class Renaming:
    RENAMED: ClassVar[dict[str, str]] = {"old_rate": "rate"}
    REMOVED: ClassVar[tuple[str, ...]] = ("label",)
    rate: float = 0.1


@dataclass(frozen=True)
class HasRenaming:
    RENAMED: ClassVar[dict[str, str]] = {"stage": "inner"}
    inner: Renaming = field(default_factory=Renaming)


@pytest.mark.parametrize(
    ("values", "flag", "message"),
    [
        ({"inner": {"old_rate": 1}}, ["--inner.old-rate", "1"], r"the key 'old_rate' was renamed; use 'rate'"),
        ({"inner": {"label": "x"}}, ["--inner.label=x"], r"the option 'label' was removed; delete it"),
        ({"stage": {"rate": 1}}, ["--stage.rate", "1"], r"the key 'stage' was renamed; use 'inner'"),
    ],
)
def test_old_keys_and_flags_name_what_became_of_them(values, flag, message):
    with pytest.raises(ValueError, match=message):
        from_dict(HasRenaming, values, "f")
    with pytest.raises(ValueError, match=message):
        parse(HasRenaming, flag, "prog", "")
    assert parse(HasRenaming, ["--inner.rate", "2"], "prog", "").inner.rate == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"stand_in": {}}, "surrogate"),
        ({"imitation": {"rehearsal": 1.0}}, "removed"),
        ({"imitation": {"regret": 1.0}}, "expected_cost_weight"),
        ({"imitation": {"candidates": 8}}, "removed"),
        ({"network": {"one_by_one": True}}, "removed"),
        ({"network": {"surroundings": True}}, "removed"),
        ({"network": {"statistics": []}}, "signals"),
        ({"ppo": {"critic_updates": 4}}, "critic_warmup_updates"),
        ({"surrogate": {"critic_updates": 4}}, "critic_warmup_updates"),
        ({"imitation": {"label": "coverage"}}, "removed"),
        ({"network": {"independent": False}}, "removed"),
        ({"reward": {"relative_to": None}}, "removed"),
    ],
)
def test_training_settings_of_older_versions_are_refused_with_the_new_name(old, new):
    with pytest.raises(ValueError, match=f"(renamed; use '{new}'|was {new})"):
        from_dict(AgentTraining, old, "config.yaml")


def test_shipped_configurations_are_found_by_name_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"pan_tight", "results", "host_embedded"} <= set(config_names())
    shipped = (CONFIGS / "pan_tight.yaml").read_text()
    for name in ("pan_tight", "pan_tight.yaml", "configs/pan_tight.yaml"):
        assert config_path(name).read_text() == shipped
    assert parse(AgentTraining, ["--config", "pan_tight"], "prog", "").run_dir == "runs/pan_tight"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "pan_tight.yaml").write_text("seed: 7\n")
    assert parse(AgentTraining, ["--config", "configs/pan_tight.yaml"], "prog", "").seed == 7, "an existing file comes first"
    with pytest.raises(
        ValueError, match=r"unknown configuration 'pan_tigt'; did you mean 'pan_tight'\?; a file is given by its path"
    ):
        config_path("pan_tigt")
    with pytest.raises(ValueError, match=r"cannot read the configuration other/x\.yaml"):
        parse(AgentTraining, ["--config", "other/x.yaml"], "prog", "")
