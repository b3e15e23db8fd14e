"""Imports run downwards only: every module may import its package and those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    {"errors", "allocator"},
    {"contract", "births", "io", "plugins", "text"},
    {
        "config",
        "progress",
        "policy_file",
        "policy_worker",
        "policy_supervisor",
        "policy_process",
        "policies",
        "device",
        "tensor_files",
        "provenance",
        "events",
        "hub",
        "hub_errors",
    },
    {"frame_meta", "latent_cells", "metrics", "perceptual", "clips"},
    {"host"},
    {"workload", "workloads"},
    {"rollout"},
    {"envs", "evaluation"},
    {"distributed"},
    {"cli"},
)
"""Modules and packages of far_env, the lowest first. Those of one set may import each other."""
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
OF_BASELINES = {"far_env.contract", "far_env.errors", "far_env.births", "far_env.baselines"}
BARE = {"agents", "baselines", "configs"}


def imported(source: str) -> set[str]:
    """The modules that a file imports, at its top or inside functions; not what it imports for type checkers alone.

    ``from far_env import x`` counts as far_env.x, ``from far_env.x import y`` as far_env.x.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.update({f"far_env.{alias.name}" for alias in node.names} if node.module == "far_env" else {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return names


def violations(module: str, source: str) -> list[str]:
    """The imports that a module of this name may not have, in words."""
    names = imported(source)
    wrong = [f"{module} imports the bare name {name}" for name in names if name.split(".")[0] in BARE]
    package, *parts = module.split(".")
    if package != "far_env":
        return wrong
    ours = {name for name in names if name.split(".")[0] == "far_env"}
    if parts[:1] == ["agents"]:
        return wrong
    if parts[:1] == ["baselines"]:
        allowed = OF_BASELINES | ({"far_env.config", "far_env.text"} if parts[1:] == ["command"] else set())
        return wrong + [f"{module} imports {name}" for name in ours if ".".join(name.split(".")[:2]) not in allowed]
    level = LEVEL[parts[0]] if parts else LEVEL["plugins"]
    for name in ours:
        part = [*name.split("."), ""][1]
        if part in ("agents", "baselines", "configs"):
            wrong.append(f"{module} imports {name}, which is found through entry points")
        elif part and LEVEL[part] > level:
            wrong.append(f"{module} imports {name}, which is above it")
    return wrong


def modules() -> dict[str, str]:
    """Name → source of every Python file of the repository; agents and baselines by their installed names."""
    sources = {}
    for folder, name in (("far_env", "far_env"), ("agents", "far_env.agents"), ("baselines", "far_env.baselines")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [name, *path.relative_to(ROOT / folder).with_suffix("").parts]
            sources[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    for path in [ROOT / "train_agent.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        sources[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return sources


def test_every_module_has_its_place():
    top = {name.split(".")[1] for name in modules() if name.startswith("far_env.")} - {"agents", "baselines"}
    assert top <= LEVEL.keys(), "add the new module to ORDER"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downwards(module):
    assert violations(module, modules()[module]) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("far_env.rollout.play", "def f():\n    from far_env.evaluation.table import x", "which is above it"),
        ("far_env.evaluation.evaluate", "from far_env import baselines", "found through entry points"),
        ("far_env.cli.evaluate", "import far_env.agents.checkpoints", "found through entry points"),
        ("far_env.baselines.queue", "from far_env.rollout.play import play", "imports far_env.rollout.play"),
        ("far_env.agents.ppo", "import agents.network", "bare name agents.network"),
        ("tests.test_x", "from baselines import names", "bare name baselines"),
        ("far_env.contract", "from far_env.config import parse", "which is above it"),
    ],
)
def test_a_wrong_import_is_found(module, source, found):
    (sentence,) = violations(module, source)
    assert found in sentence


def test_imports_for_type_checkers_do_not_count():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from far_env.cli import main\n"
    assert violations("far_env.contract", source) == []
