"""A trained scorer as one self-contained Python file: NumPy only, weights inside the class, no import of far_env.

Weights are stored in half precision if the plans stay the same, and lines are kept below 100 characters, so that the class can
be pasted.
"""

from __future__ import annotations

import ast
import base64
import copy
import inspect
import io
import textwrap
import tokenize
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import far_env.births
from far_env.agents import observation, runtime
from far_env.agents.checkpoints import load_scorer
from far_env.agents.config import FRAMES
from far_env.agents.network import RetentionNetwork
from far_env.agents.policies import AgentPolicy, scorer_options
from far_env.contract import RolloutState, apply_plan
from far_env.frame_meta import frame_meta_list
from far_env.io import write_text

MAX_COLUMNS = 99
UNUSED = "similarity."
"""Weights that only a training uses."""
CHECKED_EPISODES = 40
"""Made episodes on which the plans of rounded weights must be those of the trained ones."""

_TEMPLATE = '''\
"""A learned frame-retention policy for ar-video-kv-temporal-policy, exported by far-env.

{provenance}

Paste all that follows this text over the class VideoTemporalKVPolicy in the benchmark's custom_video_eval.py,
which does not import policies from other files. Other programs can import this file. It needs Python 3.10 or
newer, and NumPy.
"""

from dataclasses import dataclass, field

import numpy as np

if "ChunkDecision" not in globals():

    @dataclass
    class ChunkDecision:
        chunk_id: int
        action: str
        priority: float = 0.0


if "TemporalCachePlan" not in globals():

    @dataclass
    class TemporalCachePlan:
        chunk_decisions: list = field(default_factory=list)
        retention_family: str = "recency"
        anchor_preservation_rule: str = "none"
        boundary_transition_rule: str = "passthrough"
        queue_depth: int = 0
        long_term_budget_fraction: float = 0.0
        chunkwise_reuse: bool = False
        compression_mode: str = "none"


{modules}

class VideoTemporalKVPolicy:
    """Scores the kept frames with a network over all frames seen so far; the lowest score is dropped, one by one."""

    OPTIONS = {options}
    SHAPES = {shapes}
    STORED_AS = "{stored_as}"
    WEIGHTS = (
{weights}
    )

    def __init__(self):
        import base64

        stored = np.frombuffer(base64.b85decode(self.WEIGHTS), dtype=self.STORED_AS)
        weights, start = {{}}, 0
        for name, shape in self.SHAPES.items():
            size = int(np.prod(shape))
            weights[name] = stored[start : start + size].reshape(shape)
            start += size
        self.scorer = GraphScorer(weights, **self.OPTIONS)

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        features = [
            (m.boundary_score, m.feature_drift, m.temporal_similarity, m.motion_strength)
            for m in chunk_meta_list
        ]
        max_frames = int(budget_state["max_frames"])
        kept = self.scorer.choose(features, rollout_state.step, rollout_state.total_steps, max_frames)
        decisions = [
            ChunkDecision(meta.chunk_id, "keep" if i in kept else "drop", float(i in kept))
            for i, meta in enumerate(chunk_meta_list)
        ]
        return TemporalCachePlan(chunk_decisions=decisions, retention_family="anchor")
'''


def export_policy(network: RetentionNetwork, path: Path, provenance: str) -> None:
    """Write the file, whole or not at all.

    Args:
        network: the trained scorer.
        path: the file to write.
        provenance: lines for the file's docstring: training data and commit.

    Raises:
        ValueError: if the scorer needs inputs that the benchmark does not provide.
    """
    if network.config.signals:
        raise ValueError(
            f"this policy needs {', '.join(network.config.signals)}, which the benchmark does not provide; export one that was "
            "trained without signals"
        )
    rounded = copy.deepcopy(network)
    rounded.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    finite = all(value.isfinite().all() for value in rounded.state_dict().values())
    stored_as = "<f2" if finite and same_plans(network, rounded) else "<f4"
    used = {name: value for name, value in network.state_dict().items() if not name.startswith(UNUSED)}
    state = {name: value.detach().cpu().numpy().astype(stored_as) for name, value in used.items()}
    packed = base64.b85encode(b"".join(array.tobytes() for array in state.values())).decode()
    width = MAX_COLUMNS - len('        ""')
    text = _TEMPLATE.format(
        provenance=provenance.replace("\\", "/").replace('"""', "'''"),
        options=repr(scorer_options(network.config)),
        shapes=textwrap.indent(_shapes(state), "    ").lstrip(),
        stored_as=stored_as,
        modules="\n\n".join(map(_definitions, (far_env.births, observation, runtime))),
        weights="\n".join(f'        "{packed[start : start + width]}"' for start in range(0, len(packed), width)),
    )
    write_text(path, narrowed(text))


def same_plans(network: RetentionNetwork, other: RetentionNetwork) -> bool:
    """Whether two scorers keep the same frames in `CHECKED_EPISODES` made episodes with random features, at budgets 1 to 8."""
    rng = np.random.default_rng(0)
    for number in range(CHECKED_EPISODES):
        max_frames = (1, 2, 4, 8)[number % 4]
        num_context, total = (36, 36) if number % 5 == 4 else (5, 11)
        policies = [AgentPolicy(scorer) for scorer in (network, other)]
        features = rng.random((num_context, 4)) * (1, 1, 1, 3)
        for step in range(total):
            features = np.concatenate([features, rng.random((1, 4)) * (1, 1, 1, 3)])
            if len(features) <= max_frames:
                continue
            features[0] = (0, 0, 1, 0)
            metas = frame_meta_list(torch.from_numpy(features).float(), step, 1.0)
            state = RolloutState(step, max_frames, total)
            budget = {"max_frames": max_frames, "capacity_mb": float(max_frames)}
            plans = [policy.build_temporal_cache_plan(metas, state, budget) for policy in policies]
            kept, others = (apply_plan(plan, len(metas), max_frames) for plan in plans)
            if kept != others:
                return False
            features = features[kept]
    return True


def narrowed(source: str) -> str:
    """The same program in lines of at most `MAX_COLUMNS`, as far as there are places to break them.

    Code is broken at spaces between two tokens in brackets, comments and docstrings at spaces.
    """
    places, prose = _breaks(source)
    lines: list[str] = []
    for number, line in enumerate(source.splitlines(), start=1):
        indent = line[: len(line) - len(line.lstrip())]
        if number in prose:
            mark = "# " if line.lstrip().startswith("#") else ""
            lines += textwrap.wrap(line, MAX_COLUMNS, subsequent_indent=indent + mark, break_on_hyphens=False) or [line]
            continue
        start = 0
        while len(line) > MAX_COLUMNS:
            fitting = [place - start for place in places.get(number, ()) if len(indent) + 8 < place - start <= MAX_COLUMNS]
            if not fitting:
                break
            lines.append(line[: fitting[-1]].rstrip())
            start += fitting[-1] - len(indent) - 8
            line = indent + " " * 8 + line[fitting[-1] :]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _breaks(source: str) -> tuple[dict[int, list[int]], set[int]]:
    """Columns before which code may be broken, by line number, and the lines of comments and triple-quoted strings."""
    places: dict[int, list[int]] = {}
    prose: set[int] = set()
    depth = in_fstring = 0
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name, (row, column) = tokenize.tok_name[token.type], token.start
        if name == "STRING" and token.string.startswith('"""'):
            prose.update(range(row, token.end[0] + 1))
        elif name == "COMMENT" and not lines[row - 1][:column].strip():
            prose.add(row)
        elif depth and not in_fstring and name in ("NAME", "NUMBER", "STRING", "OP") and lines[row - 1][column - 1] == " ":
            places.setdefault(row, []).append(column)
        in_fstring += (name == "FSTRING_START") - (name == "FSTRING_END")
        if name == "OP":
            depth += (token.string in "([{") - (token.string in ")]}")
    return places, prose


def export_run(run: Path, path: Path, source: str | None = None) -> None:
    """Export the scorer of a run folder; the file's docstring says how it was trained, and its source where one is given.

    Raises:
        ValueError: if the folder contains none, if it cannot be exported, or if the file cannot be written.
    """
    network, about = load_scorer(run, FRAMES)
    provenance = [f"{key}: {value}" for key, value in about.items() if key != "network"]
    provenance += [f"source: {source}"] * (source is not None)
    export_policy(network, path, "\n".join(provenance))


def _definitions(module: ModuleType) -> str:
    """The source of a module's classes, functions and constants."""
    source = inspect.getsource(module)
    kept = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign)]
    return "\n\n".join(ast.get_source_segment(source, node) + "\n" for node in kept)


def _shapes(state: dict[str, np.ndarray]) -> str:
    lines = [f'    "{name}": {tuple(array.shape)},' for name, array in state.items()]
    return "\n".join(["{", *lines, "}"])
