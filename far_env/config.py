"""Configurations: a frozen dataclass, filled from a YAML file, overridden from the command line, saved beside the results.

A dataclass declares which of its keys were renamed or removed, so that the error about an old file or command line
names the new key:

    RENAMED: ClassVar[dict[str, str]] = {"old_key": "new_key"}
    REMOVED: ClassVar[tuple[str, ...]] = ("old_key",)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from far_env.errors import unknown_name
from far_env.io import write_text

Config = TypeVar("Config")

CONFIGS_PACKAGE = "far_env.configs"


def from_dict(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """Build dataclass ``cls`` from nested plain values.

    Raises:
        ValueError: on an unknown key (the nearest known one is suggested), a renamed or removed one, a missing one or a value
            of the wrong type. The message begins with ``where``.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    annotations = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            if (problem := _outdated(cls, key)) is not None:
                raise ValueError(f"{where}: {problem}")
            raise ValueError(f"{where}: {unknown_name('key', key, list(fields))}")
        if dataclasses.is_dataclass(annotations[key]):
            arguments[key] = from_dict(annotations[key], value, f"{where}: {key}")
        else:
            arguments[key] = _typed(value, annotations[key], f"{where}: {key}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _typed(value: Any, annotation: Any, where: str) -> Any:
    """The value in the annotated type: lists become tuples, whole numbers and YAML's "1e-3" become floats."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    for choice in choices:
        kind = typing.get_origin(choice) or choice
        if kind is tuple and isinstance(value, list):
            return tuple(value)
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices)
    raise ValueError(f"{where}: expected {wanted}, got {value!r}")


def load_yaml(cls: type[Config], path: str | os.PathLike) -> Config:
    """Read ``path`` into ``cls``. Raises ValueError, naming the file, if it is missing, not YAML, or has unknown keys."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path} is not valid YAML{place}: {getattr(error, 'problem', None) or error}") from error
    return from_dict(cls, values or {}, str(path))


def save_yaml(config: Any, path: Path) -> None:
    """Write a dataclass as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))


def config_names() -> list[str]:
    """The shipped configurations, as `config_path` takes them."""
    folder = importlib.resources.files(CONFIGS_PACKAGE)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def config_path(name: str) -> Path:
    """The file of a configuration: a path, or the name of a shipped one, such as ``pan_tight``.

    An existing file comes first. Without one, ``configs/NAME.yaml``, as it is called in the repository, is the shipped
    configuration NAME, so that the same command works in any working directory.

    Raises:
        ValueError: if the name contains no path separator or suffix, and no such configuration is shipped.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = re.fullmatch(r"(?:configs/)?([\w-]+)\.yaml|([\w-]+)", path.as_posix())
    found = None if shipped is None else shipped[1] or shipped[2]
    if found in config_names():
        return Path(str(importlib.resources.files(CONFIGS_PACKAGE) / f"{found}.yaml"))
    if shipped is not None and shipped[2]:
        raise ValueError(f"{unknown_name('configuration', name, config_names())}; a file is given by its path")
    return path


def parse(cls: type[Config], args: Sequence[str], prog: str, description: str) -> Config:
    """Command line to configuration: ``--config`` (a path or a shipped name) gives the defaults, other flags override fields.

    Raises:
        ValueError: if the configuration cannot be read, or a flag was renamed or removed.
        SystemExit: after ``--help``, or on any other command line that cannot be parsed; tyro has printed why.
    """
    args = list(args)
    default = None
    _check_flags(cls, args)
    if "--config" in args:
        at = args.index("--config")
        if at + 1 >= len(args):
            raise ValueError("--config needs a file name or the name of a shipped configuration after it, such as pan_tight")
        default = load_yaml(cls, config_path(args[at + 1]))
        del args[at : at + 2]
    keywords = {} if default is None else {"default": default}
    return tyro.cli(cls, args=args, prog=f"{prog} [--config NAME]", description=description, **keywords)


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError, naming field and value, unless all these fields of a dataclass are above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}: {name} must be above 0, got {getattr(config, name)}")


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down, so that YAML stays readable."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _outdated(cls: type, key: object) -> str | None:
    """What became of a key that an older version had, or None if there never was one."""
    if (new := getattr(cls, "RENAMED", {}).get(key)) is not None:
        return f"the key {key!r} was renamed; use {new!r}"
    if key in getattr(cls, "REMOVED", ()):
        return f"the option {key!r} was removed; delete it"
    return None


def _check_flags(cls: type, args: Sequence[str]) -> None:
    """Raise ValueError on a flag such as ``--imitation.old-key`` whose key was renamed or removed."""
    for arg in args:
        if not arg.startswith("--"):
            continue
        inner = cls
        for key in arg[2:].split("=")[0].replace("-", "_").split("."):
            if (problem := _outdated(inner, key) or _outdated(inner, key.removeprefix("no_"))) is not None:
                raise ValueError(f"{arg.split('=')[0]}: {problem}")
            field = typing.get_type_hints(inner).get(key)
            if not dataclasses.is_dataclass(field):
                break
            inner = field
