"""The fenced blocks of the README, the documentation pages and the cards."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted([*ROOT.glob("agents/pretrained/*/README.md"), *ROOT.glob("far_env/assets/*/README.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's blocks in these languages."""
    text = page.read_text(encoding="utf-8")
    all_blocks = [Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in BLOCK.finditer(text)]
    return [block for block in all_blocks if block.language in languages]


def commands(page: Path) -> list[list[str]]:
    """The page's shell commands as arguments; a line that ends in a backslash continues on the next."""
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def generator(name: str = "generate") -> ModuleType:
    """A module of docs/ by file name; the folder is not a package, and its modules import each other."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.insert(0, str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
