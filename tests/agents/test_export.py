"""The exported file: alone, inside the benchmark's module, and equal to the scorer it came from."""

from __future__ import annotations

import ast
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from far_env import contract
from far_env.agents.export import export_policy
from far_env.agents.network import RetentionNetwork
from far_env.agents.policies import AgentPolicy
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


def random_call(rng: np.random.Generator):
    n = int(rng.integers(1, 38))
    features = rng.random((n, 4)) * (1, 1, 1, 3)
    features[0] = (0, 0, 1, 0)
    total = int(rng.choice([11, 36]))
    step, max_frames = int(rng.integers(total)), int(rng.choice([1, 2, 4, 8]))
    metas = frame_meta_list(torch.from_numpy(features).float(), step, 0.0078125)
    capacity = max_frames * 0.0078125
    return metas, RolloutState(step, capacity, total), {"max_frames": max_frames, "capacity_mb": capacity}


def test_exported_and_trained_policy_keep_the_same_frames_on_thousands_of_observations(scorer, exported):
    trained, file = AgentPolicy(scorer), load_policy(str(exported))
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


def test_exported_and_trained_policy_make_the_same_rollouts(scorer, exported, tiny_workload):
    clips = [tiny_workload.clips.clip("test", i) for i in range(4)]
    for budget in (2, 4, 8):
        results = [
            play(tiny_workload, clips, [1, 2, 3, 4], policy, budget)
            for policy in (AgentPolicy(scorer), load_policy(str(exported)))
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
