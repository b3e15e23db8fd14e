"""A connection to a Ray cluster, or a cluster of this machine alone that ends with the block."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from far_env.config import require_positive
from far_env.errors import first_line

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster that is started here. Records and decisions are small, and latents stay with the actors."""
ANSWER_SECONDS = 8.0
"""How long an address may take to answer."""


@dataclass(frozen=True)
class ActorSettings:
    """Processes that work together, on this machine or on those of a Ray cluster. Needs the extra ray."""

    actors: int = 0
    """Processes, each of which holds a host on one device; 0 for none."""
    address: str | None = None
    """A running Ray cluster: auto or HOST:PORT; by default one is started on this machine for as long as the command runs."""
    gpus_per_actor: float = 0.0
    """GPUs of each, at most 1; with 0.5 two share a GPU and half of its memory each. With 0 they compute on the CPU."""
    cpus_per_actor: int = 1
    """CPU cores of each, and the threads with which it computes."""

    def __post_init__(self) -> None:
        require_positive(self, "cpus_per_actor")
        if self.actors < 0:
            raise ValueError(f"the number of actors cannot be negative, got {self.actors}")
        if not 0 <= self.gpus_per_actor <= 1:
            raise ValueError(
                f"gpus-per-actor must be between 0 and 1, got {self.gpus_per_actor:g}: an actor computes on one device; "
                "start more actors to use more GPUs"
            )


@contextlib.contextmanager
def connected(settings: ActorSettings) -> Iterator[ModuleType]:
    """Connect to the cluster of these settings, or start one; the block receives Ray's module and has no standard output.

    Raises:
        ValueError: if Ray is not installed, nobody answers at the address, or the cluster has not enough CPU cores or GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # By default Ray starts its workers at niceness 15, which hardly compute beside any other process.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray announces with a warning that actors without a GPU will no longer be hidden from GPUs, which these do not rely on.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("actors need Ray; install it: pip install 'far-env[ray]'") from error
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if settings.address is None:
            local = {"num_cpus": max(1, settings.actors * settings.cpus_per_actor), "object_store_memory": OBJECT_STORE_BYTES}
            try:
                ray.init("local", include_dashboard=False, **local, **quiet)
            except Exception as error:  # Ray raises no class of its own, above all where a busy machine is too slow for it
                raise ValueError(f"Ray does not start on this machine: {first_line(error)}") from error
        else:
            check_answers(settings.address)
            ray.init(settings.address, **quiet)
        for number, handler in handlers.items():  # Ray sets its own, which end the process
            signal.signal(number, handler)
        check_resources(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        with contextlib.redirect_stdout(sys.stderr):  # for which Ray's warnings are, though it prints them as output
            yield ray
    finally:
        ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def check_answers(address: str) -> None:
    """Raise ValueError unless a Ray cluster answers at the address within about `ANSWER_SECONDS`.

    Ray would try for minutes and then end the process, so a process of its own asks first.
    """
    remedy = "start one with ray start --head, or leave the address out to use this machine alone"
    if address != "auto":
        host, separator, port = address.rpartition(":")
        if "://" in address or not (separator and host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"the address {address!r} is neither auto nor HOST:PORT of a Ray cluster")
        try:
            socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS / 2).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {address} ({error}); {remedy}") from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", *(["--address", address] if address != "auto" else [])]
    try:
        asked = subprocess.run(command, capture_output=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        asked = None
    if asked is None or asked.returncode:
        where = "in reach of this machine" if address == "auto" else f"at {address}"
        raise ValueError(f"no Ray cluster answers {where}; {remedy}")


def check_resources(settings: ActorSettings, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ValueError if the actors do not fit on the nodes, of which each has so many of the resources CPU and GPU."""
    cpus, gpus = settings.cpus_per_actor, settings.gpus_per_actor
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    machines = f"the cluster has {len(nodes)} machine{'s' * (len(nodes) != 1)} with {total['CPU']:g} CPU cores"
    has = f"{machines} and {total['GPU']:g} GPUs"
    if gpus and not total["GPU"]:
        raise ValueError(f"gpus-per-actor is {gpus:g}, but {has}; leave it out to compute on the CPU")
    fit = 0
    for node in nodes:
        by_cpu = int(node.get("CPU", 0) // cpus)
        fit += min(by_cpu, int(node.get("GPU", 0)) * int(1 / gpus + 1e-9)) if gpus else by_cpu
    if fit < settings.actors:
        each = f"{cpus} CPU core{'s' * (cpus != 1)}" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ValueError(f"{settings.actors} actors with {each} each do not fit: {has}, enough for {fit}")
