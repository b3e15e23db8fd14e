"""The settings of ``far-env train-host``: validated dataclasses. Imports no torch, so that ``--help`` answers quickly."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from tyro.constructors import PrimitiveConstructorSpec

from far_env.config import from_dict, require_positive
from far_env.errors import unknown_name

OBJECTIVES = ("teacher_forcing", "far")
OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("cosine", "constant")
DEFAULT_FRAMES = 16
"""Frames of the windows that are drawn from recordings, unless a source says otherwise."""


@dataclass(frozen=True)
class Source:
    """Where clips come from, and how often."""

    clips: str
    """A world; a folder of videos, of recorded episodes (.npz), or of FAR's JSON lists of videos or latents; or a data set
    (ucf101, bair, dmlab, minecraft) whose folder is in its environment variable. A folder of such a name is written ./NAME."""
    share: float = 1.0
    """How often its clips are drawn, relative to the other sources."""
    frames: int | None = None
    """Length of the windows that are drawn at random from its episodes; by default the whole clips of a world, and 16 frames of
    recordings."""
    interval: int = 1
    """Distance of successive frames of a window within the episode."""
    flip: bool = False
    """Also use the mirrored frames of every episode."""
    classes: bool = True
    """Give its actions, or labels, to a host that takes them; without, its frames have the null class."""
    dataset: str | None = None
    """Read a folder as this data set does (ucf101, bair, dmlab, minecraft); by default every video or episode with the actions
    that it comes with."""
    train_list: str | None = None
    """The JSON list in the folder whose videos are trained on, every tenth one excepted; by default FAR's of the data set."""
    protocol: str = "far"
    """How a folder is split and how its frames are made square: far (lists, or every tenth file; centre crop) or benchmark
    (shuffled list; squeezed). Use that of the workload that will evaluate the host, or its test clips may be trained on."""

    def __post_init__(self) -> None:
        require_positive(self, "share", "interval")
        if self.frames is not None and self.frames < 2:
            raise ValueError(f"Source: frames must be at least 2, got {self.frames}: a frame and its successor")

    @classmethod
    def parse(cls, text: str) -> Source:
        """``NAME`` or ``NAME=SHARE``, as on the command line. Raises ValueError if the share is no number above 0."""
        name, equals, share = text.rpartition("=")
        if not equals:
            return cls(text)
        try:
            return cls(name, float(share))
        except ValueError as error:
            raise ValueError(f"the share of {name} must be a number above 0, got {share!r}") from error


def _sources(value: object) -> tuple[Source, ...]:
    """Sources from what a configuration holds: a mapping of names to shares, or a list of names and of mappings of settings."""
    if isinstance(value, dict):
        return tuple(Source(name, share) for name, share in value.items())
    items = []
    for number, item in enumerate(value):
        if isinstance(item, dict):
            if "clips" not in item:
                raise ValueError(f"sources: entry {number + 1} needs clips, a world or a folder")
            item = from_dict(Source, item, f"sources: entry {number + 1}")
        items.append(Source.parse(item) if isinstance(item, str) else item)
        if not isinstance(items[-1], Source):
            raise ValueError(f"sources: entry {number + 1} must be a name or a mapping of settings, got {item!r}")
    return tuple(items)


_ON_THE_COMMAND_LINE = PrimitiveConstructorSpec(
    nargs="*",
    metavar="NAME[=SHARE] ...",
    instance_from_str=lambda texts: tuple(Source.parse(text) for text in texts),
    is_instance=lambda value: isinstance(value, tuple | dict),
    str_from_instance=lambda sources: [f"{source.clips}={source.share:g}" for source in sources],
)


@dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of the autoencoder's training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers.AutoencoderDC; scaling_factor is measured after training."""
    steps: int = 2500
    """Optimiser steps."""
    batch_size: int = 32
    """Frames per step."""
    learning_rate: float = 2e-3
    """Highest learning rate of AdamW."""
    muon_learning_rate: float | None = None
    """Train the kernels of the inner convolutions with Muon at this learning rate; by default everything with AdamW."""
    warmup: int = 50
    """Steps in which the learning rate rises to its highest value."""
    latent_noise: float = 0.1
    """Largest standard deviation of the noise added to latents, relative to that of the latents; each frame draws its level
    uniformly up to this. The transformer's errors resemble such noise, so this gains rollouts more decibels than it costs
    reconstructions."""
    frames_per_clip: int = 4
    """Frames that are drawn from each clip of a batch."""

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "learning_rate", "warmup", "frames_per_clip")
        if self.batch_size % self.frames_per_clip:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of frames_per_clip {self.frames_per_clip}")


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of the transformer's training."""

    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of far_env.host.far.FAR, or, with a context_patch_size, of far_env.host.far_long.FARLong."""
    objective: str = "teacher_forcing"
    """teacher_forcing, the recipe of the embedded hosts with dropped frames, or far, by which FAR's models were trained."""
    steps: int = 7_000
    """Optimiser steps."""
    clips_per_world: int = 8_000
    """Train clips of a world that are encoded once; batches are drawn from them. Of recordings, all are encoded."""
    batch_size: int = 16
    """Histories per step, over all processes."""
    gradient_accumulation: int = 1
    """Parts in which a process computes its rows of the batch, one after the other, to save memory."""
    optimizer: str = "muon"
    """muon (Muon for the attention and MLP matrices, AdamW for the rest) or adamw (for all)."""
    muon_learning_rate: float = 0.02
    """Learning rate of Muon."""
    adamw_learning_rate: float = 2e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.01
    """Weight decay of both optimisers."""
    schedule: str = "cosine"
    """Learning rates after the warm-up: cosine, down to 0, or constant."""
    warmup: int = 100
    """Steps in which the learning rates rise to their highest values."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which becomes the host."""
    clean_context_ratio: float = 0.1
    """Objective far: share of frames that are given clean and do not count."""
    contiguous_every: int = 5
    """One batch in this many has contiguous histories, without dropped frames."""
    min_contiguous: int = 16
    """Shortest contiguous history of such a batch; the longest is the whole clip."""
    contiguous_predicted: int = 4
    """Frames predicted in such a batch, drawn again for every batch; predicting all would cost more than it improves."""
    max_older: int = 6
    """Largest number of random older frames in front of a tail."""
    max_tail: int = 6
    """Longest contiguous tail; the shortest has 2 frames, and the last frame is predicted."""
    noisy_copies: int = 2
    """Noise levels drawn per predicted frame; they share the clean history's cost."""
    noise_mean: float = 0.8
    """Noise levels are sigmoid(N(noise_mean, 1)), except for the share pure_noise_share."""
    pure_noise_share: float = 0.25
    """Share of noise levels that are 1."""
    class_dropout: float = 0.1
    """Share of actions, or labels, that are replaced by the null class, if the model takes them."""
    context_noise: float = 0.15
    """Half of the histories carry noise of up to this sigma while their time is that of clean frames; this reduces drift."""

    def __post_init__(self) -> None:
        counts = ("steps", "clips_per_world", "batch_size", "contiguous_every", "min_contiguous", "contiguous_predicted")
        require_positive(self, *counts, "gradient_accumulation", "noisy_copies", "muon_learning_rate", "adamw_learning_rate")
        for name, known in (("objective", OBJECTIVES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(unknown_name(name, getattr(self, name), known))
        if self.max_tail < 2:
            raise ValueError(f"max_tail must be at least 2, got {self.max_tail}: a tail is a frame and its successor")


@dataclass(frozen=True)
class ValidationSettings:
    """The next-frame test: predict one frame of validation clips from true frames, while the transformer is trained."""

    every: int = 0
    """Steps between tests; 0 for none."""
    clips: int = 32
    """Validation clips of each source."""
    targets: int = 4
    """Predicted frames per clip, evenly spread over the second half of its window."""
    budget: int = 8
    """Frames of a history: the newest ones, or the newest and the most similar older ones."""
    rollout: int = 0
    """Frames that are also generated one after the other from the first half of each window, to measure drift; 0 for none."""
    num_steps: int = 4
    """ODE steps."""
    pictures: int = 4
    """Predicted frames shown in TensorBoard."""

    def __post_init__(self) -> None:
        require_positive(self, "clips", "targets", "num_steps")
        if self.rollout < 0 or self.every < 0:
            raise ValueError(f"every and rollout must be 0 or above, got {self.every} and {self.rollout}")
        if self.budget < 2:
            raise ValueError(f"budget must be at least 2, got {self.budget}: the newest frame and another")


@dataclass(frozen=True)
class HostTraining:
    """Everything that determines the trained host."""

    RENAMED: ClassVar[dict[str, str]] = {"worlds": "sources"}

    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    """Training of the autoencoder, the first stage."""
    transformer: TransformerTraining = field(default_factory=TransformerTraining)
    """Training of the transformer, the second stage."""
    sources: Annotated[tuple[Source, ...] | dict[str, float], _ON_THE_COMMAND_LINE] = (Source("pan"), Source("cuts"))
    """Worlds and folders to train on: a list of names, a mapping of names to shares, or a list of mappings with the keys of
    `Source`."""
    start_from: str | None = None
    """A host (shipped, or a folder) whose autoencoder is reused and whose transformer initialises this one."""
    autoencoder_from: str | None = None
    """A host, or a released autoencoder such as dcae_ucf101_64, whose autoencoder is used unchanged; the transformer is new."""
    autoencoder_of: str | None = None
    """The shipped host that contains this autoencoder; its file is then not written again."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    frame_size: int = 64
    """Side of the host's square frames in pixels. Worlds have 64; recordings are resized."""
    run_dir: str = "runs/host"
    """Folder of checkpoints, encoded clips and TensorBoard logs; the same command resumes from here."""
    latents_dir: str | None = None
    """Folder of encoded clips, by default in run_dir; runs with the same autoencoder may share it."""
    output_dir: str = "runs/host/host"
    """Folder of the finished host: weights, config.json and model card."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "auto"
    """float32, bfloat16 or auto."""
    num_steps: int = 4
    """Default number of ODE steps of workloads on this host."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """Next-frame tests while the transformer is trained."""
    quality_clips: int = 256
    """Test clips per world for the model card; 0 skips the measurement."""
    quality_budget: int = 4
    """Frame budget of recent_fill in the model card."""

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "frame_size", "checkpoint_every", "quality_budget")
        object.__setattr__(self, "sources", _sources(self.sources))
        if not self.sources:
            raise ValueError("sources is empty; name a world or a folder of videos")
        names = [source.clips for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"sources: {twice[0]} is named twice; give it one larger share")
