"""The package's metadata are the same in every file that states them."""

from __future__ import annotations

import dataclasses
import re
import tomllib

import yaml

import far_env
from far_env.plugins import entry_points
from tests.docs.blocks import ROOT, generator

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == far_env.__version__ == citation["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased" and PROJECT["version"] in headings


def test_licences_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == citation["license"] == "MIT"
    assert licence.startswith("MIT License") and "the far-env authors" in licence


def test_the_development_tools_include_those_of_the_documentation():
    extras = PROJECT["optional-dependencies"]
    assert any("docs" in requirement for requirement in extras["dev"])
    assert not {"sphinx", "furo", "myst-parser"} & {re.match(r"[\w-]+", name)[0] for name in PROJECT["dependencies"]}


def test_the_page_on_installing_lists_every_extra():
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(PROJECT["optional-dependencies"])


def test_classifiers_name_the_versions_of_python_that_are_supported():
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == ">=3.11"


def test_the_changelog_names_every_key_that_was_renamed_or_removed():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    settings, _ = generator("option_tables").command_options(entry_points("far_env.commands")["train"].load())
    sections = {"": settings} | {field.name: type(getattr(settings(), field.name)) for field in dataclasses.fields(settings)}
    renamed = 0
    for section, cls in sections.items():
        prefix = f"{section}." * bool(section)
        for old, new in getattr(cls, "RENAMED", {}).items():
            is_shared = section in ("surrogate", "ppo")  # one class, whose keys the changelog names without the section
            line = rf"\| `{'' if is_shared else prefix}{old}` \| `{'' if is_shared else prefix}{new}` \|"
            assert re.search(line, changelog), (prefix, old)
            renamed += 1
        for old in getattr(cls, "REMOVED", ()):
            assert f"`{prefix}{old}`" in changelog, (prefix, old)
    assert renamed >= 5
