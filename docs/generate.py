"""Write the parts of the documentation that follow from the code: environments, baselines, settings, commands, models.

    python docs/generate.py

Each function returns Markdown. docs/conf.py writes all of them to docs/generated/ before every build, and pages include them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import tyro

from far_env import agents, baselines
from far_env.clips.worlds import WORLDS
from far_env.contract import OF_LATENTS, SIGNALS
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.host.weights import SHIPPED
from far_env.host.zoo import RELEASED
from far_env.workloads import BUDGETS, WORKLOADS

PRETRAINED = Path(agents.__file__).parent / "pretrained"
NAMESPACE = "far_env/"
EXAMPLE_BUDGET = 4


COMMON = {
    "batch_size": "Clips, or samples in training, that are computed together.",
    "budget": "Frames that may be kept, or one of the benchmark's names of budgets.",
    "checkpoint_every": "Steps between checkpoints.",
    "clip_range": "Clipping of PPO's probability ratio.",
    "clips_per_round": "Clips on which decisions are collected in each round.",
    "data_dir": "Folder of videos, for workloads that read them.",
    "device": "auto, cpu, cuda or cuda:N.",
    "ema_decay": "Decay of the exponential moving average of the weights.",
    "ent_coef": "Weight of the entropy bonus.",
    "folder": "Folder of videos or episodes.",
    "frames_per_clip": "Frames that are drawn from each clip.",
    "gae_lambda": "Parameter of generalized advantage estimation (arXiv 1506.02438).",
    "gamma": "Discount factor.",
    "host": "A host by name or folder; by default the workload's.",
    "learning_rate": "Of the optimiser.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "metric": "psnr, ssim or lpips.",
    "metrics": "Comma-separated: psnr, ssim, lpips.",
    "n_epochs": "Passes over the collected decisions per update.",
    "num_envs": "Episodes that are played together.",
    "num_heads": "Attention heads.",
    "num_layers": "Transformer layers.",
    "out": "File to write.",
    "policies": "Policies to compare.",
    "precision": "float32, bfloat16 or auto.",
    "run_dir": "Folder of the run.",
    "seed": "Seed of all random numbers.",
    "split": "train, validation or test.",
    "steps": "Updates.",
    "trials": "Training runs to try.",
    "validation_clips": "Clips of the validation split on which scorers are compared.",
    "vf_coef": "Weight of the critic's loss.",
    "warmup": "Updates in which the learning rate rises to its value.",
    "weight_decay": "Of the optimiser.",
    "width": "Width of the network.",
    "workload": "A registered workload.",
}
"""Meaning of standard options, for fields that have no text."""


def environments() -> str:
    """The registered environments, their spaces, what the class's docstring says, and the three worlds."""
    specs = sorted((spec for spec in gym.registry.values() if spec.id.startswith(NAMESPACE)), key=lambda spec: spec.id)
    order = [*WORLDS, *WORKLOADS]
    specs.sort(key=lambda spec: order.index(spec.kwargs["workload"]))
    rows = []
    for spec in specs:
        name = spec.kwargs["workload"]
        workload = WORKLOADS[name]
        slots = max(workload.num_context, EXAMPLE_BUDGET) + 1
        rows.append(
            (
                f"`{spec.id}`",
                f"`{name}`",
                f"{workload.num_context} + {workload.num_predict}",
                f"`{workload.host}`",
                str(slots),
            )
        )
    head = ("id", "workload", "given + predicted", "host", f"slots, budget {EXAMPLE_BUDGET}")
    parts = [_table(head, rows)]
    for name, world in WORLDS.items():
        parts.append(_world(name, type(world)))
    parts.append("## What an episode is")
    parts.append(_demoted(_docstring(FrameRetentionEnv), by=1))
    parts.append("## Several episodes in one batch")
    parts.append(_demoted(_docstring(FrameRetentionVectorEnv), by=1))
    return _joined(parts)


def _world(name: str, world: type) -> str:
    env_id = next(spec.id for spec in gym.registry.values() if spec.kwargs.get("workload") == name)
    env = gym.make(env_id, budget=EXAMPLE_BUDGET, device="cpu")
    spaces = [("action space", f"`{env.action_space}`")]
    spaces += [(f"observation `{key}`", f"`{_space(space)}`") for key, space in env.observation_space.spaces.items()]
    picture = f"![Truth, the newest frames and a learned policy on one clip of {name}](images/{name}.gif)"
    text = _docstring(world)
    return _joined([f"## `{env_id}`", text, picture, _table((f"with a budget of {EXAMPLE_BUDGET}", "space"), spaces)])


def _space(space: gym.Space) -> str:
    low, high = (f"{float(bound.flat[0]):g}" for bound in (space.low, space.high))
    return f"Box({low}, {high}, {space.shape}, {space.dtype})"


def all_baselines() -> str:
    """Every baseline: a table, then one section each with what is faithful to the source and what is adapted."""
    about = [baselines.info(name) for name in baselines.names()]
    rows = [(f"[`{own.name}`](#{_anchor(own.name)})", own.tier, own.family, own.source) for own in about]
    parts = [_table(("baseline", "tier", "family", "source"), rows)]
    for own in about:
        note, faithful, adapted = _split_note(own.note)
        facts = [("Source", own.source), ("Tier", own.tier), ("Family", own.family)]
        facts += [("Parameters", ", ".join(f"`{key}={value!r}`" for key, value in own.parameters.items()))] * bool(
            own.parameters
        )
        facts += [("Faithful", faithful)] * bool(faithful) + [("Adapted", adapted)] * bool(adapted)
        facts += [("Same decisions as", f"`{other}` up to a budget of {most}") for other, most in own.equivalent_to.items()]
        parts += [f"({_anchor(own.name)})=\n## `{own.name}`", note, "\n".join(f"{key}\n: {value}\n" for key, value in facts)]
    return _joined(parts)


def _anchor(baseline: str) -> str:
    return f"baseline-{baseline.replace('_', '-')}"


def _split_note(note: str) -> tuple[str, str, str]:
    """A baseline's note as what it does, what is faithful to the source, and what is adapted."""
    match = re.search(r"Faithful:(.*?)(?:Adapted:(.*))?$", note, re.DOTALL)
    if match is None:
        return _code(note), "", ""
    faithful, adapted = (" ".join((part or "").split()) for part in match.groups())
    return _code(note[: match.start()].strip()), _code(faithful), _code(adapted)


def training_settings() -> str:
    """Every key of a training configuration, with type, default and meaning."""
    return _settings(command_options(commands()["train"])[0])


def host_settings() -> str:
    """Every key of a host's training configuration."""
    return _settings(command_options(commands()["train-host"])[0])


def _settings(cls: type) -> str:
    """One table of the plain fields of a dataclass, then one per nested dataclass."""
    default = cls()
    texts, plain, nested = field_texts(cls), [], []
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((field.name, value, texts.get(field.name, "")))
        else:
            plain.append(_setting(cls, field.name, field.name, value, texts))
    head = ("key", "type", "default", "meaning")
    parts = [_table(head, plain)]
    for name, section, text in nested:
        own = type(section)
        texts = field_texts(own)
        rows = [
            _setting(own, f"{name}.{field.name}", field.name, getattr(section, field.name), texts)
            for field in dataclasses.fields(own)
        ]
        parts += [f"### `{name}`", _code(text or _docstring(own)), _table(head, rows)]
    return _joined(parts)


def _setting(cls: type, key: str, name: str, value: object, texts: dict[str, str]) -> tuple[str, ...]:
    return f"`{key}`", f"`{_type_name(cls, name)}`", _default(value), _code(texts.get(name, ""))


def _default(value: object) -> str:
    """A default as YAML, as code; the items of a list one by one, so that a table can break the line between them."""
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value) or "`[]`"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return f"`{value}`"


def _type_name(cls: type, name: str) -> str:
    annotation = typing.get_type_hints(cls)[name]
    text = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    text = text.replace("typing.", "").replace("NoneType", "null").replace("None", "null").replace(", ...", "")
    return re.sub(r"tuple\[(\w+)\]", r"list of \1", text)


def field_texts(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, those of its bases included, else the usual meaning of its name."""
    texts = {field.name: COMMON[field.name] for field in dataclasses.fields(cls) if field.name in COMMON}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(inspect.cleandoc(following.value.value).split())
    return texts


class _Captured(BaseException):
    """Carries the options class of a command out of its function."""


def commands() -> dict[str, Callable[[Sequence[str]], int | None]]:
    """Every command of ``far-env`` by name."""
    found = importlib.metadata.entry_points(group="far_env.commands")
    return {own.name: own.load() for own in sorted(found, key=lambda own: own.name)}


def command_options(function: Callable[[Sequence[str]], int | None]) -> tuple[type, str]:
    """The options class that a command parses and its description, found by asking for its help."""

    def capture(cls: type, *, description: str = "", **_: Any) -> None:
        raise _Captured(cls, description)

    with mock.patch.object(tyro, "cli", capture):
        try:
            function(["--help"])
        except _Captured as captured:
            return captured.args
    raise ValueError(f"{function.__module__}.{function.__name__} parses no options")


def all_commands() -> str:
    """Every command: what it does, its arguments and its options."""
    parts = []
    for name, function in commands().items():
        cls, _ = command_options(function)
        texts = field_texts(cls)
        rows, positional = [], []
        for field in dataclasses.fields(cls):
            default = _given(field)
            if dataclasses.is_dataclass(default):
                rows.append(
                    (f"`--{_flag(field.name)}.…`", "", _code(f"{texts.get(field.name, '')} See the page on training.".strip()))
                )
                continue
            is_positional = "Positional" in str(inspect.get_annotations(cls).get(field.name, ""))
            shown = "required" if default is dataclasses.MISSING else "" if default in (None, ()) else _default(default)
            if is_positional:
                several = f"{field.name.upper()} ..." if isinstance(default, tuple) else field.name.upper()
                positional.append(several if default is dataclasses.MISSING else f"[{several}]")
            rows.append(
                (
                    f"`{field.name.upper()}`" if is_positional else f"`--{_flag(field.name)}`",
                    shown,
                    " ".join(filter(None, (_choices(cls, field.name), _code(texts.get(field.name, ""))))),
                )
            )
        line = (function.__doc__ or "").strip().splitlines()[0]
        usage = " ".join(["far-env", name, *positional, "[options]"])
        parts += [f"## `{name}`", line, f"```text\n{usage}\n```", _table(("option", "default", "meaning"), rows)]
    return _joined(parts)


def _choices(cls: type, name: str) -> str:
    """The values that a field takes, where its type names them."""
    annotation = typing.get_type_hints(cls)[name]
    if typing.get_origin(annotation) is not typing.Literal:
        return ""
    return "One of " + ", ".join(f"`{value}`" for value in typing.get_args(annotation)) + "."


def _given(field: dataclasses.Field) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else dataclasses.MISSING


def _flag(name: str) -> str:
    return name.replace("_", "-")


def signals() -> str:
    """Every signal, its shape and meaning."""
    rows = []
    for name, text in SIGNALS.items():
        shape, _, meaning = text.partition("): ")
        rows.append((f"`{name}`", "L" if name in OF_LATENTS else "A", f"{shape})", _code(meaning)))
    return _table(("signal", "tier", "shape", "meaning"), rows)


def released() -> str:
    """The released checkpoints."""
    rows = [
        (
            f"`{name}`",
            own.kind,
            own.data,
            f"{own.frame_size}²",
            f"`{own.autoencoder}`" if own.autoencoder else "–",
        )
        for name, own in RELEASED.items()
    ]
    return _table(("name", "model", "data", "frames", "its autoencoder"), rows)


def workloads() -> str:
    """The workloads and what each consists of."""
    rows = [
        (
            f"`{name}`",
            f"{own.num_context} + {own.num_predict}",
            f"`{own.host}`",
            "–" if own.num_steps is None else str(own.num_steps),
            f"{own.guidance:g}",
            "yes" if own.actions else "no",
        )
        for name, own in sorted(WORKLOADS.items(), key=lambda item: (item[0] not in WORLDS, item[0]))
    ]
    return _table(("workload", "given + predicted", "host", "ODE steps", "guidance", "actions"), rows)


def budgets() -> str:
    """The benchmark's names of budgets."""
    return _table(("name", "frames"), [(f"`{name}`", str(frames)) for name, frames in BUDGETS.items()])


def shipped_policies() -> str:
    """The trained policies that ship, from their policy.json and config.yaml."""
    rows = []
    for folder in sorted(path.parent for path in PRETRAINED.glob("*/policy.json")):
        facts = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        extra = ", ".join(f"`{name}`" for name in facts["network"].get("signals", ()))
        rows.append((f"`pretrained/{folder.name}`", str(facts.get("trained_on", "")), extra or "none"))
    return _table(("policy", "trained on", "signals"), rows)


def shipped_hosts() -> str:
    """The video models that ship."""
    rows = []
    for name, folder in SHIPPED.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        title = re.sub(r"^# (Model card: )?", "", card.splitlines()[0])
        rows.append((f"`{name}`", title))
    return _table(("host", "what it is"), rows)


def _docstring(obj: object) -> str:
    return inspect.cleandoc(obj.__doc__ or "")


def _demoted(markdown: str, by: int) -> str:
    """The text with its headings ``by`` levels lower, and rows of tables that continue on the next line in one line."""
    markdown = re.sub(r" \|\n\| \| \| ", " ", markdown)
    return re.sub(r"^(#+ )", "#" * by + r"\1", markdown, flags=re.MULTILINE)


def _code(text: str) -> str:
    """A docstring's ``code`` and `reference` as Markdown's code."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


PARTS: dict[str, Callable[[], str]] = {
    "baselines": all_baselines,
    "budgets": budgets,
    "commands": all_commands,
    "environments": environments,
    "host_settings": host_settings,
    "released": released,
    "shipped_hosts": shipped_hosts,
    "shipped_policies": shipped_policies,
    "signals": signals,
    "training_settings": training_settings,
    "workloads": workloads,
}


def write_all(folder: Path) -> None:
    """Write every part as a Markdown file into ``folder``; files that would not change are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        path, text = folder / f"{name}.md", part() + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(__file__).parent / "generated")
