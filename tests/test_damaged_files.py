"""More than 200 damaged configurations and record files: each is read correctly or refused in a sentence that names it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from far_env.agents.checkpoints import load_scorer, save_scorer
from far_env.agents.config import AgentTraining, NetworkConfig
from far_env.agents.network import RetentionNetwork
from far_env.agents.options import Sweep
from far_env.agents.publish import _results, publish_run
from far_env.agents.results_tables import load_tables
from far_env.config import config_path, load_yaml
from far_env.device import peak_memory_mib
from far_env.evaluation.results_folder import load
from far_env.host.training.config import HostTraining
from far_env.provenance import load_facts
from tests.damage import assert_sentence, damaged
from tests.results_folders import MadeUp, make_results

POLICY = Path(__file__).parents[1] / "agents" / "pretrained" / "general"
SMALL = NetworkConfig(width=16, edge_width=8, num_layers=1, num_heads=2)
CPU = torch.device("cpu")
SECONDS, MEBIBYTES = 10, 300
"""Of one file: more than any takes, less than an expanded alias bomb does."""

HOSTILE = (None, "x", [], {}, [[1]], True, -1, 0, 10**4000, 1e308, math.nan, math.inf, -math.inf, "\x00", "9" * 10_000)


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a good one is made, read, and what the reader's answer must agree with."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    file: str
    plain: Callable[[Any], Any]
    """The answer → what an independent parser finds in the file, in its own types."""


def _copied(source: str, file: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(config_path(source), folder / file)


def _folder_of_results(folder: Path) -> None:
    make_results(folder, MadeUp(workloads={"pan": (3, 6)}, policies={"recent_fill": 0.0}, clips=3, show_clips=0, seeds=(42,)))


def _run(folder: Path) -> None:
    table = {"host": "tiny", "weights": "c0ffee", "policies": {"learned": {"psnr": [20.0, 21.0]}}}
    (folder / "results.json").write_text(json.dumps({"tables": [table]}), encoding="utf-8")
    facts = [{"command": "far-env train", "training_seconds": 12.5, "versions": {"torch": "2"}}]
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")


def _token_records(folder: Path) -> None:
    """The same episodes as those of a memory of tokens."""
    _folder_of_results(folder)
    settings = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    settings |= {"memory": "tokens", "budgets": [64, 9999]}
    (folder / "evaluation.json").write_text(json.dumps(settings), encoding="utf-8")
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    plan = [{"step": step, "kept": [step + 2, step + 3], "demoted": [0], "tokens": 36.5} for step in range(4)]
    smallest = min(record["budget"] for record in records)
    records = [record | {"budget": 64, "plan": plan} for record in records if record["budget"] == smallest]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _tables(folder: Path) -> dict[str, Any]:
    tables, agents = load_tables(folder / "results.yaml")
    # Parts that do not say otherwise begin with the clip of the file; the first one of the first table is such a part.
    first_clip = next(iter(tables.values())).parts[0].first_clip if tables else 0
    return {"tables": {name: asdict(table) for name, table in tables.items()}, "agents": agents, "first_clip": first_clip}


def _records(folder: Path) -> list[dict[str, Any]]:
    return [{**(values := asdict(record)), **values.pop("facts")} for record in load(folder).records]


def _config(cls: type, file: str) -> Callable[[Path], Any]:
    return lambda folder: asdict(load_yaml(cls, folder / file))


KINDS = (
    Kind("training", _copied("pan_tight", "a.yaml"), _config(AgentTraining, "a.yaml"), "a.yaml", yaml.safe_load),
    Kind("host", _copied("host_embedded", "h.yaml"), _config(HostTraining, "h.yaml"), "h.yaml", yaml.safe_load),
    Kind("sweep", _copied("sweep", "s.yaml"), _config(Sweep, "s.yaml"), "s.yaml", yaml.safe_load),
    Kind("tables", _copied("results", "results.yaml"), _tables, "results.yaml", yaml.safe_load),
    Kind("settings", _folder_of_results, lambda folder: asdict(load(folder).settings), "evaluation.json", json.loads),
    Kind("records", _folder_of_results, _records, "records.jsonl", lambda text: list(map(json.loads, text.split("\n")[:-1]))),
    Kind("tokens", _token_records, _records, "records.jsonl", lambda text: list(map(json.loads, text.split("\n")[:-1]))),
    Kind("facts", _run, load_facts, "run.json", json.loads),
    Kind("results", _run, lambda folder: _results(folder, {"host": "tiny (c0ffee)"}), "results.json", json.loads),
    Kind(
        "policy",
        lambda f: save_scorer(RetentionNetwork(SMALL), SMALL, {"trained_on": "pan, budget 4", "host": "tiny"}, f),
        lambda f: load_scorer(f)[1],
        "policy.json",
        json.loads,
    ),
)


def _changed(values: Any, rng: np.random.Generator) -> Any:
    """The values with one of them, anywhere, replaced, removed, added or of another length."""
    containers, pending = [], [values]
    while pending:
        if isinstance(value := pending.pop(), dict | list) and value:
            containers.append(value)
            pending += value.values() if isinstance(value, dict) else value
    inside = containers[rng.integers(len(containers))]
    place = list(inside)[rng.integers(len(inside))] if isinstance(inside, dict) else int(rng.integers(len(inside)))
    action = rng.integers(5)
    if action == 0:
        del inside[place]
    elif action == 1 and isinstance(inside, dict):
        inside[f"{place}s"] = inside[place]
    elif action == 1:
        inside.append(inside[place])
    else:
        inside[place] = HOSTILE[rng.integers(len(HOSTILE))]
    return values


def _with_changes(content: str, file: str, rng: np.random.Generator) -> str:
    if file.endswith(".yaml"):
        return yaml.safe_dump(_changed(yaml.safe_load(content), rng))
    lines = content.splitlines() if file.endswith(".jsonl") else [content]
    at = rng.integers(len(lines))
    lines[at] = json.dumps(_changed(json.loads(lines[at]), rng))
    return "\n".join(lines) + "\n"


def _bomb(levels: int) -> str:
    first = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    return first + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, levels))


def _hostile(content: str, executed: Path) -> list[bytes]:
    """What is damaged in the same way in every file."""
    return [
        b"",
        b"\n\n",
        b"null",
        content.encode("utf-16"),
        b"\xef\xbb\xbf" + content.encode(),
        b"\xe9\xff" + content.encode(),
        b"\x00" * 1000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'[{"a": 1}]' * 2,
        _bomb(9).encode(),
        b"a: &a [*a]\n",
        f"a: !!python/object/apply:os.mkdir ['{executed}']\n".encode(),
        content.encode() + f"\n? !!python/object/apply:os.mkdir ['{executed}']\n: 1\n".encode(),
        content.encode() + content.encode(),
        content.encode()[:-7],
        b"1" * 5000,
        b"2026-99-99\n",
    ]


def _agree(found: Any, expected: Any) -> bool:
    """Whether the reader's answer holds what the file says; defaults may come on top."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and _agree(found[key], value) for key, value in expected.items())
    if isinstance(expected, str) and isinstance(found, dict):  # the short form of a source
        return found["clips"] == expected.rpartition("=")[0 if "=" in expected else 2]
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(_agree, found, expected))
    if isinstance(found, float):
        return math.isclose(found, float(expected)) or (math.isnan(found) and math.isnan(float(expected)))
    return found == expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_damaged_file_is_read_correctly_or_refused_in_one_sentence(tmp_path, kind):
    kind.make(tmp_path)
    path, executed = tmp_path / kind.file, tmp_path / "executed"
    good = path.read_bytes()
    kind.read(tmp_path)
    rng = np.random.default_rng(KINDS.index(kind))
    contents = _hostile(good.decode(), executed)
    contents += [damaged(good, rng) for _ in range(4)]
    contents += [_with_changes(good.decode(), kind.file, rng).encode() for _ in range(4)]
    refused = 0
    for content in contents:
        path.write_bytes(content)
        begun, memory = time.monotonic(), peak_memory_mib(CPU)
        try:
            found = kind.read(tmp_path)
        except ValueError as error:
            # Settings that are valid by themselves may contradict the records, whose line is named then.
            assert kind.file in str(error)
            assert_sentence(error, path if kind.name != "settings" or str(path) in str(error) else tmp_path / "records.jsonl")
            refused += 1
        else:
            text = content.decode("utf-8-sig")
            if kind.name != "results" and text.strip():
                expected = kind.plain(text)
                if kind.name == "settings":
                    del expected["format"]
                assert _agree(found, {} if expected is None else expected), text[:500]
        assert time.monotonic() - begun < SECONDS and peak_memory_mib(CPU) - memory < MEBIBYTES
        assert not executed.exists()
    assert refused >= 8
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError) as directory:
        kind.read(tmp_path)
    assert_sentence(directory.value, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"is not valid YAML, line 2: the key 'seed' appears twice"),
        ("ppo: {learning_rate: .nan}\n", r"ppo: learning_rate: expected float, got nan, which is not finite"),
        ("table: [1]\n", r"table: expected str, got 1"),
        ("train_clips: -1\n", r"c\.yaml: .*train_clips must be above 0, got -1"),
        ("network: {width: 1000000}\n", r"c\.yaml: network: .*too large a network"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_yaml(AgentTraining, tmp_path / "c.yaml")


@pytest.mark.parametrize("name", ["results.json", "run.json"])
def test_a_damaged_run_is_not_published(tmp_path, name):
    run = shutil.copytree(POLICY, tmp_path / "run")
    _run(run)
    content = (run / name).read_bytes()
    for text in (b"", b"\xff", b"null", b"[" * 100_000, content[: len(content) // 2], b"[{}]", b'{"tables": 3}'):
        (run / name).write_bytes(text)
        with pytest.raises(ValueError) as error:
            publish_run(run, "x", tmp_path / "published")
        assert_sentence(error.value, run)
        assert not (tmp_path / "published").exists()
