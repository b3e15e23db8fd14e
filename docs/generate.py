"""Write the parts of the documentation that follow from the code: environments, baselines, settings, commands, models.

    python docs/generate.py

Each function returns Markdown. docs/conf.py writes all of them to docs/generated/ before every build, and pages include them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from option_tables import (
    all_commands,
    code,
    docstring,
    field_texts,
    fields_table,
    host_settings,
    joined,
    table,
    training_settings,
)

from far_env import agents, baselines
from far_env.baselines import tokens
from far_env.clips.worlds import WORLDS, World
from far_env.contract import OF_LATENTS, SIGNALS
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.token_env import TokenRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.evaluation.leaderboard_entry import Cell, Entry, Episode, load_entries, load_suite
from far_env.evaluation.leaderboard_ranking import ranking, ranking_rows
from far_env.host.weights import SHIPPED
from far_env.host.zoo import RELEASED
from far_env.workloads import BUDGETS, WORKLOADS, WorkloadSpec

PRETRAINED = Path(agents.__file__).parent / "pretrained"
NAMESPACE = "far_env/"
EXAMPLE_BUDGET = 4


def environments() -> str:
    """The registered environments, their spaces, the class's docstring, and the worlds."""
    specs = sorted(_specs("FrameRetentionEnv"), key=lambda spec: spec.id)
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
                _host(workload),
                "of chunks" if workload.prompts else str(slots),
            )
        )
    head = ("id", "workload", "given + predicted", "host", f"slots, budget {EXAMPLE_BUDGET}")
    parts = [table(head, rows)]
    for name, world in WORLDS.items():
        parts.append(_world(name, world))
    parts.append("## What an episode is")
    parts.append(_demoted(docstring(FrameRetentionEnv), by=1))
    parts.append("## Several episodes in one batch")
    parts.append(_demoted(docstring(FrameRetentionVectorEnv), by=1))
    parts.append("## A token memory")
    ids = [(f"`{spec.id}`", f"`{spec.kwargs['workload']}`") for spec in _specs("TokenRetentionEnv")]
    parts.append(table(("id", "workload"), ids))
    parts.append(_demoted(docstring(TokenRetentionEnv), by=1))
    return joined(parts)


def _specs(name: str) -> list[EnvSpec]:
    """The registered environments of a class of far-env."""
    return [spec for spec in gym.registry.values() if str(spec.entry_point).endswith(f":{name}")]


def _world(name: str, world: World) -> str:
    env_id = next(spec.id for spec in _specs("FrameRetentionEnv") if spec.kwargs["workload"] == name)
    env = gym.make(env_id, budget=EXAMPLE_BUDGET, device="cpu")
    spaces = [("action space", f"`{env.action_space}`")]
    spaces += [(f"observation `{key}`", f"`{_space(space)}`") for key, space in env.observation_space.spaces.items()]
    picture = f"![Truth, the newest frames and a learned policy on one clip of {name}](images/{name}.gif)"
    shown = picture if (Path(__file__).parent / "images" / f"{name}.gif").exists() else ""
    text = code(docstring(type(world)))
    spaces_table = table((f"with a budget of {EXAMPLE_BUDGET}", "space"), spaces)
    return joined([f"## `{env_id}`", text, shown, spaces_table, _options(name, world)])


def _options(name: str, world: World) -> str:
    """The options of a world, beside the values of its wide form where it has one; empty for the latter."""
    if name.endswith("_wide"):
        return ""
    wide = WORLDS.get(f"{name}_wide")
    forms = [world] if wide is None else [world, wide]
    texts = field_texts(type(world))
    rows = [
        (f"`{option.name}`", *(_value(getattr(form, option.name)) for form in forms), code(texts[option.name]))
        for option in dataclasses.fields(world)
    ]
    return table(("option", "default", *(f"in `{form.name}`" for form in forms[1:]), "meaning"), rows)


def _value(value: object) -> str:
    return ", ".join(f"`{item}`" for item in value) if isinstance(value, tuple) else f"`{value}`"


def _space(space: gym.Space) -> str:
    low, high = (f"{float(bound.flat[0]):g}" for bound in (space.low, space.high))
    return f"Box({low}, {high}, {space.shape}, {space.dtype})"


def all_baselines() -> str:
    """Every baseline: a table, then one section each with what is faithful to the source and what is adapted."""
    infos = [baselines.info(name) for name in baselines.names()]
    rows = [(f"[`{info.name}`](#{_anchor(info.name)})", info.tier, info.family, info.source) for info in infos]
    parts = [table(("baseline", "tier", "family", "source"), rows)]
    for info in infos:
        note, faithful, adapted = _split_note(info.note)
        facts = [("Source", info.source), ("Tier", info.tier), ("Family", info.family)]
        facts += [("Parameters", ", ".join(f"`{key}={value!r}`" for key, value in info.parameters.items()))] * bool(
            info.parameters
        )
        grid = "; ".join(f"`{key}` in {', '.join(f'`{value}`' for value in values)}" for key, values in info.grid.items())
        facts += [("Tuned over", grid)] * bool(grid)
        facts += [("Faithful", faithful)] * bool(faithful) + [("Adapted", adapted)] * bool(adapted)
        facts += [("Same decisions as", f"`{other}` up to a budget of {most}") for other, most in info.equivalent_to.items()]
        parts += [f"({_anchor(info.name)})=\n## `{info.name}`", note, "\n".join(f"{key}\n: {value}\n" for key, value in facts)]
    return joined(parts)


def token_policies() -> str:
    """Every policy over tokens: a section each with its docstring."""
    rows, parts = [], []
    for name in tokens.names():
        policy = tokens.load(name)
        text = inspect.cleandoc(type(policy).__doc__ or "")
        rows.append((f"`{name}`", policy.family, policy.source))
        parts += [f"### `{name}`", text]
    return joined([table(("policy", "family", "source"), rows), *parts])


def _anchor(baseline: str) -> str:
    return f"baseline-{baseline.replace('_', '-')}"


def _split_note(note: str) -> tuple[str, str, str]:
    """A baseline's note as what it does, what is faithful to the source, and what is adapted."""
    match = re.search(r"Faithful:(.*?)(?:Adapted:(.*))?$", note, re.DOTALL)
    if match is None:
        return code(note), "", ""
    faithful, adapted = (" ".join((part or "").split()) for part in match.groups())
    return code(note[: match.start()].strip()), code(faithful), code(adapted)


def signals() -> str:
    """Every signal, its shape and meaning."""
    rows = []
    for name, text in SIGNALS.items():
        shape, _, meaning = text.partition("): ")
        rows.append((f"`{name}`", "L" if name in OF_LATENTS else "A", f"{shape})", code(meaning)))
    return table(("signal", "tier", "shape", "meaning"), rows)


def released() -> str:
    """The released checkpoints."""
    rows = [
        (
            f"`{name}`",
            released_model.kind,
            released_model.data,
            f"{released_model.frame_size}²",
            f"`{released_model.autoencoder}`" if released_model.autoencoder else "–",
        )
        for name, released_model in RELEASED.items()
    ]
    return table(("name", "model", "data", "frames", "its autoencoder"), rows)


def workloads() -> str:
    """The workloads: frames, host, ODE steps, guidance and actions."""
    rows = [
        (
            f"`{name}`",
            f"{spec.num_context} + {spec.num_predict}",
            _host(spec),
            "–" if spec.num_steps is None else str(spec.num_steps),
            f"{spec.guidance:g}",
            f"{'prompts' if spec.prompts else 'labels'}, if the host takes them"
            if spec.prompts or spec.labels
            else {True: "yes", False: "no", None: "if the host takes them"}[spec.actions],
        )
        for name, spec in sorted(WORKLOADS.items(), key=lambda item: (item[0] not in WORLDS, item[0]))
    ]
    return table(("workload", "given + predicted", "host", "ODE steps", "guidance", "actions, labels or prompts"), rows)


def _host(spec: WorkloadSpec) -> str:
    return "to be given" if spec.host is None else f"`{spec.host}`"


def budgets() -> str:
    """The benchmark's names of budgets."""
    return table(("name", "frames"), [(f"`{name}`", str(frames)) for name, frames in BUDGETS.items()])


def shipped_policies() -> str:
    """The trained policies that ship, from their policy.json and config.yaml."""
    rows = []
    for folder in sorted(path.parent for path in PRETRAINED.glob("*/policy.json")):
        facts = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        extra = ", ".join(f"`{name}`" for name in facts["network"].get("signals", ()))
        rows.append((f"`pretrained/{folder.name}`", str(facts.get("trained_on", "")), extra or "none"))
    return table(("policy", "trained on", "signals"), rows)


def shipped_hosts() -> str:
    """The video models that ship."""
    rows = []
    for name, folder in SHIPPED.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        title = re.sub(r"^# (Model card: )?", "", card.splitlines()[0])
        rows.append((f"`{name}`", title))
    return table(("host", "description"), rows)


def leaderboard_suite() -> str:
    """What every entry of the leaderboard plays."""
    suite = load_suite()
    rows = [(f"`{cell.workload}`", str(cell.budget), f"`{cell.weights}`", str(cell.ode_steps)) for cell in suite.cells]
    return joined([f"{suite.text().capitalize()}.", table(("workload", "budget", "host's weights", "ODE steps"), rows)])


def leaderboard_ranking() -> str:
    """The ranking of the entries that ship."""
    suite = load_suite()
    header, *rows = ranking_rows(ranking(load_entries(None, suite), suite), suite)
    return table(header, [(f"`{name}`", *cells) for name, *cells in rows])


def leaderboard_entry() -> str:
    """The keys of an entry of the leaderboard."""
    parts = []
    for title, cls in (("An entry", Entry), ("A cell, in `cells`", Cell), ("An episode, in `episodes`", Episode)):
        parts += [f"### {title}", fields_table(cls)]
    return joined(parts)


def _demoted(markdown: str, by: int) -> str:
    """The text with its headings ``by`` levels lower, and rows of tables that continue on the next line in one line."""
    markdown = re.sub(r" \|\n\| \| \| ", " ", markdown)
    return re.sub(r"^(#+ )", "#" * by + r"\1", markdown, flags=re.MULTILINE)


PARTS: dict[str, Callable[[], str]] = {
    "baselines": all_baselines,
    "budgets": budgets,
    "commands": all_commands,
    "environments": environments,
    "host_settings": host_settings,
    "leaderboard_entry": leaderboard_entry,
    "leaderboard_ranking": leaderboard_ranking,
    "leaderboard_suite": leaderboard_suite,
    "released": released,
    "shipped_hosts": shipped_hosts,
    "shipped_policies": shipped_policies,
    "signals": signals,
    "token_policies": token_policies,
    "training_settings": training_settings,
    "workloads": workloads,
}


def write_all(folder: Path) -> None:
    """Write every part as a Markdown file into ``folder``; unchanged files are not rewritten."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        path, text = folder / f"{name}.md", part() + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(__file__).parent / "generated")
