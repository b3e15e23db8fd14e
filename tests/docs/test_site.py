"""The documentation site builds without warnings, is complete, and needs no network."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import gymnasium as gym
import pytest

import far_env  # noqa: F401  (registers the environments)
from far_env import baselines, plugins
from far_env.plugins import entry_points
from tests.docs.blocks import CARDS, PAGES, ROOT, generator

DOCS = ROOT / "docs"
BUILD_SECONDS = 600


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The built site. Where Sphinx is not installed, the tests that need it are skipped."""
    for module in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(module, reason=f"{module} (extra docs) is not installed")
    import subprocess

    out = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    done = subprocess.run([*command, str(DOCS), str(out)], capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_built(site):
    assert {page.stem for page in PAGES if page.parent == DOCS} <= {page.stem for page in site.glob("*.html")}


def test_no_page_shows_an_error(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "ERROR:" not in text and "system-message" not in text, page.name


def test_links_within_the_site_lead_somewhere(site):
    pages = {page.name: page.read_text(encoding="utf-8") for page in site.glob("*.html")}
    anchors = {name: set(re.findall(r'id="([^"]+)"', text)) for name, text in pages.items()}
    for name, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            parts = urlsplit(link)
            if parts.scheme or link == "#":
                continue
            target = unquote(parts.path) or name
            assert (site / target).exists(), (name, link)
            if parts.fragment and target in anchors:
                assert unquote(parts.fragment) in anchors[target], (name, link)


def test_pages_load_nothing_from_the_network(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preload|icon|shortcut icon)"[^>]+href="([^"]+)"', text)
        assert loaded and not [address for address in loaded if urlsplit(address).scheme or address.startswith("//")], page.name


def test_every_environment_baseline_and_command_has_its_entry(site):
    environments = (site / "environments.html").read_text(encoding="utf-8")
    for spec in gym.registry.values():
        assert not spec.id.startswith("far_env/") or spec.id in environments
    listed = set(re.findall(r'id="baseline-([\w-]+)"', (site / "baselines.html").read_text(encoding="utf-8")))
    assert listed == {name.replace("_", "-") for name in baselines.names()}
    assert set(entry_points("far_env.commands")) <= set(
        re.findall(r'id="([\w-]+)"', (site / "commands.html").read_text(encoding="utf-8"))
    )


def test_every_setting_and_option_has_a_meaning():
    module = generator()
    for part in (module.training_settings, module.host_settings, module.all_commands):
        lines = [line for line in part().splitlines() if line.startswith("| `")]
        assert lines and not [line for line in lines if line.endswith("|  |")]


def test_animations_are_small_and_move():
    from PIL import Image

    for world in ("pan", "cuts", "orbit"):
        path = DOCS / "images" / f"{world}.gif"
        assert path.stat().st_size < 300 * 1024
        with Image.open(path) as picture:
            assert picture.n_frames >= 16


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_variables_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert urlsplit(link).scheme or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:configs|far_env|agents|baselines|benchmarks|docs|tests)/[\w/.-]*)`", text):
        is_environment = path.startswith("far_env/") and path.endswith("-v0")
        assert is_environment or (ROOT / path).exists(), path
    source = "".join(
        file.read_text(encoding="utf-8") for file in [*ROOT.glob("far_env/**/*.py"), *ROOT.glob("tests/conftest.py")]
    )
    for variable in re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`", text):
        assert f'"{variable}"' in source, variable


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_modules_on_a_page_can_be_imported(page):
    groups = {plugins.POLICIES, plugins.TOKEN_POLICIES, plugins.HOSTS, plugins.WORKLOADS, plugins.COMMANDS}
    for name in set(re.findall(r"`(far_env(?:\.\w+)+)`", page.read_text(encoding="utf-8"))) - groups:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize(
    "page", [*PAGES, *CARDS, ROOT / "RESULTS.md", ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_table_has_its_heading(page):
    """Rows that a blank line cuts off from their table would be shown as text."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", prose, flags=re.MULTILINE):
        heading, *rest = table.splitlines()
        assert rest and re.fullmatch(r"\|( *:?-+:? *\|)+", rest[0]), heading
        assert heading.count("|") == rest[0].count("|"), heading
