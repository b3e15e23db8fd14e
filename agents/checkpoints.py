"""Trained scorers on disk, and the collection of learned policies: shipped (pretrained/NAME), on the hub (hub:USER/NAME), runs.

`names`, `load`, `facts` and `accepts` are what `far_env.policies` asks of a collection. Importing this module imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from far_env.agents.config import FRAMES, TOKENS, AgentTraining, NetworkConfig
from far_env.config import from_dict, load_yaml
from far_env.contract import tier
from far_env.errors import unknown_name
from far_env.hub import Snapshot, is_hub_name, snapshot
from far_env.io import read_json, write_json
from far_env.policies import TRAINING_ROLLOUTS

if TYPE_CHECKING:
    from far_env.agents.network import RetentionNetwork
    from far_env.agents.policies import AgentPolicy

WEIGHTS_FILE = "policy.safetensors"
CONFIG_FILE = "policy.json"
SETTINGS_FILE = "config.yaml"
RESULTS_FILE = "results.json"
LEARNED = "learned"
"""The trained policy's name in the table of its run."""
PRETRAINED = "pretrained/"
"""The beginning of the names of shipped policies; a run folder at such a path is named ``./pretrained/…``."""
PRETRAINED_DIR = Path(__file__).parent / "pretrained"


def names(memory: str = FRAMES) -> list[str]:
    """The shipped policies that can decide about a memory (`NetworkConfig.memory`), see `load_scorer`."""
    folders = [path.parent for path in sorted(PRETRAINED_DIR.glob(f"*/{CONFIG_FILE}"))]
    return [f"{PRETRAINED}{folder.name}" for folder in folders if memory == TOKENS or _about(folder)[1].memory == FRAMES]


def accepts(name: str) -> bool:
    """Return whether `load` accepts the name: a shipped policy (also misspelt, so that the error suggests another), one on the
    Hugging Face hub, or the path of a folder."""
    return name.startswith(PRETRAINED) or is_hub_name(name) or Path(name).is_dir()


def load(name: str) -> AgentPolicy:
    """The policy of a shipped scorer, of one on the hub, or of a run folder.

    Raises:
        ValueError: if there is none, its files are damaged, or the hub cannot be read.
    """
    from far_env.agents.policies import AgentPolicy

    return AgentPolicy(load_scorer(scorer_folder(name), FRAMES)[0], name)


def facts(name: str, memory: str = FRAMES) -> dict[str, str]:
    """Facts about a policy that results record: family, tier, source, a note on its training, and the hash of its weights.

    Where its settings can be read, also by how many rollouts of validation clips the weights were chosen.

    Raises:
        ValueError: as `load`.
    """
    folder = scorer_folder(name, memory)
    network, about = load_scorer(folder, memory)
    chosen_by = _validation_rollouts(folder / SETTINGS_FILE)
    return {
        **({} if chosen_by is None else {TRAINING_ROLLOUTS: chosen_by}),
        "family": "learned",
        "tier": tier(network.config.signals),
        "source": source(name),
        "note": f"trained on {about.get('trained_on', 'unknown clips')}",
        "sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
    }


def _validation_rollouts(settings: Path) -> str | None:
    """The rollouts of `AgentTraining.validation_rollouts`; None without a file that this version can read."""
    try:
        rollouts = load_yaml(AgentTraining, settings).validation_rollouts
    except ValueError:
        return None
    names = [name for name, count in rollouts.items() if count]
    return f"{sum(rollouts.values())}" + f" on {', '.join(names)}" * bool(names)


def source(name: str) -> str:
    """Where a policy comes from, in a form that always means the same: a commit of a repository, or an absolute path."""
    if name.startswith(PRETRAINED):
        return f"{name} of far-env"
    return _snapshot(name).name if is_hub_name(name) else str(Path(name).resolve())


def scorer_folder(name: str, memory: str = TOKENS) -> Path:
    """The folder of a trained scorer: a run's, a shipped policy's, or one that was fetched from the Hugging Face hub.

    Args:
        memory: for which a shipped policy is wanted, see `names`; by default any.

    Raises:
        ValueError: if no such policy is shipped, or if the hub cannot be read.
    """
    if is_hub_name(name):
        return _snapshot(name).folder
    if not name.startswith(PRETRAINED):
        return Path(name)
    if name not in names(memory):
        raise ValueError(unknown_name("pretrained policy", name, names(memory)))
    return PRETRAINED_DIR / name.removeprefix(PRETRAINED)


def _snapshot(name: str) -> Snapshot:
    """A policy's data from the hub; not its exported file, which is code."""
    return snapshot(name, (CONFIG_FILE, WEIGHTS_FILE), (SETTINGS_FILE, RESULTS_FILE))


def save_scorer(scorer: RetentionNetwork, config: NetworkConfig, about: dict[str, Any], folder: Path) -> None:
    """Write policy.json, with the network's configuration and facts about its training, and then policy.safetensors.

    So a folder that holds the weights holds both, wherever the process was killed.
    """
    from far_env.tensor_files import save_weights

    write_json(folder / CONFIG_FILE, {"network": asdict(config), **about})
    save_weights(scorer.state_dict(), folder / WEIGHTS_FILE)


def load_scorer(folder: Path, memory: str = TOKENS) -> tuple[RetentionNetwork, dict[str, Any]]:
    """The scorer of a run folder, and its policy.json.

    Args:
        memory: which it decides about (`NetworkConfig.memory`). A scorer of frames can decide about a token memory too, see
            `far_env.agents.network.token_weights`, but not the other way round.

    Raises:
        ValueError: if a file is missing or damaged, if the weights do not fit the configuration, or the memory is another.
    """
    from far_env.agents.network import make_network
    from far_env.tensor_files import load_weights

    about, config = _about(folder)
    if memory == FRAMES and config.memory == TOKENS:
        raise ValueError(f"the policy in {folder} was trained for a token memory: play it with --memory tokens")
    return load_weights(make_network(config), folder / WEIGHTS_FILE), about


def _about(folder: Path) -> tuple[dict[str, Any], NetworkConfig]:
    """The contents of policy.json, and the network's configuration in it. Raises ValueError if it is missing or damaged."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{folder} holds no trained policy ({CONFIG_FILE} is missing); train one with far-env train")
    about = read_json(path, "train the policy again")
    if not isinstance(about, dict) or "network" not in about:
        raise ValueError(f"{path} is damaged (it lacks 'network'); train the policy again")
    return about, from_dict(NetworkConfig, about["network"], f"{path}: network")
