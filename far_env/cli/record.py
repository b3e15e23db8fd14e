"""``far-env record``: clips are recorded from a Gymnasium environment, or read from a Minari data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from far_env.cli.console import keeping_episodes, remark
from far_env.clips.recorder.settings import RecordSettings
from far_env.config import parse


def record(args: Sequence[str]) -> None:
    """Record clips from a Gymnasium environment that renders, or from a Minari data set."""
    settings = parse(RecordSettings, args, "far-env record", RecordSettings.__doc__ or "")
    if settings.minari is None:
        from far_env.clips.recorder.run import record as run
    else:
        from far_env.clips.recorder.minari import convert as run

    with keeping_episodes(settings.out):
        recorded = run(settings)
    if recorded.replaced:
        remark(f"{recorded.replaced} damaged files were replaced")
    if recorded.facts.get("repeatable") is False:
        remark("the environment is not repeatable: an episode that was played twice with the same seed differed")
    print((Path(settings.out) / "README.md").read_text(encoding="utf-8"))
