"""Collecting expert data by actors of Ray: the scorer's weights travel to them, decisions travel back, latents stay there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from far_env.agents.collection import Batch, play_batch
from far_env.agents.config import AgentTraining
from far_env.agents.expert_data import ExpertData
from far_env.agents.network import RetentionNetwork, network_with_weights
from far_env.device import denormals_flushed
from far_env.distributed.cluster import connected
from far_env.distributed.pool import ActorPool, Task, check_same, start_facts, use_device
from far_env.workload import Workload
from far_env.workloads import make_workload


class ActorBatchPlayer(ExitStack):
    """A `far_env.agents.collection.BatchPlayer` for use in a ``with`` statement; it connects when the first batch is played.

    Args:
        config: of the training run, whose ``ray`` says how many actors there are.
    """

    def __init__(self, config: AgentTraining) -> None:
        super().__init__()
        self._config = config
        self._pools: dict[str, ActorPool] = {}
        self._ray: Any = None

    def __call__(
        self, workload: Workload, batches: Sequence[Batch], actor: RetentionNetwork | None
    ) -> Iterator[tuple[Batch, ExpertData]]:
        """Play batches by the actors.

        Raises:
            ValueError: if the cluster cannot be used, or if a machine has other versions or another host.
        """
        if self._ray is None:
            self._ray = self.enter_context(connected(self._config.ray))
        if workload.name not in self._pools:
            self._pools.clear()  # which ends the actors of the workload before
            expected = start_facts({workload.name: workload.host.weights_hash})
            arguments = (replace(self._config, precision=workload.host.precision), workload.name)
            pool = ActorPool(self._ray, ExpertActor, arguments, self._config.ray, partial(check_same, expected))
            self._pools[workload.name] = pool
        weights = None if actor is None else {name: value.detach().cpu() for name, value in actor.state_dict().items()}
        tasks = [Task((batch, weights), None, f"{workload.name}, rollouts from {batch.first} on") for batch in batches]
        for task, columns in self._pools[workload.name].completed(tasks):
            # Ray's arrays are views of its memory that cannot be written; copies outlive it.
            yield task.arguments[0], ExpertData(**{name: torch.from_numpy(value.copy()) for name, value in columns.items()})


class ExpertActor:
    """Holds the host of one workload and plays batches of its train clips."""

    def __init__(self, config: AgentTraining, workload: str) -> None:
        self._config, self._name = config, workload
        self._device = use_device(config.ray.gpus_per_actor, config.ray.cpus_per_actor)
        self._workload: Workload | None = None

    def prepare(self) -> dict[str, Any]:
        """Load the host; returns facts for `far_env.distributed.pool.check_same`."""
        config = self._config
        if self._workload is None:
            place = {"host": config.host, "device": self._device, "precision": config.precision, "feedback": config.feedback}
            self._workload = make_workload(self._name, **place, **config.source_options)
        return start_facts({self._name: self._workload.host.weights_hash})

    @denormals_flushed()  # as in the training's process
    def work(self, batch: Batch, weights: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        """The decisions of a batch as arrays; the scorer with these weights decides, or the expert without any."""
        actor = None if weights is None else network_with_weights(batch.config, weights)
        return {name: value.numpy() for name, value in vars(play_batch(self._workload, batch, actor)).items()}
