"""PPO's environments in actors of Ray: actions travel to them, observations come back, and latents stay there.

The unit is a group of rows, a `FrameRetentionVectorEnv`, which is generated together wherever it is. So what comes back does
not depend on the number of actors, nor on whether there are any. A lost actor is replaced: its groups are restored as they were
at the last checkpoint, or reset with the same seeds, and the actions since then are given to them again. Only for a checkpoint,
once per update, do latents come to this process.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from far_env.agents.config import AgentTraining, PPOSettings
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.device import denormals_flushed
from far_env.distributed.pool import MAX_LOSSES, WARN_SECONDS, cause, check_same, start_facts, use_device
from far_env.envs.sb3 import RowsVecEnv, concatenated
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.errors import first_line
from far_env.workload import Workload, deciding_budgets
from far_env.workloads import make_workload, resolve_budgets

Call = tuple[str, tuple]
"""A method of `RolloutActor` for one group, and its arguments."""


def make_env(
    config: AgentTraining, workload: Workload, budgets: Sequence[int], env_class: type[FrameRetentionVectorEnv], num_rows: int
) -> FrameRetentionVectorEnv:
    """A vector environment in which PPO learns.

    Raises:
        ValueError: on a reward or signals that these environments do not have.
    """
    options = {"signals": config.network.signals, "autoreset_mode": "SAME_STEP", **reward_options(config)}
    return env_class(num_rows, workload, deciding_budgets(workload, budgets), **options)


def reward_options(config: AgentTraining) -> dict[str, Any]:
    """The arguments of an environment that say what is learned from: the reward, and the train clips."""
    reward = config.reward
    weights = {reward.metric: reward.sign * reward.scale}
    return {"reward": weights, "telescoping": reward.telescoping, "num_clips": config.train_clips}


def groups_of(settings: PPOSettings, workloads: Sequence[str]) -> list[tuple[str, int]]:
    """The groups of a stage in the order of their rows: the workload and the number of rows of each."""
    rows = settings.num_envs // (len(workloads) * settings.groups)
    return [(workload, rows) for workload in workloads for _ in range(settings.groups)]


class RolloutActor:
    """Holds some groups on one device.

    Args:
        groups: number of a group → its workload and rows.
        num_nodes: of all observations, see `EvictionVecEnv`.
    """

    def __init__(
        self,
        config: AgentTraining,
        env_class: type[FrameRetentionVectorEnv],
        groups: dict[int, tuple[str, int]],
        num_nodes: int,
    ) -> None:
        self._config, self._class, self._groups, self._num_nodes = config, env_class, groups, num_nodes
        self._device = use_device(config.ray.gpus_per_actor, config.ray.cpus_per_actor)
        self._envs: dict[int, EvictionVecEnv] = {}

    def prepare(self) -> dict[str, Any]:
        """Load the hosts and make the environments; returns facts for `far_env.distributed.pool.check_same`."""
        config = self._config
        place = {"host": config.host, "device": self._device, "precision": config.precision, "feedback": config.feedback}
        names = dict.fromkeys(name for name, _ in self._groups.values())
        workloads = {name: make_workload(name, **place, **config.source_options) for name in names}
        budgets = resolve_budgets(config.budget)
        for group, (name, rows) in self._groups.items():
            env = make_env(config, workloads[name], budgets, self._class, rows)
            self._envs[group] = EvictionVecEnv([env], config.network, self._num_nodes)
        return start_facts({name: workload.host.weights_hash for name, workload in workloads.items()})

    @denormals_flushed()  # as in the training's process
    def work(self, calls: dict[int, list[Call]]) -> dict[int, Any]:
        """Of each group, do calls one after the other; returns what the last one returns."""
        return {
            group: [getattr(self, name)(self._envs[group], *values) for name, values in calls[group]][-1] for group in calls
        }

    def reset(self, env: EvictionVecEnv, seeds: Sequence[int | None], options: Sequence[dict]) -> tuple:
        """Begin all episodes: observations, infos and action masks."""
        env._seeds, env._options = list(seeds), list(options)
        return env.reset(), env.reset_infos, env.action_masks()

    def step(self, env: EvictionVecEnv, actions: np.ndarray) -> tuple:
        """What `EvictionVecEnv.step` returns, and action masks."""
        return *env.step(actions), env.action_masks()

    def save(self, env: EvictionVecEnv) -> tuple:
        """The state: of the environment, and of the graphs of its rows."""
        return env.env_states()[0], env.state_dict()

    def restore(self, env: EvictionVecEnv, env_state: Any, graphs: list) -> np.ndarray:
        """Return to a state; returns action masks."""
        env.load_env_states([env_state])
        env.load_state_dict(graphs)
        return env.action_masks()


@dataclass
class _Actor:
    """An actor and the groups that it holds."""

    handle: Any
    groups: dict[int, tuple[str, int]]


class ActorVecEnv(RowsVecEnv):
    """The rows of `EvictionVecEnv`, held by actors.

    Args:
        ray: Ray's module, connected.
        example: an environment of the stage's workloads, with the spaces of all.
        env_class, config: of the stage.
        settings: of the stage.
        workloads: of the stage.
        remark: receives sentences about losses.

    Raises:
        ValueError: if actors do not start, or a machine has other versions or another host.
    """

    def __init__(
        self,
        ray: ModuleType,
        example: EvictionVecEnv,
        env_class: type[FrameRetentionVectorEnv],
        config: AgentTraining,
        settings: PPOSettings,
        workloads: Sequence[Workload],
        remark: Callable[[str], None] = lambda sentence: print(sentence, file=sys.stderr),
    ) -> None:
        self._ray, self._remark = ray, remark
        groups = groups_of(settings, [workload.name for workload in workloads])
        ends = np.cumsum([rows for _, rows in groups]).tolist()
        self._rows = [slice(end - rows, end) for end, (_, rows) in zip(ends, groups, strict=True)]
        self._check = partial(check_same, start_facts({workload.name: workload.host.weights_hash for workload in workloads}))
        shipped = replace(config, precision=workloads[0].host.precision)
        self._arguments = shipped, env_class, example.num_nodes
        resources = {"num_cpus": config.ray.cpus_per_actor, "num_gpus": config.ray.gpus_per_actor, "max_restarts": 0}
        self._class = ray.remote(RolloutActor).options(**resources)
        count = min(config.ray.actors, len(groups))
        if count < config.ray.actors:
            remark(f"{count} of {config.ray.actors} actors play, one for each group of environments (the setting groups)")
        shares = [{number: groups[number] for number in range(first, len(groups), count)} for first in range(count)]
        self._actors = [_Actor(self._begin(share), share) for share in shares]
        self._masks = np.zeros((ends[-1], example.num_nodes), dtype=bool)
        self._since: list[list[Call]] = [[] for _ in groups]
        """Of each group, the calls that lead to its present state: a reset or a state, and the steps after it."""
        self._states: list[tuple] = []
        """Of each group, the state of its environment and of its graphs at the last `env_states`."""
        self._loaded: list[Any] = []
        self._pending: list[Any] = []
        self._calls: list[Call] = []
        for actor in self._actors:
            self._prepared(actor)
        self.render_mode = None
        super().__init__(ends[-1], example.observation_space, example.action_space)

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all episodes with the seeds and options that were set; `reset_infos` holds their infos."""
        self._send("reset", [(self._seeds[rows], self._options[rows]) for rows in self._rows])
        observations, infos, masks = zip(*self._receive(), strict=True)
        self._masks = np.concatenate(masks)
        self.reset_infos = [info for part in infos for info in part]
        self._reset_seeds()
        self._reset_options()
        return concatenated(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Give every group its actions."""
        self._send("step", [(np.asarray(actions)[rows],) for rows in self._rows])

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """As `EvictionVecEnv.step_wait`, of all groups."""
        observations, rewards, dones, infos, masks = zip(*self._receive(), strict=True)
        self._masks = np.concatenate(masks)
        every_info = [info for part in infos for info in part]
        return concatenated(observations), np.concatenate(rewards), np.concatenate(dones), every_info

    def action_masks(self) -> np.ndarray:
        """bool (num_envs, N), as of the last observation."""
        return self._masks

    def env_states(self) -> list[Any]:
        """The environments' states, one for each group; a lost actor is from now on restored from them."""
        self._send("save", [()] * len(self._rows))
        self._states = self._receive()
        return [env_state for env_state, _ in self._states]

    def state_dict(self) -> list[dict[str, Any]]:
        """The graphs of all rows, as of the last `env_states`."""
        return [row for _, graphs in self._states for row in graphs]

    def load_env_states(self, states: Sequence[Any]) -> None:
        """Remember the environments' states; `load_state_dict` restores them."""
        self._loaded = list(states)

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Restore environments and graphs."""
        self._send("restore", [(own, list(state[rows])) for own, rows in zip(self._loaded, self._rows, strict=True)])
        self._masks = np.concatenate(self._receive())

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            self._end(actor)

    def _send(self, name: str, arguments: Sequence[tuple]) -> None:
        """Call a method for every group; `_receive` waits for the answers."""
        self._calls = [(name, values) for values in arguments]
        self._pending = [
            actor.handle.work.remote({group: [self._calls[group]] for group in actor.groups}) for actor in self._actors
        ]

    def _receive(self) -> list[Any]:
        """The answers of all groups."""
        answers: dict[int, Any] = {}
        for actor, reference in zip(self._actors, self._pending, strict=True):
            answers |= self._answers(actor, reference)
        results = [answers[group] for group in range(len(self._rows))]
        for group, (name, values) in enumerate(self._calls):
            if name == "step":
                self._since[group].append((name, values))
            else:
                self._since[group] = [("restore", results[group])] if name == "save" else [(name, values)]
        return results

    def _answers(self, actor: _Actor, reference: Any) -> dict[int, Any]:
        """The answers of an actor's groups; a lost actor is replaced."""
        for loss in range(1, MAX_LOSSES + 1):
            try:
                return self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise cause(error) from error
            except self._ray.exceptions.RayError as error:
                sentence = (
                    f"an actor with {sum(rows for _, rows in actor.groups.values())} episodes was lost ({first_line(error)})"
                )
                if loss == MAX_LOSSES:
                    raise ValueError(
                        f"{sentence}; {MAX_LOSSES} were lost at the same step, so its memory may be too small"
                    ) from error
                self._remark(f"{sentence}; another one repeats what it did since the last checkpoint")
                self._end(actor)
                actor.handle = self._begin(actor.groups)
                self._prepared(actor)
                reference = actor.handle.work.remote(
                    {group: [*self._since[group], self._calls[group]] for group in actor.groups}
                )
        raise AssertionError("the last loss is an error")

    def _begin(self, groups: dict[int, tuple[str, int]]) -> Any:
        config, env_class, num_nodes = self._arguments
        return self._class.remote(config, env_class, groups, num_nodes)

    def _prepared(self, actor: _Actor) -> None:
        """Wait until an actor has started."""
        for failures in range(1, MAX_LOSSES + 1):
            reference, warned = actor.handle.prepare.remote(), False
            while not self._ray.wait([reference], timeout=WARN_SECONDS)[0]:
                if not warned:
                    self._remark("waiting for the cluster to have CPU cores or GPUs for an actor, and for it to load its host")
                warned = True
            try:
                return self._check(self._ray.get(reference))
            except self._ray.exceptions.RayTaskError as error:
                raise cause(error) from error
            except self._ray.exceptions.RayError as error:
                if failures == MAX_LOSSES:
                    raise ValueError(f"actors do not start: {first_line(error)}") from error
                self._end(actor)
                actor.handle = self._begin(actor.groups)

    def _end(self, actor: _Actor) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(actor.handle)
