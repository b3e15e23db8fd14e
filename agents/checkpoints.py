"""Run folders, policies that ship, and names: a trained scorer on disk, and one way to turn any name into a policy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import tier
from far_env.agents.policies import AgentPolicy
from safetensors.torch import save_file

from far_env.contract import RetentionPolicy
from far_env.errors import unknown_name
from far_env.io import write_text
from far_env.policies import load_policy, policy_facts
from far_env.tensor_files import load_weights

__all__ = ["load_policy", "policy_facts"]

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


def names() -> list[str]:
    """The pretrained policies."""
    return pretrained_names()


def accepts(name: str) -> bool:
    """Whether `load` takes the name: that of a pretrained policy, or a folder."""
    return name.startswith(PRETRAINED) or Path(name).is_dir()


def load(name: str) -> RetentionPolicy:
    """The policy of a run folder, or a pretrained one. Raises ValueError if it cannot be loaded."""
    return AgentPolicy(load_scorer(scorer_folder(name))[0], name)


def facts(name: str) -> dict[str, str]:
    """What results record of a policy that `load` takes."""
    path = scorer_folder(name)
    source = f"{name} of far-env" if name.startswith(PRETRAINED) else str(path.resolve())
    network, described = load_scorer(path)
    note = f"trained on {described.get('trained_on', 'unknown clips')}"
    sha256 = _sha256(path / WEIGHTS_FILE)
    return {"family": "learned", "tier": tier(network.view.signals), "source": source, "note": note, "sha256": sha256}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
