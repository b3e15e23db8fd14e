"""Share what was made here as a repository on the Hugging Face hub: a trained policy, a host, or the results of an evaluation.

Only files with the names below are pushed: settings, safetensors, records, pictures, a card, and the exported policy. There is
no pickle among them, and whoever uses the repository reads only those files that are data.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from far_env.agents.checkpoints import (
    CONFIG_FILE,
    PRETRAINED,
    RESULTS_FILE,
    SETTINGS_FILE,
    WEIGHTS_FILE,
    load_scorer,
    scorer_folder,
)
from far_env.agents.config import FRAMES
from far_env.agents.export import export_run
from far_env.agents.publish import CARD_FILE, write_published
from far_env.evaluation.ranking import make_groups, metric_format
from far_env.evaluation.results_folder import RECORDS_FILE, load
from far_env.evaluation.results_folder import SETTINGS_FILE as EVALUATION_FILE
from far_env.host.weights import load_host
from far_env.hub import PREFIX, HubError, push, split_name
from far_env.io import write_text

EXPORTED_FILE = "policy.py"
HOST_CONFIG_FILE = "config.json"
_HEAD = "---\nlibrary_name: far-env\n---\n\n"
"""What the hub reads of a card."""


@dataclass(frozen=True)
class _Kind:
    """One kind of repository.

    Attributes:
        noun: what it holds.
        mark: the file by which a folder of this kind is known.
        prepare: (source, repository, scratch folder) → files by name.
        names: patterns of all its files.
    """

    noun: str
    mark: str
    prepare: Callable[[str, str, Path], dict[str, Path]]
    names: tuple[str, ...]


def push_folder(source: str, to: str, *, private: bool = False) -> str:
    """Push a run folder, a shipped policy, a host folder or a results folder; returns the name that means what was pushed.

    Args:
        source: a folder, or pretrained/NAME.
        to: hub:user/name. The repository is made if there is none.

    Raises:
        ValueError: if the source is none of these or is damaged, if the run is not finished, or if the name has another form.
        HubError: without a token that may write, or without a network.
    """
    repository, revision = split_name(to)
    if revision is not None:
        raise HubError(f"a push makes a new commit; give {PREFIX}{repository} without @{revision}")
    kind = _kind(source)
    with TemporaryDirectory() as scratch:
        files = kind.prepare(source, repository, Path(scratch))
        commit = push(repository, files, f"{kind.noun} of far-env", private=private, ours=kind.names)
    return f"{PREFIX}{repository}@{commit}"


def _kind(source: str) -> _Kind:
    if source.startswith(PRETRAINED):
        return _KINDS[0]
    for kind in _KINDS:
        if (Path(source) / kind.mark).is_file():
            return kind
    marks = ", ".join(f"{kind.noun.lower()} ({kind.mark})" for kind in _KINDS)
    raise ValueError(f"{source} has nothing to push; give a folder with one of: {marks}")


def _policy_files(source: str, repository: str, scratch: Path) -> dict[str, Path]:
    """A published policy, its exported file where it can be exported, and its table."""
    folder, name = scorer_folder(source), f"{PREFIX}{repository}"
    if source.startswith(PRETRAINED):
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        card = (folder / CARD_FILE).read_text(encoding="utf-8").replace(source, name)
    else:
        write_published(folder, scratch, name)
        card = (scratch / CARD_FILE).read_text(encoding="utf-8")
    write_text(scratch / CARD_FILE, _HEAD + card)
    network, _ = load_scorer(scratch)
    if not network.config.signals and network.config.memory == FRAMES:
        export_run(scratch, scratch / EXPORTED_FILE)
    if (folder / RESULTS_FILE).exists():
        shutil.copy(folder / RESULTS_FILE, scratch / RESULTS_FILE)
    names = (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, CARD_FILE, EXPORTED_FILE, RESULTS_FILE)
    return {name: scratch / name for name in names if (scratch / name).exists()}


def _host_files(source: str, repository: str, scratch: Path) -> dict[str, Path]:
    """A host's settings and weights, after they were loaded once, and its card."""
    host, folder = load_host(source, "cpu"), Path(source)
    card = scratch / CARD_FILE
    if (folder / CARD_FILE).exists():
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
    else:
        text = f"# {PREFIX}{repository}\n\nA video model of far-env for frames of {host.frame_size}².\n"
    write_text(card, f"{_HEAD}{text}\n`--host {PREFIX}{repository}` uses it; weights {host.weights_hash}.\n")
    names = (HOST_CONFIG_FILE, "transformer.safetensors", "autoencoder.safetensors")
    return {CARD_FILE: card, **{name: folder / name for name in names if (folder / name).exists()}}


def _results_files(source: str, repository: str, scratch: Path) -> dict[str, Path]:
    """An evaluation's settings, records and pictures, after they were read once, and its means as a card."""
    folder, results = Path(source), load(source)
    lines = [f"# {PREFIX}{repository}", "", "Results of far-env evaluate; means over clips.", ""]
    metrics = [metric_format(metric) for metric in results.settings.metrics]
    heads = [
        "workload",
        "budget",
        "policy",
        *(" ".join(filter(None, (metric.label, metric.unit))) for metric in metrics),
        "clips",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for group in make_groups(results):
        for row in group.ranked(metrics[0].name):
            means = [row.intervals[metric.name] for metric in metrics]
            texts = [
                "–" if isinstance(mean, str) else f"{mean.mean:.{metric.digits}f}"
                for mean, metric in zip(means, metrics, strict=True)
            ]
            lines.append("| " + " | ".join([group.workload, str(group.budget), row.policy, *texts, str(len(row.clips))]) + " |")
    lines += ["", f"`far-env report {PREFIX}{repository}` makes a page of them."]
    write_text(scratch / CARD_FILE, _HEAD + "\n".join(lines) + "\n")
    pictures = [path for path in sorted((folder / "frames").rglob("*")) if path.suffix in (".png", ".webp") and path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in pictures}
    return {CARD_FILE: scratch / CARD_FILE, **{name: folder / name for name in (EVALUATION_FILE, RECORDS_FILE)}, **files}


_KINDS = (
    _Kind("Policy", CONFIG_FILE, _policy_files, (CONFIG_FILE, WEIGHTS_FILE, SETTINGS_FILE, EXPORTED_FILE, RESULTS_FILE)),
    _Kind("Host", "transformer.safetensors", _host_files, (HOST_CONFIG_FILE, "*.safetensors")),
    _Kind("Results", EVALUATION_FILE, _results_files, (EVALUATION_FILE, RECORDS_FILE, "frames/*")),
)
