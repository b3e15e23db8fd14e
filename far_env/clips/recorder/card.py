"""The card of a recorded folder: its facts as a page of Markdown."""

from __future__ import annotations

from typing import Any

from far_env.clips.clip import SPLITS
from far_env.text import markdown_lines


def card(facts: dict[str, Any]) -> str:
    """The text of README.md, from the content of recording.json."""
    source, settings = facts["source"], facts["settings"]
    of_environment = source["kind"] == "environment"
    lines = _of_environment(facts) if of_environment else _of_minari(facts)
    if source["num_actions"] is None:
        actions = f"none are stored, because the action space {source['action_space']} is not Discrete"
    else:
        last = source["num_actions"] - 1
        names = ", ".join(f"{number} {name}" for name, number in source["moves"].items())
        actions = f"0 to {last}{f' ({names})' if names else ''}; `actions[i]` leads to frame i, the first is unused (0)"
    total = sum(facts["splits"][split]["bytes"] for split in SPLITS)
    size, frames = settings["size"], settings["frames"]
    lines += [
        f"- Actions: {actions}.",
        f"- Files: one `.npz` per episode with `video` uint8 ({frames}, {size}, {size}, 3)"
        f"{'' if source['num_actions'] is None else f', `actions` int64 ({frames},)'} and `padded`; {total / 2**20:.1f} MiB.",
        f"- Licence: {_licence(source)}.",
        f"- Versions: {', '.join(_versions(facts))}.",
    ]
    if (copying := facts["copying"]) is not None:
        values = {name: f"{value:.1f} dB" for name, value in copying["psnr"].items()}
        lines += [
            f"- Memory: the best copy of a true frame before it gives {values['4']} among the newest 4, {values['8']} among "
            f"the newest 8, {values['all']} among all; mean PSNR over the frames from {copying['num_context']} on of "
            f"{copying['clips']} test episodes."
        ]
    commands = list(dict.fromkeys(session["command"] for session in facts["sessions"]))
    lines += [f"- Command: {', then '.join(f'`{command}`' for command in commands)}."]
    title = f"# Clips recorded from {source['name']}"
    table = _table(facts)
    return "\n".join([title, "", *lines, "", table, "", *_use(max(1, frames // 2), max(1, frames - frames // 2))])


def _of_environment(facts: dict[str, Any]) -> list[str]:
    source, settings = facts["source"], facts["settings"]
    package = f"{source['package']} {source['version']}" if source["version"] else source["package"]
    options = "".join(f" {text}" for text in settings["env_options"])
    played = [_behaviour(name.strip(), settings, source) for name in settings["behaviours"].split(",")]
    skip = settings["frame_skip"]
    lines = [
        f"- Environment: `{source['name']}`{f' with{options}' if options else ''} of {package}.",
        f"- Played by: {'; '.join(played)}{', which take turns by episode' if len(played) > 1 else ''}.",
        f"- Frames: drawn as {facts['drawn']}, resized to {settings['size']}² with antialiasing"
        f"{f'; {skip} steps of the environment per frame' if skip > 1 else ''}.",
        "- Repeatable: "
        + ("an episode played twice was the same." if facts["repeatable"] else "no, an episode played twice differed."),
    ]
    padded = sum(facts["splits"][split]["padded_episodes"] for split in SPLITS)
    if padded:
        lines.append(f"- {padded} episodes ended early; their last frame and action are repeated to the end.")
    else:
        lines.append("- No episode ended early.")
    if source["maps"]:
        lines += ["- Splits share no map:"]
        lines += [f"  - {split}: {', '.join(source['maps'][split])}" for split in SPLITS if source["maps"].get(split)]
    else:
        lines += ["- Splits share no seed."]
    return lines


def _of_minari(facts: dict[str, Any]) -> list[str]:
    source = facts["source"]
    return [
        f"- Data set: `{source['name']}`, read with minari {source['version']}; environment {source['environment']}.",
        f"- Authors: {source['authors']}.",
        f"- Frames: of {source['drawn']}, resized to {facts['settings']['size']}² with antialiasing.",
        f"- Its episodes are cut into pieces; {facts['left_out']} frames at their ends, too few for a piece, are left out.",
        "- Every tenth episode is test, the one after it validation, the others train.",
    ]


def _behaviour(name: str, settings: dict[str, Any], source: dict[str, Any]) -> str:
    if name in source["behaviour_files"]:
        return f"`{name}` (SHA-256 {source['behaviour_files'][name][:8]})"
    if name == "scan":
        return f"scan (walks and turns of up to {settings['excursion']} actions, and most of the way back)"
    return f"sticky (repeats with probability {settings['repeat']:g})" if name == "sticky" else name


def _licence(source: dict[str, Any]) -> str:
    if source.get("licence_of_data"):
        return source["licence_of_data"]
    if source.get("licence"):
        return f"not stated for the pictures; the package {source['package']} has {source['licence']}"
    return "unknown"


def _versions(facts: dict[str, Any]) -> list[str]:
    found = {f"{name} {version}" for session in facts["sessions"] for name, version in session["versions"].items()}
    return sorted(found)


def _table(facts: dict[str, Any]) -> str:
    rows = [["split", "episodes", "frames", "ended early", "padded frames", "seeds", "MiB"]]
    for split in SPLITS:
        counts = facts["splits"][split]
        seeds = counts.get("seeds")
        numbers = [f"{counts[key]:,}" for key in ("episodes", "frames", "padded_episodes", "padded_frames")]
        rows.append([split, *numbers, f"{seeds[0]} to {seeds[1]}" if seeds else "–", f"{counts['bytes'] / 2**20:.1f}"])
    return markdown_lines(rows)


def _use(num_context: int, num_predict: int) -> list[str]:
    return [
        "## Use",
        "",
        "```sh",
        "far-env evaluate --workload recorded --data-dir THIS_FOLDER --host A_HOST \\",
        f"    --num-context {num_context} --num-predict {num_predict} --policies recent_fill,full_history",
        "```",
        "",
    ]
