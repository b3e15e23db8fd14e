"""Commands answer --help without torch, and so do the lists."""

from __future__ import annotations

import subprocess
import sys

import pytest

from far_env.plugins import COMMANDS, distribution_name, entry_points

CALLS = [["--help"], ["baselines"], ["weights", "list"]]
CALLS += [[name, "--help"] for name, entry in entry_points(COMMANDS).items() if distribution_name(entry) == "far-env"]
CALLS += [["leaderboard", "add", "--help"], ["leaderboard", "check", "--help"]]
SCRIPT = """
import sys
from far_env.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as exit:
    status = exit.code
heavy = {"torch", "stable_baselines3", "diffusers", "matplotlib.pyplot"} & set(sys.modules)
assert not heavy, f"imported {heavy}"
sys.exit(status)
"""


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_help_and_lists_import_no_torch(call):
    result = subprocess.run([sys.executable, "-c", SCRIPT, *call], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout and not result.stderr, result.stderr


def test_importing_the_package_imports_no_torch():
    script = "import sys, far_env; sys.exit(bool({'torch', 'stable_baselines3', 'tyro'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
