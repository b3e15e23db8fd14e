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
import io
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from far_env.errors import first_line, short, unknown_name
from far_env.io import read_utf8, write_text

Config = TypeVar("Config")

CONFIGS_PACKAGE = "far_env.configs"
MAX_VALUES = 100_000
"""Values in a YAML file, with all aliases expanded."""


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
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _typed(value: Any, annotation: Any, where: str) -> Any:
    """The value in the annotated type: lists become tuples, whole numbers and YAML's "1e-3" become floats."""
    choices = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    for choice in choices:
        kind, inner = typing.get_origin(choice) or choice, typing.get_args(choice)
        if kind is Any:
            return value
        if kind in (tuple, list) and isinstance(value, list | kind):
            if not inner or dataclasses.is_dataclass(inner[0]):  # which the reader builds, as it can name the place
                return kind(value)
            return kind(_typed(item, inner[0], where) for item in value)
        if kind is dict and inner and isinstance(value, dict):
            return {_typed(key, inner[0], where): _typed(item, inner[1], f"{where}: {key}") for key, item in value.items()}
        if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                if math.isfinite(number := float(value)):
                    return number
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices)
    infinite = float in choices and isinstance(value, int | float) and not isinstance(value, bool)
    unquoted = "; put it in quotes if it is meant as text" if str in choices and isinstance(value, bool) else ""
    why = ", which is not finite" if infinite else unquoted
    raise ValueError(f"{where}: expected {wanted}, got {short(value)}{why}")


class _Loader(yaml.SafeLoader):
    """Plain values alone, and every key once."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark
                )
            keys.add(str(key.value))
        return node


def load_yaml(cls: type[Config], path: str | os.PathLike) -> Config:
    """Read ``path`` into ``cls``. Raises ValueError, naming the file, if it is missing, not YAML, or has unknown keys."""
    try:
        text = read_utf8(Path(path))
        values = yaml.load(text, _Loader)  # which makes plain values alone
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{path} is not valid YAML{place}: {getattr(error, 'problem', None) or first_line(error)}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # text that is not UTF-8, numbers and dates that are none
        raise ValueError(f"{path} is not valid YAML: {first_line(error)}") from error
    _check_size(values, path)
    return from_dict(cls, {} if values is None else values, str(path))


def parse_mapping(text: str, option: str) -> dict[str, Any]:
    """The value of a command-line option that is a YAML mapping, such as ``{objects: 2}``; an empty one without a text.

    Raises:
        ValueError: if it is something else.
    """
    try:
        values = yaml.load(text, _Loader) if text else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--{option} is not valid YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--{option} needs names with values, such as '{{objects: 2}}', got {short(text)}")
    _check_size(values, f"--{option}")
    return values


def _check_size(values: Any, path: str | os.PathLike) -> None:
    """Raise ValueError if the values are endless or very many: aliases of aliases double them with every line."""
    pending, count = [values], 0
    while pending:
        value = pending.pop()
        count += 1
        if count + len(pending) > MAX_VALUES:
            raise ValueError(f"{path} holds more than {MAX_VALUES:,} values, aliases expanded; write it without nested aliases")
        pending.extend([*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ())


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
        ValueError: one sentence, if the configuration cannot be read, a flag was renamed or removed, or the command line cannot
            be parsed; it names the option, the value and what is allowed.
        SystemExit: after ``--help``.
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
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=args, prog=f"{prog} [--config NAME]", description=description, **keywords)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ValueError(f"{_sentence(printed.getvalue())}; {prog} --help describes the options") from None


def _sentence(box: str) -> str:
    """What tyro says in a box about a command line, in one sentence: the reason, then the options that may be meant."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│| ") for line in box.splitlines()]
    lines = [line if line.strip("─━-╭╮╰╯+ ") else "" for line in lines]  # rules, and the box's lower edge
    if lines[:1] and (lines[0].startswith("╭") or lines[1:2] == [""]):
        lines = lines[1 if lines[0].startswith("╭") else 2 :]  # the title, which the terminal's encoding draws in two ways
    reason = " ".join(lines[: lines.index("") if "" in lines else None])
    unknown = lines.index("Unrecognized options:") if "Unrecognized options:" in lines else len(lines)
    options = list(dict.fromkeys(re.findall(r"^(--[\w.-]+(?: [A-Z{\[].*)?)$", "\n".join(lines[:unknown]), re.MULTILINE)))
    if reason.startswith("Missing") and options:
        unrecognized = [line for line in lines[unknown:] if line.startswith("--")]
        return "; ".join([f"missing: {', '.join(options)}", *(f"unknown option {option}" for option in unrecognized)])
    if not options:
        return reason
    return f"{reason}; {'did you mean' if 'Perhaps you meant:' in lines else 'it is used as'} {' or '.join(options)}"


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
