"""Text is UTF-8 whatever the system's encoding is, and every module can be imported where Unix's own modules are missing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path for folder in ("far_env", "agents", "baselines", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")
)


def _mode(call: ast.Call, at: int) -> str:
    """The mode of a call of open, by position or by name; "?" where it is no literal."""
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[at : at + 1]
    if not given:
        return "r"
    return given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else "?"


def without_encoding(source: str) -> list[int]:
    """Lines that open, read or write text in the system's encoding."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        function = call.func
        if isinstance(function, ast.Name) and function.id == "open":
            text = "b" not in _mode(call, 1)
        elif isinstance(function, ast.Attribute) and function.attr == "open":
            module = function.value.id if isinstance(function.value, ast.Name) else ""
            # A `file` is an archive, whose members are opened as bytes.
            opens_bytes = module in ("av", "Image", "os", "file", "tarfile")
            text = not opens_bytes and "b" not in _mode(call, 1 if module == "gzip" else 0)
        elif isinstance(function, ast.Attribute) and function.attr in ("read_text", "write_text"):
            text = len(call.args) < (1 if function.attr == "read_text" else 2)
        elif isinstance(function, ast.Attribute) and function.attr in ("run", "Popen", "check_output"):
            text = any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
        else:
            continue
        if text:
            lines.append(call.lineno)
    return lines


def test_the_walk_finds_text_without_an_encoding():
    source = "open(p)\npath.open('w')\npath.read_text()\npath.write_text(t)\nopen(p, 'rb')\nav.open(p)\npath.open(mode='ab')\n"
    assert without_encoding(source) == [1, 2, 3, 4]
    assert without_encoding("open(p, encoding='utf-8')\nwrite_text(path, t)\nsubprocess.run(c, text=True)\n") == [3]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_as_utf_8(path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


IMPORT_ALL = """
import sys
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
sys.modules["transformers"] = None  # an extra, which looks for them by the system's name
import importlib, pkgutil
import far_env
count = 0
for module in pkgutil.walk_packages(far_env.__path__, "far_env."):
    if module.name.rpartition(".")[2] != "__main__":
        importlib.import_module(module.name)
        count += 1
assert count > 60, count
import math, torch
from pathlib import Path
from far_env.device import peak_memory_mib
from far_env.policy_process import PolicyProcess
from far_env.evaluation.results_folder import _open_alone
assert math.isnan(peak_memory_mib(torch.device("cpu")))
_open_alone(Path("records.jsonl")).close()  # without a lock, where the system has none
import os
from far_env.errors import PolicyError
del os.killpg
try:
    PolicyProcess(Path("policy.py"))
except PolicyError as error:
    print(error)
"""


def test_modules_of_unix_alone_are_missed_when_they_are_used_not_at_import(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    (processes,) = done.stdout.splitlines()
    assert processes.startswith("policy files need a POSIX system") and (tmp_path / "records.jsonl").exists()
