"""The options of the commands in `far_env.agents.commands`. No torch in here, so that ``--help`` is fast."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field, fields

import tyro

from far_env.agents.config import AgentTraining
from far_env.config import require_positive
from far_env.errors import unknown_name

RANGE_KEYS = ("low", "high", "log", "choices")


@dataclass(frozen=True)
class TrainOptions(AgentTraining):
    """Settings of a training run, and what the command alone takes."""

    dry_run: bool = False
    """Check everything that is checked before a run, print what it will cost (clips, rollouts, frames, operations, memory,
    disk, hours), and end without writing."""
    tflops: float | None = None
    """With --dry-run: 10^12 operations per second that the device reaches on this host; by default a short matrix product is
    timed on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tflops is not None:
            require_positive(self, "tflops")
            if not self.dry_run:
                raise ValueError("tflops is for the estimate of --dry-run; add that, or leave tflops out")

    @property
    def settings(self) -> AgentTraining:
        """Those of the run."""
        return AgentTraining(**{field.name: getattr(self, field.name) for field in fields(AgentTraining)})


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained policy as one self-contained Python file for the benchmark."""

    run: tyro.conf.Positional[str]
    """Run folder of far-env train, pretrained/NAME for a shipped policy, or hub:USER/NAME[@REVISION]."""
    out: str = "policy.py"
    """File to write."""


@dataclass(frozen=True)
class PublishOptions:
    """Publish a finished run as the pretrained policy pretrained/NAME, with a model card. Replaces one of the same name."""

    run: tyro.conf.Positional[str]
    """Run folder of far-env train."""
    name: tyro.conf.Positional[str]
    """Name of the policy: lower-case letters, digits and hyphens."""


@dataclass(frozen=True)
class PushOptions:
    """Share a finished run, a host or results as a repository on the Hugging Face hub, under the name hub:USER/NAME.

    A policy is pushed as settings, safetensors, a card with its scores, and its exported file where it can be exported.
    HF_TOKEN must hold a token that may write.
    """

    folder: tyro.conf.Positional[str]
    """Run folder of far-env train, pretrained/NAME, folder of a host, or results folder of far-env evaluate."""
    to: str
    """hub:USER/NAME; the repository is made if there is none."""
    private: bool = False
    """Make a new repository private."""


@dataclass(frozen=True)
class Sweep:
    """Search settings of a training run by their score on validation clips, with Optuna.

    Trials are recorded in a database in the sweep's folder, each trains in its run folder there, and a stopped sweep is resumed
    by the same command. Test clips are not used. best.yaml is the best trial's configuration, for far-env train.
    """

    base: str = "pan_tight"
    """Configuration of far-env train, a path or a shipped name; settings that are not searched keep its values."""
    run_dir: str = "runs/sweep"
    """Folder of the sweep."""
    trials: int = 20
    """Training runs in total, those of earlier sessions included."""
    seed: int = 0
    """Seed of the search (a tree-structured Parzen estimator)."""
    search: dict = field(default_factory=dict)
    """Setting, such as ppo.learning_rate → {low, high, log} or {choices}; whole numbers where low and high are."""

    def __post_init__(self) -> None:
        require_positive(self, "trials")
        if not self.search:
            raise ValueError("a sweep needs something to search: give settings and their ranges under search")
        for name, given in self.search.items():
            if not isinstance(given, dict) or not ("choices" in given) ^ {"low", "high"}.issubset(given):
                raise ValueError(f"search: {name} needs either low and high, or choices; got {reprlib.repr(given)}")
            if not isinstance(name, str):
                raise ValueError(f"search: {reprlib.repr(name)} is no setting; give names such as ppo.learning_rate")
            if "choices" in given and (not isinstance(given["choices"], list) or not given["choices"]):
                raise ValueError(
                    f"search: {name}: choices needs a list of one value or more, got {reprlib.repr(given['choices'])}"
                )
            ends = [given[key] for key in ("low", "high") if key in given]
            numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
            if not numbers or any(abs(end) > 1e300 or end != end for end in ends) or (len(ends) == 2 and ends[0] > ends[1]):
                raise ValueError(
                    f"search: {name}: low and high need two finite numbers, the lower first, got {reprlib.repr(ends)}"
                )
            if given.get("log") and any(end <= 0 for end in ends):
                raise ValueError(f"search: {name}: low and high must be above 0 with log, got {reprlib.repr(ends)}")
            for key in given:
                if key not in RANGE_KEYS:
                    raise ValueError(f"search: {name}: {unknown_name('key', key, RANGE_KEYS)}")


@dataclass(frozen=True)
class RegretOptions:
    """Measure the regret of policies against beam searches that use the true frames of the clip.

    The best rollout that any of the searches found for a clip is a lower bound of what is possible; a policy's regret is the
    PSNR of that rollout minus its PSNR, clip by clip. The table is printed and written into the results file.
    """

    workload: str = "pan"
    """A registered workload."""
    budget: int = 4
    """Frames that may be kept."""
    clips: int = 64
    """Number of test clips, from the first on."""
    searches: tuple[str, ...] = ("1x1", "3x3")
    """Width × branches of each search, see `far_env.agents.oracle.search`; 1x1 is the hindsight expert alone."""
    policies: tuple[str, ...] = ("recent_fill", "uniform", "nearest_neighbour", "pretrained/general", "full_history")
    """Policies whose regret is measured."""
    out: str = "RESULTS.md"
    """File whose section for this table is replaced, or added."""
    host: str | None = None
    """A host by name or folder; by default the workload's."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: str = "float32"
    """float32, bfloat16 or auto."""
    feedback: str | None = None
    """generated, or true: the true frame enters the history in place of each generated one; by default the workload's."""
    batch_size: int = 16
    """Clips searched together."""

    def __post_init__(self) -> None:
        require_positive(self, "clips", "batch_size")
        self.widths()

    def widths(self) -> dict[str, tuple[int, int]]:
        """Search → width and branches. Raises ValueError on one that is not WIDTHxBRANCHES."""
        parsed = {}
        for name in self.searches:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
                raise ValueError(f"a search is WIDTHxBRANCHES, such as 3x3, got {name!r}")
            width, branches = map(int, name.split("x"))
            parsed[name] = (width, branches)
        return parsed


@dataclass(frozen=True)
class LearningCurveOptions:
    """Draw the validation scores of runs over the decisions learned from; the runs must be validated by the same metric."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of far-env train."""
    out: str = "curves.png"
    """File to write, .png or .svg."""


@dataclass(frozen=True)
class ReproduceOptions:
    """Measure tables of RESULTS.md again and replace them in it; without a table, list the tables and their costs."""

    tables: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of tables."""
    all: bool = False
    """All tables, from one commit: a changed source tree and episodes of another commit are refused."""
    from_scratch: bool = False
    """First train the tables' shipped policies again, in run folders, and compare those. Policies that are not shipped are
    trained in any case, where their run folder holds none."""
    clips: int | None = None
    """At most this many clips, for a quick estimate; the table states its number of clips."""
    file: str = "results"
    """File that describes the tables, a path or the name of a shipped one."""
    out: str = "RESULTS.md"
    """File whose sections for these tables are replaced, or added."""
    episodes: str = "runs/reproduce"
    """Folder of the episodes, with a subfolder per table; the same command resumes where it stopped."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    batch_size: int = 64
    """Clips that are played together."""
