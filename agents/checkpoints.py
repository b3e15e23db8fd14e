"""Run folders, policies that ship, and names: a trained scorer on disk, and one way to turn any name into a policy."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import tier
from far_env.agents.policies import AgentPolicy
from safetensors.torch import save_file

from far_env import baselines
from far_env.contract import RetentionPolicy
from far_env.errors import unknown_name
from far_env.evaluation.evaluate import FULL_HISTORY
from far_env.io import write_text
from far_env.policy_file import policy_from_file
from far_env.tensor_files import load_weights

WEIGHTS_FILE = "policy.safetensors"
CONFIG_FILE = "policy.json"
SETTINGS_FILE = "config.yaml"
RESULTS_FILE = "results.json"
LEARNED = "learned"
"""The trained policy's name among those that stand beside it in a run's table."""
PRETRAINED = "pretrained/"
"""Names that begin so are policies that ship; a folder of one's own that is called so is named ``./pretrained/…``."""
PRETRAINED_DIR = Path(__file__).parent / "pretrained"


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


def pretrained_names() -> list[str]:
    """The policies that ship, as `load_policy` knows them."""
    return [f"{PRETRAINED}{path.parent.name}" for path in sorted(PRETRAINED_DIR.glob(f"*/{CONFIG_FILE}"))]


def scorer_folder(name: str) -> Path:
    """The folder of a trained scorer: a run's, or that of a policy that ships. Raises ValueError if no such policy ships."""
    if not name.startswith(PRETRAINED):
        return Path(name)
    if name not in pretrained_names():
        raise ValueError(unknown_name("pretrained policy", name, pretrained_names()))
    return PRETRAINED_DIR / name.removeprefix(PRETRAINED)


def load_policy(name: str) -> RetentionPolicy | None:
    """A policy by name: a baseline, a Python file, a run folder, pretrained/NAME, or full_history (None: nothing is dropped).

    Raises:
        ValueError: if the name is none of these, or the file or folder cannot be used.
    """
    if name == FULL_HISTORY:
        return None
    if name in baselines.names():
        return baselines.make(name)
    path = scorer_folder(name)
    if path.suffix == ".py" and path.is_file():
        policy = policy_from_file(path)
        with contextlib.suppress(AttributeError):
            policy.name = name  # errors name the file, not the class that all exported files share
        return policy
    if path.is_dir():
        return AgentPolicy(load_scorer(path)[0], name)
    known = ", ".join([*baselines.names(), FULL_HISTORY])
    raise ValueError(
        f"no policy {name!r}: it is neither a baseline ({known}), nor a pretrained one ({', '.join(pretrained_names())}), nor "
        "an existing .py file or run folder"
    )


def policy_facts(name: str) -> dict[str, str]:
    """What is known of a policy that `load_policy` accepts, for results: family, tier, source and a note of baselines, and
    the hash of what the name of another stands for."""
    if name == FULL_HISTORY:
        return {"note": "nothing is dropped"}
    if name in baselines.names():
        about = baselines.info(name)
        return {"family": about.family, "tier": about.tier, "source": about.source, "note": about.note.split("\n")[0]}
    path = scorer_folder(name)
    if path.is_file():
        return {"family": "file", "source": str(path.resolve()), "sha256": _sha256(path)}
    source = f"{name} of far-env" if name.startswith(PRETRAINED) else str(path.resolve())
    network, facts = load_scorer(path)
    note = f"trained on {facts.get('trained_on', 'unknown clips')}"
    sha256 = _sha256(path / WEIGHTS_FILE)
    return {"family": "learned", "tier": tier(network.view.signals), "source": source, "note": note, "sha256": sha256}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
