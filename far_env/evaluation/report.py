"""A results folder as one self-contained HTML page: ranking, curves, and a player of the saved clips. It needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation.gaps import MEASURE, gap_bins
from far_env.evaluation.ranking import Difference, Group, Row, choose_reference, facts, highlighted, make_groups, metric_format
from far_env.evaluation.records import Record, Results
from far_env.evaluation.statistics import Interval
from far_env.evaluation.table import policy_labels
from far_env.policies import VALIDATION_ROLLOUTS
from far_env.progress import show_progress
from far_env.rollout.noise import seeds_text

SCRIPTS = ("dom.js", "charts.js", "tables.js", "timeline.js", "player.js", "theme.js", "main.js")
_TABLE_FACTS = ("family", "tier", "source", "note")


def report_page(results: Results, reference: str | None = None, show_clips: int | None = None, progress: bool = True) -> str:
    """The page as HTML text.

    Args:
        reference: policy that the others are first compared with; ``recent_fill`` by default, if it was evaluated.
        show_clips: at most this many clips per workload have a player; all with pictures by default.
        progress: show a progress bar.

    Raises:
        ValueError: if the reference was not evaluated, or a saved strip of frames is damaged.
    """
    data = report_data(results, reference, show_clips, progress)
    images = data.pop("images")
    parts = in_parts(data)
    return fill_page("page.html", SCRIPTS, f"far-env report: {', '.join(results.settings.workloads)}", data, parts, images)


def in_parts(data: dict[str, Any]) -> dict[str, Any]:
    """Take out of `report_data` what the page reads only when it shows it; returns it by the id of its element.

    Those are the differences to all policies but the reference, by group, and plans, metrics and pictures of the clips. So the
    page shows its tables and charts before it has read the rest, and parses few of many megabytes.
    """
    parts = {}
    for i, group in enumerate(data["groups"]):
        place = next((row for row, own in enumerate(group["rows"]) if own["policy"] == data["reference"]), None)
        matrices = parts[f"differences-{i}"] = group.pop("differences")
        group["toReference"] = {
            metric: [None if place is None else line[place] for line in lines] for metric, lines in matrices.items()
        }
    for i, clip in enumerate(data["clips"]):
        parts[f"clip-{i}"] = clip["runs"]
        clip["runs"] = [{key: run[key] for key in ("policy", "budget", "seed")} for run in clip["runs"]]
    return parts


def fill_page(
    template: str,
    scripts: Sequence[str],
    title: str,
    data: dict[str, Any],
    parts: Mapping[str, Any] = MappingProxyType({}),
    images: Sequence[str] = (),
) -> str:
    """A page of the assets with style, scripts, data and pictures (data URIs) inside; it may load nothing else.

    Args:
        parts: id of an element → data that the scripts read from it when they need them.
    """
    folder = files("far_env") / "assets" / "report"
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = "\n".join(['"use strict";', *((folder / name).read_text(encoding="utf-8") for name in scripts)])
    places = {
        "title": html.escape(title),
        "style": style,
        "style_hash": _source_hash(style),
        "script": script,
        "script_hash": _source_hash(script),
        "data": _json(data),
        # After the script, so that the page is drawn before they are read. A picture is decoded where it is shown.
        "parts": "\n".join(
            [
                *(f'<script type="application/json" id="{name}">{_json(value)}</script>' for name, value in parts.items()),
                *(f'<script type="text/plain" id="image-{i}">{uri}</script>' for i, uri in enumerate(images)),
            ]
        ),
    }
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("head.html", template))
    return re.sub(r"\{\{(\w+)\}\}", lambda match: places[match[1]], text)


def report_data(
    results: Results, reference: str | None = None, show_clips: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Everything the page shows, as plain values for JSON; intervals are [mean, low, high], policies are numbered."""
    settings = results.settings
    groups = make_groups(results)
    played = {row.policy for group in groups for row in group.rows}
    limited = {row.policy for group in groups for row in group.rows if row.budget < UNLIMITED_FRAMES}
    names = [name for name in settings.policies if name in played]
    labels = policy_labels({name: settings.policies[name] for name in names})
    number = {name: i for i, name in enumerate(names)}
    chosen = choose_reference(names, reference)
    images: dict[str, int] = {}
    clips = _clips(results, number, images, show_clips, progress)
    return {
        "version": version("far-env"),
        "folder": "" if results.folder is None else results.folder.resolve().name,
        "split": settings.split,
        "seeds": settings.seeds,
        "seedsText": seeds_text(settings.seeds),
        "clipCount": len(settings.clips),
        "firstClip": min(settings.clips),
        "unlimited": UNLIMITED_FRAMES,
        "memory": settings.memory,
        "metrics": [
            {"name": m.name, "label": m.label, "unit": m.unit, "digits": m.digits, "lower": m.lower_is_better}
            for m in map(metric_format, settings.metrics)
        ],
        "unavailable": settings.unavailable,
        "policies": [
            {
                "name": labels[name],
                "full": name not in limited,
                **{key: settings.policies[name].get(key) for key in _TABLE_FACTS},
                "rollouts": settings.policies[name].get(VALIDATION_ROLLOUTS),
            }
            for name in names
        ],
        "workloads": [
            {
                "name": name,
                "context": settings.num_context[name],
                "predict": settings.num_predict[name],
                "size": settings.frame_size[name],
            }
            for name in settings.workloads
        ],
        "reference": number[chosen],
        "highlighted": [number[name] for name in highlighted(groups, settings.metrics[0], chosen)],
        "gapMeasure": MEASURE,
        "facts": facts(results),
        "warnings": warnings(results),
        "groups": [_group(group, number, settings.metrics) for group in _bar(groups, "intervals", progress)],
        "clips": clips,
        "images": list(images),
    }


def warnings(results: Results) -> list[str]:
    """Sentences about policies that failed or have no episodes, and facts that should be equal for all of a workload's."""
    played = {policy for _, _, policy, *_ in results.episode_keys()}
    sentences = [f"No episode of {name} is finished." for name in results.settings.policies if name not in played]
    for policy, reasons in results.settings.failed.items():
        sentences += [f"{policy} was left out on {where}: {reason}." for where, reason in reasons.items()]
    for workload, counts in facts(results).items():
        for name in ("host", "weights", "ode_steps", "dtype", "feedback"):
            if len(values := counts.get(name, {})) > 1:
                counted = ", ".join(f"{value} ({count} episodes)" for value, count in values.items())
                sentences.append(f"The episodes of {workload} do not have the same {name.replace('_', ' ')}: {counted}.")
    return sentences


def _group(group: Group, number: dict[str, int], metrics: Sequence[str]) -> dict[str, Any]:
    differences = {}
    for metric in metrics:
        table = group.differences(metric)
        differences[metric] = [[None if d is None else _difference(d) for d in line] for line in table]
    bins = gap_bins(group.rows)
    rows = [_row(row, number, bins) | {"same": number[group.alike.get(row.policy, row.policy)]} for row in group.rows]
    named = {"workload": group.workload, "budget": group.budget, "gaps": bins}
    return {**named, "rows": rows, "differences": differences}


def _difference(difference: Difference) -> list[float]:
    """Mean, low, high and clips of the difference, its p value, and mean, low and high of the probability of improvement."""
    interval = difference.interval
    return [*triple(interval), interval.n, _round(difference.p), *triple(difference.better)]


def _row(row: Row, number: dict[str, int], bins: Sequence[str]) -> dict[str, Any]:
    by_gap = row.by_gap if isinstance(row.by_gap, str) else {bins.index(name): triple(i) for name, i in row.by_gap.items()}
    return {
        "policy": number[row.policy],
        "budget": row.budget,
        "n": len(row.clips),
        "missing": row.missing,
        "scores": {metric: value if isinstance(value, str) else triple(value) for metric, value in row.intervals.items()},
        "iqm": {metric: value if isinstance(value, str) else triple(value) for metric, value in row.iqm.items()},
        "perFrame": row.per_frame if isinstance(row.per_frame, str) else [triple(value) for value in row.per_frame],
        "byGap": by_gap,
        "ms": row.decision_ms,
    }


def _clips(
    results: Results, number: dict[str, int], images: dict[str, int], show_clips: int | None, progress: bool
) -> list[dict[str, Any]]:
    """Clips with a strip of true frames and at least one of predicted frames; equal pictures are stored once in ``images``."""

    def image(path: Path) -> int:
        uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        return images.setdefault(uri, len(images))

    settings = results.settings
    by_clip: dict[tuple[str, int], list[tuple[Record, Path]]] = defaultdict(list)
    for record in _bar(_pictured(results), "frames", progress):
        path = results.picture(record)
        if path.is_file():
            _check_strip(path, results, record.workload, settings.num_predict[record.workload])
            by_clip[record.workload, record.clip].append((record, path))
    clips = []
    for workload in settings.workloads:
        num_shown = 0
        for clip in settings.clips:
            runs, truth = by_clip[workload, clip], results.truth_picture(workload, clip)
            if not runs or not truth.is_file() or num_shown == show_clips:
                continue
            _check_strip(truth, results, workload, settings.num_context[workload] + settings.num_predict[workload])
            num_shown += 1
            runs.sort(key=lambda run: (run[0].budget, number[run[0].policy]))
            rollouts = [_run(record, number, image(path)) for record, path in runs]
            clips.append({"workload": workload, "clip": clip, "truth": image(truth), "runs": rollouts})
    return clips


def _pictured(results: Results) -> list[Record]:
    """The records of clips that have a picture."""
    if results.folder is None:
        return list(results.records)
    clips = set()
    for workload in results.settings.workloads:
        folder = results.truth_picture(workload, 0).parent
        clips |= {
            (workload, int(path.stem[len("truth_c") :])) for path in folder.glob("truth_c*.png") if path.stem[7:].isdecimal()
        }
    return results.of_clips(clips)


def _check_strip(path: Path, results: Results, workload: str, num_frames: int) -> None:
    """Raise ValueError unless ``path`` is a PNG of ``num_frames`` frames side by side."""
    size = results.settings.frame_size[workload]
    try:
        with Image.open(path) as image:
            kind, (width, height) = image.format, image.size
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}; evaluate into a new folder") from error
    if kind != "PNG" or (width, height) != (size * num_frames, size):
        expected = f"a PNG of {num_frames} frames, {size * num_frames}×{size} pixels"
        raise ValueError(f"{path} should be {expected}; it is a {kind} of {width}×{height}; evaluate into a new folder")


def _run(record: Record, number: dict[str, int], image: int) -> dict[str, Any]:
    return {
        "policy": number[record.policy],
        "budget": record.budget,
        "seed": record.seed,
        "image": image,
        "metrics": {name: _round(value) for name, value in record.metrics.items() if math.isfinite(value)},
        "psnr": [_round(value) if math.isfinite(value) else None for value in record.psnr_per_frame],
        "plan": [[entry["step"], entry["kept"], entry["demoted"]] for entry in record.plan],
    }


def _bar(items: Sequence[Any], name: str, progress: bool) -> Iterable[Any]:
    return show_progress(items, description=name, delay=1, disable=not progress)


def triple(interval: Interval) -> list[float]:
    """Mean and bounds, as the pages' scripts read them."""
    return [_round(value) for value in (interval.mean, interval.low, interval.high)]


def _round(value: float) -> float:
    return float(f"{value:.7g}")


def _json(value: Any) -> str:
    """As the content of a script element, where only "<" could end it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _source_hash(text: str) -> str:
    """The hash by which a content security policy allows an inline style or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
