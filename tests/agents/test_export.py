"""The exported file: alone, inside the benchmark's module, and equal to the scorer it came from."""

from __future__ import annotations

import ast
import copy
import inspect
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from far_env import contract
from far_env.agents import checkpoints
from far_env.agents.export import export_policy, export_run, narrowed
from far_env.agents.memory import HistoryMemory
from far_env.agents.network import RetentionNetwork
from far_env.agents.policies import AgentPolicy
from far_env.baselines.tracking import PathTracking, ShotTracking
from far_env.births import FrameBirths
from far_env.contract import RolloutState, apply_plan
from far_env.frame_meta import frame_meta_list
from far_env.policies import load_policy
from far_env.rollout.play import play

SIZES = {
    "memoryless": {},
    "memory": {"memory": True},
    "rows alone": {"attention": False},
    "linear": {"num_layers": 0},
    "surroundings": {"memory": True, "surroundings": True},
    "places": {"memory": True, "surroundings": True, "places": True},
    "path": {"memory": True, "surroundings": True, "path": True},
    "sequential eviction": {"memory": True, "surroundings": True, "places": True, "path": True, "sequential_eviction": True},
    "sequential eviction, memoryless": {"sequential_eviction": True},
    "surroundings, rows alone": {"memory": True, "surroundings": True, "attention": False},
}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def scorer(request):
    torch.manual_seed(0)
    network = RetentionNetwork(**request.param)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return network.eval()


@pytest.fixture(scope="module")
def exported(scorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "policy.py"
    export_policy(scorer, path, "made for a test")
    return path


@pytest.fixture(scope="module")
def as_stored(scorer, exported):
    """The scorer with the weights that the file holds."""
    stored = copy.deepcopy(scorer)
    if '"<f2"' in exported.read_text():
        stored.load_state_dict({name: value.half().float() for name, value in scorer.state_dict().items()})
    return stored


def random_call(rng: np.random.Generator):
    n = int(rng.integers(1, 38))
    features = rng.random((n, 4)) * (1, 1, 1, 3)
    features[0] = (0, 0, 1, 0)
    total = int(rng.choice([11, 36]))
    step, max_frames = int(rng.integers(total)), int(rng.choice([1, 2, 4, 8]))
    metas = frame_meta_list(torch.from_numpy(features).float(), step, 0.0078125)
    capacity = max_frames * 0.0078125
    return metas, RolloutState(step, capacity, total), {"max_frames": max_frames, "capacity_mb": capacity}


def test_exported_and_trained_policy_keep_the_same_frames_on_thousands_of_observations(scorer, as_stored, exported):
    trained, file = AgentPolicy(as_stored), load_policy(str(exported))
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(300 if scorer.sequential_eviction else 2_000):  # one of the former is dozens of passes
        metas, state, budget = random_call(rng)
        plans = [policy.build_temporal_cache_plan(metas, state, budget) for policy in (trained, file)]
        kept = [sorted(d.chunk_id for d in plan.chunk_decisions if d.action == "keep") for plan in plans]
        assert kept[0] == kept[1]
        assert kept[0] == apply_plan(plans[0], len(metas), budget["max_frames"]), "the harness has nothing to repair"
        sizes.append((len(kept[0]), len(metas)))
    assert len(set(sizes)) > 30


def test_exported_and_trained_policy_make_the_same_rollouts(as_stored, exported, tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(4)]
    for budget in (2, 4, 8):
        results = [
            play(tiny_workload, clips, [1, 2, 3, 4], policy, budget)
            for policy in (AgentPolicy(as_stored), load_policy(str(exported)))
        ]
        assert results[0][1] == results[1][1]
        assert torch.equal(results[0][0].generated(range(4)), results[1][0].generated(range(4)))


def test_the_file_needs_only_numpy(exported):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules.update(dict.fromkeys(('torch', 'far_env', 'agents')))\n"
        "import policy, types\n"
        "meta = types.SimpleNamespace(chunk_id=0, age=0, recentness=1.0, boundary_score=0.0, feature_drift=0.0,"
        " temporal_similarity=1.0, motion_strength=0.0)\n"
        "state = types.SimpleNamespace(step=1, total_steps=11)\n"
        "plan = policy.VideoTemporalKVPolicy().build_temporal_cache_plan([meta], state, {'max_frames': 4})\n"
        "assert [(d.chunk_id, d.action) for d in plan.chunk_decisions] == [(0, 'keep')]\n"
        "assert 'pickle' not in open(policy.__file__).read()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(exported.parent)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    imported = {
        name.name for node in ast.walk(ast.parse(exported.read_text())) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported == {"base64", "numpy"}


def test_no_line_is_too_long_and_the_copied_code_is_the_original(exported, scorer):
    text = exported.read_text()
    assert max(map(len, text.splitlines())) < 100
    (exported_class,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    copied = {node.name: node for node in exported_class.body if isinstance(node, ast.ClassDef)}
    originals = (FrameBirths, ShotTracking, PathTracking, HistoryMemory)
    assert set(copied) == ({original.__name__ for original in originals} if scorer.spec.memory else set())
    for original in originals:
        if original.__name__ in copied:
            (tree,) = ast.parse(inspect.getsource(original)).body
            assert without_docstrings(copied[original.__name__]) == without_docstrings(tree)


class _WithoutStrings(ast.NodeTransformer):
    """Removes docstrings, those of attributes as well, whose lines the export breaks."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def without_docstrings(tree: ast.AST) -> str:
    return ast.dump(_WithoutStrings().visit(tree))


LONG = (
    "def f(values):\n"
    "    # " + "word " * 30 + "\n"
    "    return [first + second for first, second in zip(values, values, strict=True) if first > second or first < 2 * "
    'second or (first == second and f"{first} is {second} and so on") or first > 5]\n'
)


def test_long_lines_are_broken_between_tokens_in_brackets_alone():
    text = narrowed(LONG)
    assert max(map(len, text.splitlines())) < 100 and len(text.splitlines()) > 4
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(LONG))


def test_weights_are_halved_where_plans_stay_the_same_and_else_kept(tmp_path):
    torch.manual_seed(0)
    network = RetentionNetwork().eval()
    network.head.bias.data += 1  # so that all frames are kept, whatever the rounding does
    large = copy.deepcopy(network)
    large.head.weight.data = 1e6 * torch.randn_like(large.head.weight)  # which half precision cannot hold
    stored = {}
    for name, scorer in (("small", network), ("large", large)):
        export_policy(scorer, tmp_path / f"{name}.py", "made for a test")
        text = (tmp_path / f"{name}.py").read_text()
        stored[name] = len(text), '"<f2"' in text
    assert (stored["small"][1], stored["large"][1]) == (True, False)
    num_weights = sum(value.numel() for value in network.state_dict().values())
    assert stored["large"][0] - stored["small"][0] > 2.5 * num_weights, "two bytes in five characters for every four"


def test_the_shipped_policies_are_exported_in_half_precision_with_the_same_plans(tmp_path):
    for name in ("pan-tight", "orbit"):
        export_run(Path(checkpoints.__file__).parent / "pretrained" / name, tmp_path / f"{name}.py")
        assert '"<f2"' in (tmp_path / f"{name}.py").read_text() and (tmp_path / f"{name}.py").stat().st_size < 250_000
        trained, file = load_policy(f"pretrained/{name}"), load_policy(str(tmp_path / f"{name}.py"))
        rng = np.random.default_rng(2)
        for _ in range(100):
            metas, state, budget = random_call(rng)
            plans = [policy.build_temporal_cache_plan(metas, state, budget) for policy in (trained, file)]
            kept = [apply_plan(plan, len(metas), budget["max_frames"]) for plan in plans]
            assert kept[0] == kept[1]


def test_the_class_alone_can_be_pasted_into_a_module_that_has_the_benchmarks_names(exported, scorer):
    tree = ast.parse(exported.read_text())
    (pasted,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    module = types.ModuleType("benchmark")
    module.ChunkDecision, module.TemporalCachePlan = contract.ChunkDecision, contract.TemporalCachePlan
    exec(ast.unparse(pasted), vars(module))
    metas, state, budget = random_call(np.random.default_rng(1))
    plan = module.VideoTemporalKVPolicy().build_temporal_cache_plan(metas, state, budget)
    assert type(plan) is contract.TemporalCachePlan and type(plan.chunk_decisions[0]) is contract.ChunkDecision
    # the whole file, executed after the benchmark's definitions, uses those as well
    exec(exported.read_text(), vars(module))
    assert module.ChunkDecision is contract.ChunkDecision
