"""A Python file with a policy class → the policy. torch is imported only if the file uses it.

The benchmark's policies are written inside one of its modules, so the names of that module are defined in the file too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from far_env.contract import ChunkDecision, FrameMeta, RetentionPolicy, RolloutState, TemporalCachePlan

BENCHMARK_CLASS = "VideoTemporalKVPolicy"
HARNESS_FUNCTIONS = {"generate_with_policy", "run_evaluation"}
"""Functions of the benchmark's program, by which it is told from a file with a policy."""
_CONTRACT = {cls.__name__: cls for cls in (ChunkDecision, FrameMeta, RolloutState, TemporalCachePlan)}
_MODULES = {
    **{name: name for name in ("argparse", "json", "math", "os", "sys", "time", "torch")},
    "np": "numpy",
    "F": "torch.nn.functional",
}
_MEMBERS = {
    "deepcopy": "copy",
    "dataclass": "dataclasses",
    "field": "dataclasses",
    "Path": "pathlib",
    "List": "typing",
    "Optional": "typing",
}


class _WholeProgram(Exception):
    """The file is the benchmark's program, not a policy."""


def policy_from_file(path: Path) -> RetentionPolicy:
    """Run the file and make an instance of its class VideoTemporalKVPolicy, or of its one class that can plan.

    Raises:
        ValueError: if the file cannot be read or run, or if it is not clear which class is meant.
    """
    spec = importlib.util.spec_from_file_location(f"policy_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses search for their module there
    try:
        tree = ast.parse(path.read_bytes())
        if {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} >= HARNESS_FUNCTIONS:
            raise _WholeProgram
        vars(module).update(_benchmark_names(tree))
        spec.loader.exec_module(module)
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == spec.name and hasattr(value, "build_temporal_cache_plan")
        ]
        if len(classes) > 1:
            classes = [cls for cls in classes if cls.__name__ == BENCHMARK_CLASS] or classes
        if len(classes) == 1:
            return classes[0]()
    except _WholeProgram:
        raise ValueError(
            f"{path} is the benchmark's whole program; give a file that holds its class {BENCHMARK_CLASS} alone"
        ) from None
    except Exception as error:
        raise ValueError(f"the policy file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    raise ValueError(f"{path} must define exactly one class with build_temporal_cache_plan; it has {len(classes)}")


def _benchmark_names(tree: ast.AST) -> dict[str, object]:
    """The names that the benchmark's module defines, as far as the file uses them."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    modules = {name: importlib.import_module(_MODULES[name]) for name in used & _MODULES.keys()}
    members = {name: getattr(importlib.import_module(_MEMBERS[name]), name) for name in used & _MEMBERS.keys()}
    return _CONTRACT | modules | members
