"""The exported file: alone, inside the benchmark's module, and equal to the scorer it came from."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from far_env import contract
from far_env.agents import checkpoints, export
from far_env.agents.config import NetworkConfig
from far_env.agents.export import export_policy, export_run, narrowed, same_plans
from far_env.agents.observation import FrameGraph, graph_inputs
from far_env.agents.policies import AgentPolicy
from far_env.agents.runtime import GraphScorer
from far_env.births import FrameBirths
from far_env.contract import RolloutState, apply_plan
from far_env.frame_meta import frame_meta_list
from far_env.policies import load_policy
from far_env.rollout.play import play
from tests.agents.made_rollouts import made_clip
from tests.agents.test_network import random_network

SMALL = NetworkConfig(width=16, edge_width=8, num_layers=2, num_heads=2)
SIZES = {
    "whole": {},
    "one layer": {"num_layers": 1, "num_heads": 8},
    "without edges": {"edges": False},
    "without products": {"edge_updates": False},
    "without dropped frames": {"dropped_frames": False},
    "unscaled": {"scaled": False},
}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def scorer(request):
    return random_network(dataclasses.replace(SMALL, **request.param))


@pytest.fixture(scope="module")
def exported(scorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "policy.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "CHECKED_EPISODES", 4)  # which is faster; tests compare with the weights as they are stored
        export_policy(scorer, path, "made for a test")
    return path


@pytest.fixture(scope="module")
def as_stored(scorer, exported):
    """The scorer with the weights that the file holds."""
    stored = copy.deepcopy(scorer)
    if '"<f2"' in exported.read_text():
        stored.load_state_dict({name: value.half().float() for name, value in scorer.state_dict().items()})
    return stored


def random_call(rng: np.random.Generator, most: int = 38):
    n = int(rng.integers(1, most))
    features = rng.random((n, 4)) * (1, 1, 1, 3)
    features[0] = (0, 0, 1, 0)
    total = int(rng.choice([11, 36]))
    step, max_frames = int(rng.integers(total)), int(rng.choice([1, 2, 4, 8]))
    metas = frame_meta_list(torch.from_numpy(features).float(), step, 0.0078125)
    capacity = max_frames * 0.0078125
    return metas, RolloutState(step, capacity, total), {"max_frames": max_frames, "capacity_mb": capacity}


def kept_by(policy, metas, state, budget) -> list[int]:
    """The frames that a policy keeps, of which the harness has none to drop."""
    plan = policy.build_temporal_cache_plan(metas, state, budget)
    kept = sorted(decision.chunk_id for decision in plan.chunk_decisions if decision.action == "keep")
    assert kept == apply_plan(plan, len(metas), budget["max_frames"])
    return kept


def test_exported_and_trained_policy_keep_the_same_frames_on_random_calls(scorer, as_stored, exported):
    """Calls of any size and step in any order: most begin a clip, others seem to go on with it."""
    trained, file = AgentPolicy(as_stored), load_policy(str(exported))
    rng, sizes = np.random.default_rng(0), []
    for _ in range(2_000 if scorer.config == SMALL else 200):
        metas, state, budget = random_call(rng, 10)
        kept = kept_by(file, metas, state, budget)
        assert kept == kept_by(trained, metas, state, budget)
        sizes.append((len(kept), len(metas)))
    assert len(set(sizes)) > 15


def test_exported_and_trained_policy_keep_the_same_frames_of_made_clips(as_stored, exported):
    """Clips by themselves and one after the other, also with frames that were generated without a call between."""
    file, different = load_policy(str(exported)), 0
    for seed, (context, predict, budget) in enumerate([(5, 11, 4), (5, 11, 2), (36, 8, 8), (5, 30, 6), (50, 30, 8)]):
        trained, clip = AgentPolicy(as_stored), made_clip(seed, context, predict)
        for call in clip.calls(budget, seed):
            metas = frame_meta_list(torch.from_numpy(call.features), call.step, 0.01)
            arguments = metas, RolloutState(call.step, budget * 0.01, predict), {"max_frames": budget, "capacity_mb": 0.08}
            call.kept = kept_by(file, *arguments)
            assert call.kept == kept_by(trained, *arguments)
            different += call.kept != list(range(len(metas)))[-budget:]
    assert different > 20, "not just the newest"


def test_exported_and_trained_policy_make_the_same_rollouts(as_stored, exported, tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(2)]
    for budget in (2, 8):
        results = [
            play(tiny_workload, clips, [1, 2], policy, budget)
            for policy in (AgentPolicy(as_stored), load_policy(str(exported)))
        ]
        assert results[0][1] == results[1][1]
        assert torch.equal(results[0][0].generated(range(2)), results[1][0].generated(range(2)))


def test_the_file_needs_only_numpy(exported):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules.update(dict.fromkeys(('torch', 'far_env', 'agents')))\n"
        "import policy, types\n"
        "meta = types.SimpleNamespace(chunk_id=0, age=0, recentness=1.0, boundary_score=0.0, feature_drift=0.0,"
        " temporal_similarity=1.0, motion_strength=0.0)\n"
        "state = types.SimpleNamespace(step=1, total_steps=11)\n"
        "chosen = policy.VideoTemporalKVPolicy()\n"
        "for count in (1, 6):\n"
        "    metas = [types.SimpleNamespace(**{**vars(meta), 'chunk_id': i}) for i in range(count)]\n"
        "    plan = chosen.build_temporal_cache_plan(metas, state, {'max_frames': 4})\n"
        "    assert sum(d.action == 'keep' for d in plan.chunk_decisions) == min(count, 4)\n"
        "assert 'pickle' not in open(policy.__file__).read()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(exported.parent)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    imported = {
        name.name for node in ast.walk(ast.parse(exported.read_text())) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported == {"base64", "numpy"}
    tree = ast.parse(exported.read_text(), feature_version=(3, 10))
    assert {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} <= {"copy", "dataclasses"}


def test_no_line_is_too_long_and_the_copied_code_is_the_original(exported):
    text = exported.read_text()
    assert max(map(len, text.splitlines())) < 100
    copied = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    originals = {original.__name__: original for original in (FrameBirths, FrameGraph, GraphScorer, graph_inputs)}
    assert set(originals) <= set(copied)
    for name, original in originals.items():
        (tree,) = ast.parse(inspect.getsource(original)).body
        assert without_docstrings(copied[name]) == without_docstrings(tree)


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


def test_weights_are_halved_where_plans_stay_the_same_and_else_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CHECKED_EPISODES", 8)
    network = random_network(SMALL)
    network.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    large = copy.deepcopy(network)
    large.head.weight.data = 1e6 * large.head.weight.data  # which half precision cannot hold
    stored = {}
    for name, scorer in (("small", network), ("large", large)):
        export_policy(scorer, tmp_path / f"{name}.py", "made for a test")
        text = (tmp_path / f"{name}.py").read_text()
        stored[name] = len(text), '"<f2"' in text
        assert same_plans(scorer, scorer)
    assert (stored["small"][1], stored["large"][1]) == (True, False)
    num_weights = sum(value.numel() for name, value in network.state_dict().items() if not name.startswith("similarity."))
    assert stored["large"][0] - stored["small"][0] > 2.5 * num_weights, "two bytes in five characters for every four"
    assert not same_plans(network, random_network(SMALL, seed=1))


def test_what_only_training_uses_is_left_out_and_signals_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CHECKED_EPISODES", 1)
    network = random_network(SMALL)
    export_policy(network, tmp_path / "policy.py", 'a \\ b """ c')
    text = (tmp_path / "policy.py").read_text()
    assert "similarity.weight" not in text and "decide.qkv.weight" in text
    assert "a / b ''' c" in ast.get_docstring(ast.parse(text))
    with pytest.raises(ValueError, match="needs lat_cos, which the benchmark does not provide"):
        export_policy(random_network(dataclasses.replace(SMALL, signals=("lat_cos",))), tmp_path / "other.py", "")
    assert not (tmp_path / "other.py").exists()


def test_the_shipped_policy_is_exported_with_the_same_plans(tmp_path):
    folder = Path(checkpoints.__file__).parent / "pretrained" / "general"
    export_run(folder, tmp_path / "general.py")
    assert (tmp_path / "general.py").stat().st_size < 700_000
    trained, file = load_policy("pretrained/general"), load_policy(str(tmp_path / "general.py"))
    rng = np.random.default_rng(2)
    for _ in range(100):
        arguments = random_call(rng)
        assert kept_by(trained, *arguments) == kept_by(file, *arguments)


def test_what_follows_the_docstring_can_be_pasted_into_a_module_that_has_the_benchmarks_names(exported, as_stored):
    """Also where the module has other things under the names that a file's helpers could have."""
    text = exported.read_text()
    pasted = text.split('"""', 2)[2]
    module = types.ModuleType("benchmark")
    module.ChunkDecision, module.TemporalCachePlan = contract.ChunkDecision, contract.TemporalCachePlan
    module.torch, module.field, module.copy, module.base64, module.weights = torch, None, "copy", None, 7
    exec(pasted, vars(module))
    assert module.ChunkDecision is contract.ChunkDecision and module.copy == "copy" and module.weights == 7
    rng, policy, trained = np.random.default_rng(1), module.VideoTemporalKVPolicy(), AgentPolicy(as_stored)
    for _ in range(20):
        arguments = random_call(rng)
        plan = policy.build_temporal_cache_plan(*arguments)
        assert type(plan) is contract.TemporalCachePlan and type(plan.chunk_decisions[0]) is contract.ChunkDecision
        assert kept_by(trained, *arguments) == sorted(d.chunk_id for d in plan.chunk_decisions if d.action == "keep")
