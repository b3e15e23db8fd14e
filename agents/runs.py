"""Run folders and the names of policies: a trained scorer on disk, and one way to turn any name into a policy."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from pathlib import Path

from safetensors.torch import save_file

import baselines
from agents.adapters import AgentPolicy
from agents.network import RetentionNetwork
from far_env.config import write_text
from far_env.contract import RetentionPolicy
from far_env.evaluation.evaluate import FULL_HISTORY
from far_env.host.weights import load_weights
from far_env.policy_file import policy_from_file

WEIGHTS_FILE = "policy.safetensors"
CONFIG_FILE = "policy.json"


def save_scorer(network: RetentionNetwork, size: dict[str, int], facts: dict[str, object], folder: Path) -> None:
    """Write a scorer: policy.safetensors, and policy.json with its size and where it came from."""
    temporary = folder / (WEIGHTS_FILE + ".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, temporary)
    temporary.replace(folder / WEIGHTS_FILE)
    write_text(folder / CONFIG_FILE, json.dumps({"network": size, **facts}, indent=2) + "\n")


def load_scorer(folder: Path) -> tuple[RetentionNetwork, dict[str, object]]:
    """The scorer of a run folder and its policy.json. Raises ValueError if a file is missing, damaged or does not fit."""
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text())
        network = RetentionNetwork(**facts["network"])
    except OSError as error:
        raise ValueError(
            f"{folder} holds no trained policy ({CONFIG_FILE} is missing); train one with train_agent.py"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged ({error}); train the policy again") from error
    return load_weights(network, folder / WEIGHTS_FILE), facts


def load_policy(name: str) -> RetentionPolicy | None:
    """A policy by name: a baseline, a Python file, a run folder, or full_history (None: nothing is dropped).

    Raises:
        ValueError: if the name is none of these, or the file or folder cannot be used.
    """
    if name == FULL_HISTORY:
        return None
    if name in baselines.names():
        return baselines.make(name)
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        policy = policy_from_file(path)
        with contextlib.suppress(AttributeError):
            policy.name = name  # errors name the file, not the class that all exported files share
        return policy
    if path.is_dir():
        return AgentPolicy(load_scorer(path)[0], name)
    known = ", ".join([*baselines.names(), FULL_HISTORY])
    raise ValueError(f"no policy {name!r}: it is neither a baseline ({known}) nor an existing .py file or run folder")


def policy_facts(name: str) -> dict[str, str]:
    """What is known of a policy that `load_policy` accepts, for results: a note, and the hash of what its name stands for."""
    if name == FULL_HISTORY:
        return {"note": "nothing is dropped"}
    if name in baselines.names():
        return {"note": inspect.getdoc(type(baselines.make(name))).split("\n")[0]}
    path = Path(name)
    content = path if path.is_file() else path / WEIGHTS_FILE
    return {"source": str(path.resolve()), "sha256": hashlib.sha256(content.read_bytes()).hexdigest()}
