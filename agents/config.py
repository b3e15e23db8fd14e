"""The settings of a training run: frozen dataclasses that are validated when they are made. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from far_env.clips.clip import check_clip_options
from far_env.config import parse_mapping, require_positive
from far_env.contract import check_signals, resolve_feedback
from far_env.distributed.cluster import ActorSettings
from far_env.errors import unknown_name

UNUSABLE_SIGNALS = {
    "key_proto": "its length depends on the host",
    "column_gap": "it ignores horizontal shifts, which fits a camera that pans and no other content",
}
"""Signals that a scorer cannot read, and why."""

FRAMES, TOKENS = MEMORIES = ("frames", "tokens")
"""What a scorer decides about."""

MAX_NETWORK = 2**26
"""Of width² · (num_layers + 1), about a twelfth of the parameters."""

ROUND_KINDS = ("true", "rollouts")
"""Where the scorer decides in a round of imitation: on true frames, or in rollouts of the host."""


@dataclass(frozen=True)
class ImitationSettings:
    """Imitation of an expert that knows the true rest of the clip, before any PPO. See `far_env.agents.imitation`."""

    start: str | None = None
    """Scorer to begin with, pretrained/NAME or a run folder, with a network of the same sizes or with fewer layers, to which
    layers are added that change nothing at first; for a token memory also one of whole frames, which compresses nothing at
    first. It learns as after a round: for round_epochs, at a lower rate."""
    true_clips: int = 0
    """Clips on whose true frames the expert's decisions are collected first, without a host; shared by the workloads. 0 for no
    imitation, or where start decides in the first round."""
    rounds: tuple[str, ...] = ()
    """Rounds after that, each a kind and a number of clips, such as "true 500" or "rollouts 500": the scorer decides, on true
    frames again or in rollouts of the host, the expert says what that costs, and the scorer learns from all so far."""
    budgets_per_clip: int = 2
    """Budgets under which each clip is played."""
    temperature: float = 0.05
    """Temperature of the target softmax(-cost / temperature); a cost is the logarithm of the expected error of the clip."""
    expected_cost_weight: float = 1.0
    """Weight, beside the cross-entropy, of the expected cost of the scorer's choice, in units of the temperature: it makes
    costly mistakes count more."""
    similarity_weight: float = 1.0
    """Weight of the mean squared error of the similarities of every two frames, which the network learns beside."""
    epochs: int = 8
    """Passes over the expert's decisions."""
    round_epochs: int = 3
    """Passes over all decisions so far after each round, from the scorer of the round before."""
    batch_size: int = 32
    """Calls of a policy per optimiser step, each with all decisions that are recorded of it."""
    learning_rate: float = 4e-3
    """Highest learning rate, of Muon for the inner matrices and of AdamW for the rest; it rises at first and falls to zero
    along a cosine."""

    RENAMED: ClassVar[dict[str, str]] = {
        "regret": "expected_cost_weight",
        "true_rounds": "rounds",
        "clips_per_round": "rounds",
    }
    REMOVED: ClassVar[tuple[str, ...]] = ("label", "candidates", "true_frame_replay_ratio", "rehearsal")

    def __post_init__(self) -> None:
        if self.true_clips < 0:
            raise ValueError(f"imitation: true_clips cannot be negative, got {self.true_clips}")
        if self.collected_rounds and not self.true_clips and self.start is None:
            raise ValueError("imitation: the scorer must have learned before it decides: set true_clips above 0, or start")
        if self.expected_cost_weight < 0 or self.similarity_weight < 0:
            raise ValueError(
                "imitation: expected_cost_weight and similarity_weight cannot be negative, got "
                f"{self.expected_cost_weight} and {self.similarity_weight}"
            )
        require_positive(self, "budgets_per_clip", "temperature", "epochs", "round_epochs", "batch_size", "learning_rate")

    @property
    def collects(self) -> bool:
        """Whether decisions are collected."""
        return bool(self.true_clips or self.rounds)

    @property
    def uses_true_frames(self) -> bool:
        """Whether decisions are collected on true frames, which lack the signals that only rollouts have."""
        return bool(self.true_clips) or any(kind == "true" for kind, _ in self.collected_rounds)

    @property
    def collected_rounds(self) -> list[tuple[str, int]]:
        """Kind, true or rollouts, and clips of each round. Raises ValueError if a round is not of the form "true 500"."""
        rounds = []
        for text in self.rounds:
            kind, _, clips = text.partition(" ")
            if kind not in ROUND_KINDS or not clips.isdecimal() or not int(clips):
                raise ValueError(
                    f"imitation.rounds: a round is {' or '.join(ROUND_KINDS)} and a number of clips, such as 'true 500', "
                    f"got {text!r}"
                )
            rounds.append((kind, int(clips)))
        return rounds


@dataclass(frozen=True)
class PPOSettings:
    """MaskablePPO's settings under the names of Stable-Baselines3."""

    total_timesteps: int = 80_000
    """Evictions to learn from, over all environments; 0 skips this stage."""
    num_envs: int = 64
    """Episodes that are played together."""
    n_steps: int = 20
    """Decisions per environment between updates."""
    batch_size: int = 256
    """Decisions per optimiser step."""
    n_epochs: int = 4
    """Passes over the collected decisions per update."""
    learning_rate: float = 1e-3
    """Initial learning rate; it falls linearly to zero."""
    gamma: float = 1.0
    """Discount factor."""
    gae_lambda: float = 0.95
    """Parameter of generalized advantage estimation (arXiv 1506.02438)."""
    clip_range: float = 0.2
    """Clipping of the probability ratio."""
    ent_coef: float = 0.003
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm."""
    adam_epsilon: float = 1e-5
    """Added to the root mean square of each weight's gradients in Adam; SB3's value. With one as large as these, weights whose
    gradients are small move little, so that a scorer which has learned other workloads forgets less of them."""
    critic_warmup_updates: int = 0
    """Updates at the start that train the critic alone, so that an untrained critic does not spoil a trained scorer."""
    imitation_steps: int = 0
    """Steps of imitation after each update, on the decisions that its last round collected in the workloads that the stage does
    not play, so that these are not forgotten. Needs imitation in the same run."""
    groups: int = 1
    """Groups into which the environments of each workload are divided: those of a group are generated together. Actors (see
    ray) hold one or more groups each, so there can be no more of them than groups. Results depend on the number of groups in
    their last digits, but not on that of actors."""
    workload: str | None = None
    """Workloads of the stage and of its validation, some of the run's, separated by commas; by default all."""

    RENAMED: ClassVar[dict[str, str]] = {"critic_updates": "critic_warmup_updates"}

    def __post_init__(self) -> None:
        for name in ("total_timesteps", "critic_warmup_updates", "imitation_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}")
        require_positive(self, "num_envs", "n_steps", "batch_size", "n_epochs", "learning_rate", "adam_epsilon", "groups")

    def workload_names(self, of_run: list[str]) -> list[str]:
        """The workloads of the stage, given those of the run."""
        return of_run if self.workload is None else _names(self.workload)

    def other_workload_names(self, of_run: list[str]) -> list[str]:
        """The workloads of the run that the stage does not play."""
        played = self.workload_names(of_run)
        return [name for name in of_run if name not in played]


@dataclass(frozen=True)
class NetworkConfig:
    """The scorer, a set transformer over the frames seen so far and pairs of them. See `far_env.agents.network`."""

    width: int = 48
    """Features per frame inside the network."""
    edge_width: int = 16
    """Features per pair of frames inside the network, an even number."""
    num_layers: int = 3
    """Layers that update pairs and frames."""
    num_heads: int = 4
    """Attention heads per layer."""
    signals: tuple[str, ...] = ()
    """Inputs beyond the benchmark's `FrameMeta`, see `far_env.contract.SIGNALS`; a scorer with signals cannot be exported."""
    edges: bool = True
    """Whether pairs of frames have features; without them a plain set transformer is left, for comparison."""
    edge_updates: bool = True
    """Whether pairs are updated by products over third frames; without, for comparison."""
    dropped_frames: bool = True
    """Whether frames that were dropped are still seen; without, for comparison."""
    scaled: bool = True
    """Whether changes are divided by the mean change of the clip; without, for comparison."""
    memory: str = "frames"
    """frames: the scorer says which frame of a history to drop next. tokens: which frame of a token memory to drop or to
    compress next; budgets then count tokens, see `far_env.rollout.streaming`."""

    RENAMED: ClassVar[dict[str, str]] = {"statistics": "signals"}
    REMOVED: ClassVar[tuple[str, ...]] = (
        "independent",
        "one_by_one",
        "sequential_eviction",
        "memory",
        "surroundings",
        "places",
        "path",
        "attention",
    )

    def __post_init__(self) -> None:
        require_positive(self, "width", "edge_width", "num_layers", "num_heads")
        if self.width**2 * (self.num_layers + 1) > MAX_NETWORK:
            raise ValueError(f"NetworkConfig: width {self.width} with num_layers {self.num_layers} is too large a network")
        if self.edge_width > self.width:
            raise ValueError(f"NetworkConfig: edge_width {self.edge_width} is above the width, {self.width}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")
        if self.edge_width % 2:
            raise ValueError(f"edge_width must be even, got {self.edge_width}")
        if self.memory not in MEMORIES:
            raise ValueError(unknown_name("memory", self.memory, MEMORIES))
        if self.memory == TOKENS and self.signals:
            raise ValueError("a scorer of a token memory reads no signals; leave network.signals out")
        names = check_signals(self.signals)
        for name in names:
            if name in UNUSABLE_SIGNALS:
                raise ValueError(f"a scorer cannot read {name}: {UNUSABLE_SIGNALS[name]}; use lat_cos or key_cos")
        object.__setattr__(self, "signals", names)


@dataclass(frozen=True)
class RewardSettings:
    """The reward of an episode. See `far_env.envs.retention_env.FrameRetentionEnv`."""

    metric: str = "psnr"
    """psnr, ssim or lpips."""
    scale: float = 0.1
    """Factor on the metric, so that returns are of order one. LPIPS, for which lower is better, gets a negative sign."""
    telescoping: bool = False
    """Pay the change of the running clip score at every decision instead of the clip's score at the end."""

    REMOVED: ClassVar[tuple[str, ...]] = ("relative_to",)

    def __post_init__(self) -> None:
        require_positive(self, "scale")

    @property
    def sign(self) -> int:
        """−1 for a metric that is better when lower, else 1."""
        from far_env.metrics import LOWER_IS_BETTER

        return -1 if self.metric in LOWER_IS_BETTER else 1


@dataclass(frozen=True)
class AgentTraining:
    """Settings of one training run."""

    imitation: ImitationSettings = field(default_factory=ImitationSettings)
    """Imitation of an expert that uses the true rest of the clip."""
    surrogate: PPOSettings = field(default_factory=lambda: PPOSettings(total_timesteps=0))
    """PPO with a surrogate in place of the host, which is much faster; before PPO with the host. See
    `far_env.agents.surrogate`."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """PPO with the host."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The scorer."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """The reward of an episode."""
    workload: str = "pan"
    """One or more workloads, separated by commas; each has an equal share of the episodes."""
    budget: int | str = 4
    """One or more budgets in frames, with network.memory tokens in tokens, separated by commas; each episode draws one."""
    host: str | None = None
    """"embedded", a released transformer or a host folder; by default the workload's."""
    device: str = "auto"
    """Device of the host: auto, cpu, cuda or cuda:N; the scorer is small and stays on the CPU."""
    precision: str = "float32"
    """Precision of the host: float32, bfloat16 or auto."""
    feedback: str | bool | None = None
    """generated, or true: the true frame enters the history in place of each generated one, in all rollouts of the run; by
    default that of the workload, generated unless it says otherwise."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    run_dir: str = "runs/agent"
    """Folder of the run: checkpoints, logs and the trained policy."""
    resume: bool = False
    """Resume the run in run_dir if there is one."""
    train_clips: int = 4096
    """Number of train clips, from the first on, from which episodes draw."""
    validation_clips: int = 64
    """Clips of the validation split on which scorers are compared; per workload, shared by the budgets."""
    validate_every: int = 5
    """Updates between validations; the scorer with the best mean of the reward's metric on validation clips is kept."""
    test_clips: int = 256
    """Number of test clips of the final table, per workload and budget."""
    allow_fewer_clips: bool = False
    """Use all clips of a split that has fewer than these numbers, as a small folder of videos may, and say so, instead of
    refusing to start. With several workloads, all use as many as the smallest has."""
    table: tuple[str, ...] = ("recent_fill", "recent_window", "random", "full_history")
    """Policies in the final table beside the learned one."""
    clip_options: str | dict = ""
    """Options of the workloads' clip sources, such as those of a world: {objects: 2, noise: 0.03}."""
    data_dir: str | None = None
    """Folder of videos, for workloads that read them."""
    protocol: str | None = None
    """Protocol by which those videos become clips: benchmark or far."""
    num_context: int | None = None
    """Frames that are given, for workloads of recorded clips; by default the workload's."""
    num_predict: int | None = None
    """Frames that are predicted, for workloads of recorded clips; by default the workload's."""

    ray: ActorSettings = field(default_factory=ActorSettings)
    """Actors that collect the decisions of imitation and play the episodes of PPO, on this machine or on several; the run is
    the same for any number."""

    RENAMED: ClassVar[dict[str, str]] = {"stand_in": "surrogate"}

    def __post_init__(self) -> None:
        require_positive(self, "train_clips", "validation_clips", "validate_every", "test_clips")
        options = parse_mapping(self.clip_options, "clip-options") if isinstance(self.clip_options, str) else self.clip_options
        object.__setattr__(self, "clip_options", check_clip_options(options) or "")
        if self.feedback is not None:
            object.__setattr__(self, "feedback", resolve_feedback(self.feedback))
        if self.network.memory == TOKENS:
            for name, given in (("surrogate.total_timesteps", self.surrogate.total_timesteps), ("ray.actors", self.ray.actors)):
                if given:
                    raise ValueError(f"{name} is {given}, which a training for a token memory does not have; set it to 0")
        decisions = self.surrogate.total_timesteps + self.ppo.total_timesteps
        if decisions == 0 and not self.imitation.collects:
            raise ValueError(
                "nothing would be learned: set imitation.true_clips or the total_timesteps of surrogate or ppo above 0"
            )

    @property
    def workload_names(self) -> list[str]:
        """The workloads, in order. Raises ValueError if the environments of a stage cannot be shared evenly among them."""
        names = _names(self.workload)
        for stage, settings in (("surrogate", self.surrogate), ("ppo", self.ppo)):
            chosen = settings.workload_names(names)
            if missing := [name for name in chosen if name not in names]:
                raise ValueError(f"{stage}.workload names {', '.join(missing)}, which {self.workload} does not contain")
            if settings.imitation_steps and not (self.imitation.collects and settings.other_workload_names(names)):
                raise ValueError(
                    f"{stage}.imitation_steps is {settings.imitation_steps}, for which there must be imitation before (set "
                    f"imitation.true_clips) and workloads that the stage does not play (set {stage}.workload); or set it to 0"
                )
            if settings.total_timesteps and settings.num_envs % (len(chosen) * settings.groups):
                each = f" with {settings.groups} groups each" * (settings.groups > 1)
                raise ValueError(
                    f"{stage}.num_envs is {settings.num_envs}, which {len(chosen)} workloads{each} cannot share evenly"
                )
        return names

    @property
    def validation_rollouts(self) -> dict[str, int]:
        """Workload → rollouts of its validation clips by which PPO's best scorer is chosen; their budgets share them.

        A stage validates before its first update, before every ``validate_every``-th, and at its end.
        """
        names = self.workload_names
        rollouts = dict.fromkeys(names, 0)
        for settings in (self.surrogate, self.ppo):
            if settings.total_timesteps:
                updates = math.ceil(settings.total_timesteps / (settings.n_steps * settings.num_envs))
                for name in settings.workload_names(names):
                    rollouts[name] += self.validation_clips * (math.ceil(updates / self.validate_every) + 1)
        return rollouts

    @property
    def source_options(self) -> dict[str, Any]:
        """All arguments of the workloads' clip sources, and their lengths."""
        options = {key: getattr(self, key) for key in ("data_dir", "protocol", "num_context", "num_predict")}
        return dict(self.clip_options or {}) | {key: value for key, value in options.items() if value is not None}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
