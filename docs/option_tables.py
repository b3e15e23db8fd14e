"""Tables of settings and command options, from the dataclasses and their field docstrings, for docs/generate.py."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import tyro

from far_env.text import markdown_lines


def training_settings() -> str:
    """Every key of a training configuration, with type, default and meaning; what the command alone takes is left out."""
    from far_env.agents.config import AgentTraining

    return _settings(AgentTraining)


def host_settings() -> str:
    """Every key of a host's training configuration, and of a source in it."""
    cls, _ = command_options(commands()["train-host"])
    source = type(cls().sources[0])
    texts = field_texts(source)
    rows = [
        (f"`{field.name}`", f"`{_type_name(source, field.name)}`", _source_default(field), code(texts[field.name]))
        for field in dataclasses.fields(source)
    ]
    head = ("key", "type", "default", "meaning")
    return joined([_settings(cls), "### An entry of `sources`", docstring(source), table(head, rows)])


def _source_default(field: dataclasses.Field) -> str:
    default = _default_of(field)
    return "required" if default is dataclasses.MISSING else _default(default)


def fields_table(cls: type) -> str:
    """Every field of a dataclass as a key of a file, with type and meaning."""
    texts = field_texts(cls)
    rows = [
        (f"`{field.name}`", f"`{_type_name(cls, field.name)}`", code(texts[field.name])) for field in dataclasses.fields(cls)
    ]
    return table(("key", "type", "meaning"), rows)


def _settings(cls: type) -> str:
    """One table of the plain fields of a dataclass, then one per nested dataclass."""
    default = cls()
    texts, plain, nested = field_texts(cls), [], []
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((field.name, value, texts.get(field.name, "")))
        else:
            plain.append(_setting(cls, field.name, field.name, value, texts))
    head = ("key", "type", "default", "meaning")
    parts = [table(head, plain)]
    for name, section, text in nested:
        section_class = type(section)
        texts = field_texts(section_class)
        rows = [
            _setting(section_class, f"{name}.{field.name}", field.name, getattr(section, field.name), texts)
            for field in dataclasses.fields(section_class)
        ]
        parts += [f"### `{name}`", code(text or docstring(section_class)), table(head, rows)]
    return joined(parts)


def _setting(cls: type, key: str, name: str, value: object, texts: dict[str, str]) -> tuple[str, ...]:
    return f"`{key}`", f"`{_type_name(cls, name)}`", _default(value), code(texts.get(name, ""))


def _default(value: object) -> str:
    """A default as YAML, as code; each item of a list separately, so that a table can break the line between items."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        value = tuple(item.clips for item in value)
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value) or "`[]`"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{value}`"


def _type_name(cls: type, name: str) -> str:
    annotation = typing.get_type_hints(cls)[name]
    text = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    text = text.replace("typing.", "").replace("NoneType", "null").replace("None", "null").replace(", ...", "")
    inner = re.sub(r"tuple\[(?:[\w.]+\.)?(\w+)\]", r"list of \1", text)
    return re.sub(r"tuple\[(list of \w+)\]", r"list of \1", inner)


def field_texts(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(inspect.cleandoc(following.value.value).split())
    return texts


class _Captured(BaseException):
    """Carries the options class of a command out of its function."""


def commands() -> dict[str, Callable[[Sequence[str]], int | None]]:
    """Every command of ``far-env`` by name."""
    entries = importlib.metadata.entry_points(group="far_env.commands")
    return {entry.name: entry.load() for entry in sorted(entries, key=lambda entry: entry.name)}


def subcommands() -> dict[str, Callable[[Sequence[str]], int | None]]:
    """Actions that have other options than the command they belong to."""
    from far_env.cli import leaderboard
    from far_env.cli.data_download import download

    return {"data download": download, "leaderboard add": leaderboard.add, "leaderboard check": leaderboard.check}


def command_options(function: Callable[[Sequence[str]], int | None]) -> tuple[type, str]:
    """The options class that a command parses and its description, captured while it parses ``--help``."""

    def capture(cls: type, *, description: str = "", **_: Any) -> None:
        raise _Captured(cls, description)

    with mock.patch.object(tyro, "cli", capture):
        try:
            function(["--help"])
        except _Captured as captured:
            return captured.args
    raise ValueError(f"{function.__module__}.{function.__name__} parses no options")


def all_commands() -> str:
    """Every command: what it does, its arguments and its options."""
    parts = []
    for name, function in sorted({**commands(), **subcommands()}.items()):
        cls, _ = command_options(function)
        texts = field_texts(cls)
        rows, positional = [], []
        for field in dataclasses.fields(cls):
            default = _default_of(field)
            if dataclasses.is_dataclass(default):
                rows.append(
                    (f"`--{_flag(field.name)}.…`", "", code(f"{texts.get(field.name, '')} See the page on training.".strip()))
                )
                continue
            is_positional = "Positional" in str(inspect.get_annotations(cls).get(field.name, ""))
            default_text = "required" if default is dataclasses.MISSING else "" if default in (None, ()) else _default(default)
            if is_positional:
                several = f"{field.name.upper()} ..." if isinstance(default, tuple) else field.name.upper()
                positional.append(several if default is dataclasses.MISSING else f"[{several}]")
            rows.append(
                (
                    f"`{field.name.upper()}`" if is_positional else f"`--{_flag(field.name)}`",
                    default_text,
                    " ".join(filter(None, (_choices(cls, field.name), code(texts.get(field.name, ""))))),
                )
            )
        line = (function.__doc__ or "").strip().splitlines()[0]
        usage = " ".join(["far-env", name, *positional, "[options]"])
        parts += [f"## `{name}`", line, f"```text\n{usage}\n```", table(("option", "default", "meaning"), rows)]
    return joined(parts)


def _choices(cls: type, name: str) -> str:
    """The values that a field takes, where its type names them."""
    annotation = typing.get_type_hints(cls)[name]
    if typing.get_origin(annotation) is not typing.Literal:
        return ""
    return "One of " + ", ".join(f"`{value}`" for value in typing.get_args(annotation)) + "."


def _default_of(field: dataclasses.Field) -> object:
    """The default of a field, or ``dataclasses.MISSING``."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _flag(name: str) -> str:
    return name.replace("_", "-")


def docstring(obj: object) -> str:
    """The docstring of a class without indentation; empty if there is none."""
    return inspect.cleandoc(obj.__doc__ or "")


def code(text: str) -> str:
    """A docstring's ``code`` and `reference` as Markdown's code."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return markdown_lines([[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)])


def joined(parts: Iterable[str]) -> str:
    """The parts that are not empty as paragraphs."""
    return "\n\n".join(part for part in parts if part)
