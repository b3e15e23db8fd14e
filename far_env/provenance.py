"""Provenance of results: commit, versions, machine and command, kept beside every result."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from far_env.io import read_json, write_json

FILE = "run.json"


def run_facts(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """The command, the commit, the versions and the machine of this process."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git_commit(),
        "machine": machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
    }


def save_facts(folder: Path, facts: dict[str, object]) -> None:
    """Add a session's facts to the run folder; earlier sessions of the run stay."""
    write_json(folder / FILE, [*load_facts(folder), facts])


def add_to_facts(folder: Path, more: dict[str, object]) -> None:
    """Add what is known only at the end of a session to the facts of the run folder's last session."""
    *before, last = load_facts(folder)
    write_json(folder / FILE, [*before, last | more])


def load_facts(folder: Path) -> list[dict]:
    """Facts of every session that worked on a run, in order. Raises ValueError if the file is damaged."""
    path = folder / FILE
    if not path.exists():
        return []
    sessions = read_json(path, "choose another run folder")
    if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
        raise ValueError(f"{path} is damaged (it holds no list of sessions); choose another run folder")
    return sessions


def session_precision(folder: Path, precision: str) -> str:
    """The precision for another session of a run: "auto", which is measured, stays what the first session measured."""
    sessions = load_facts(folder) if precision == "auto" else []
    return sessions[0]["dtype"] if sessions else precision


def versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on."""
    names = ("far-env", "torch", "diffusers", "gymnasium", "stable-baselines3", "numpy", "scikit-image", "av")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def machine(device: torch.device) -> str:
    """The GPU's name, or the number of CPU cores and their model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    # Older versions of torch do not name the CPU.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{os.cpu_count()} CPU cores ({capabilities.get('cpu_name', platform.machine())})"


def git_commit() -> str:
    """Short commit of this source tree, or "unknown" where it is not part of a checkout.

    It is marked if a tracked file was changed. Markdown does not count, because results that are written into the checkout do
    not change how the next ones are made.
    """
    try:
        # Installed into an environment inside another project's checkout, git would describe that project.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("describe", "--always", "--abbrev=10", "--exclude=*")
        return f"{commit}-dirty" if _changed_files() else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def require_commit() -> str:
    """`git_commit`, of which results can be made again.

    Raises:
        ValueError: if the source tree is not part of a checkout, or has changes that are not committed.
    """
    commit = git_commit()
    if commit == "unknown":
        raise ValueError(
            "far-env runs without its git repository (it was installed from a wheel, or git is missing), so results cannot "
            "name a commit; clone the repository and install it with pip install -e ., or measure single tables by name"
        )
    if commit.endswith("-dirty"):
        files = _changed_files()
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        raise ValueError(
            f"the source tree has changes that are not committed ({', '.join(files[:3])}{more}); commit them first"
        )
    return commit


def _changed_files() -> list[str]:
    """Tracked files that differ from the commit, Markdown excepted."""
    return _git("diff", "--name-only", "HEAD", "--", ":(top)", ":(top,exclude)*.md").splitlines()


def _git(*arguments: str) -> str:
    """The output of git in this folder. Raises OSError or SubprocessError if it fails."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "encoding": "utf-8", "timeout": 10, "check": True}
    return subprocess.run(["git", *arguments], **options).stdout.strip()
