"""Plays episodes in this process, or in several that are started afresh, and writes their files.

Processes are spawned, not forked: a forked process hangs if the parent has used OpenMP or a renderer.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from far_env.clips.recorder.folder import RecordedEpisodes
from far_env.clips.recorder.player import Player
from far_env.clips.recorder.settings import RecordSettings

_SECONDS_TO_END = 5.0
Job = tuple[str, int]
"""Split and number of an episode."""


def play_all(settings: RecordSettings, jobs: list[Job]) -> Iterator[Job]:
    """Play episodes and write them to ``settings.out``; yields each when its file is there.

    The end of the iteration, Ctrl-C or an error ends the processes.

    Raises:
        ValueError: the first error of an episode.
    """
    processes = min(settings.processes, len(jobs))
    if processes <= 1:
        yield from _play(settings, jobs)
        return
    context = multiprocessing.get_context("spawn")
    workers, pipes = [], []
    try:
        for first in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            block = jobs[first * len(jobs) // processes : (first + 1) * len(jobs) // processes]
            worker = context.Process(target=_work, args=(settings, block, theirs), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        open_pipes = list(pipes)
        while open_pipes:
            for pipe in wait(open_pipes):
                try:
                    message = pipe.recv()
                except EOFError:
                    message = "a process that records ended without a word; it may have run out of memory"
                if isinstance(message, str):
                    raise ValueError(message)
                if message is None:
                    open_pipes.remove(pipe)
                else:
                    yield message
    finally:
        for worker in workers:
            worker.terminate()
        for worker, pipe in zip(workers, pipes, strict=True):
            worker.join(_SECONDS_TO_END)
            worker.kill()
            worker.join()
            pipe.close()


def _play(settings: RecordSettings, jobs: list[Job]) -> Iterator[Job]:
    player = Player(settings)
    files = RecordedEpisodes(Path(settings.out), settings.frames, settings.size, player.num_actions is not None)
    try:
        for split, number in jobs:
            episode = player.play(split, number)
            files.write(split, number, episode.video, episode.actions, episode.padded)
            yield split, number
    finally:
        player.close()


def _work(settings: RecordSettings, jobs: list[Job], pipe: Connection) -> None:
    """The life of a process: sends every finished job, then None, or an error's sentence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which removes a file that is half written
    # The parent was killed if nobody reads: what would be left to do is done by the command that continues.
    with suppress(BrokenPipeError):
        try:
            for job in _play(settings, jobs):
                pipe.send(job)
            pipe.send(None)
        except ValueError as error:
            pipe.send(str(error))
