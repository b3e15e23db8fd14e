"""Configurations: a frozen dataclass, filled from a YAML file, overridden from the command line, saved beside the results."""

from __future__ import annotations

import contextlib
import dataclasses
import os
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


def from_dict(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """Build dataclass ``cls`` from nested plain values.

    Raises:
        ValueError: on an unknown key (the nearest known one is suggested), a missing one or a value of the wrong type, naming
            ``where`` it stood.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    annotations = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
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
    """The value as its annotation wants it: lists become tuples, whole numbers and YAML's "1e-3" become floats."""
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


def parse(cls: type[Config], args: Sequence[str], prog: str, description: str) -> Config:
    """Command line to configuration: ``--config FILE`` gives the defaults, every other flag overrides one field."""
    args = list(args)
    default = None
    if "--config" in args:
        at = args.index("--config")
        if at + 1 >= len(args):
            raise ValueError("--config needs a file name after it, such as configs/pan_tight.yaml")
        default = load_yaml(cls, args[at + 1])
        del args[at : at + 2]
    keywords = {} if default is None else {"default": default}
    return tyro.cli(cls, args=args, prog=f"{prog} [--config FILE]", description=description, **keywords)


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
