"""Train without one part of the scorer at a time, with several seeds, and print how good the policies are.

    python docs/ablations.py --out runs/ablations --seeds 3

Each training is that of configs/ablation.yaml but for what its row says; finished ones are not repeated. Policies are compared
in rollouts of test clips, and on worlds that none of them was trained on by copies (docs/compare_copies.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from compare_copies import score

from far_env.agents.checkpoints import WEIGHTS_FILE, load_scorer
from far_env.agents.config import AgentTraining
from far_env.agents.policies import AgentPolicy
from far_env.agents.trainer import learn, opened_run, save_run_scorer
from far_env.config import load_yaml
from far_env.evaluation.evaluate import evaluate
from far_env.text import markdown_lines
from far_env.workloads import make_workload

CONFIG = Path(__file__).parent.parent / "configs" / "ablation.yaml"
WORLDS = ("pan", "cuts", "maze_retrieval", "pan_wide", "cuts_wide", "orbit")
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "without edges": {"network": {"edges": False}},
    "without edge updates": {"network": {"edge_updates": False}},
    "without dropped frames": {"network": {"dropped_frames": False}},
    "without scale normalisation": {"network": {"scaled": False}},
    "without similarities as a second task": {"imitation": {"similarity_weight": 0.0}},
}


@dataclass(frozen=True)
class Options:
    """What is trained and compared."""

    out: Path = Path("runs/ablations")
    """Folder of the runs."""
    seeds: int = 3
    """Trainings of each variant."""
    clips: int = 128
    """Test clips of each table."""
    worlds: bool = False
    """Instead of leaving parts out, train on one world, two, and so on, with the same number of clips."""
    doom: str | None = None
    """Folder of the recorded clips of the workload doom, to compare on them as well."""


def trained(config: AgentTraining, changes: Mapping[str, Any], folder: Path, seed: int) -> AgentPolicy:
    """The policy of a run, trained first unless it is finished."""
    parts = {name: replace(getattr(config, name), **values) for name, values in changes.items() if isinstance(values, dict)}
    others = {name: value for name, value in changes.items() if not isinstance(value, dict)}
    if not (folder / WEIGHTS_FILE).exists():
        with opened_run(replace(config, **parts, **others, seed=seed, run_dir=str(folder))) as run:
            save_run_scorer(run, learn(run))
    return AgentPolicy(load_scorer(folder)[0])


def main(options: Options) -> None:
    """Train, compare, and print a table: means over seeds, and their standard deviations."""
    config = load_yaml(AgentTraining, CONFIG)
    variants = VARIANTS
    if options.worlds:
        variants = {", ".join(WORLDS[:count]): {"workload": ",".join(WORLDS[:count])} for count in (1, 2, 3, len(WORLDS))}
    tests = [(make_workload(name, device="cpu"), 4) for name in ("pan", "cuts")]
    unseen = {"maze, unseen style": make_workload("maze_retrieval", device="cpu")}
    if options.doom:
        unseen["doom"] = make_workload("doom", device="cpu", host="embedded_maze", data_dir=options.doom)
    lines = []
    for number, (name, changes) in enumerate(variants.items()):
        values: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            folder = options.out / f"{'worlds' if options.worlds else 'parts'}_{number}_{seed}"
            policy = trained(config, changes, folder, seed)
            for workload, budget in tests:
                result = evaluate(
                    workload, budget, {"learned": policy}, range(options.clips), metrics=("psnr",), progress=False
                )
                column = values.setdefault(f"{workload.name} {budget}, rollouts", [])
                column.append(float(result.scores["learned"]["psnr"].mean()))
            for label, workload in unseen.items():
                split = "test" if label == "doom" else "test_unseen_style"
                column = values.setdefault(f"{label} 8, copies", [])
                column.append(float(np.mean(score(workload, split, range(options.clips), policy, 8))))
        lines = lines or [["trained", *values]]
        lines.append([name, *(f"{np.mean(column):.2f} ± {np.std(column):.2f}" for column in values.values())])
        print(lines[-1], flush=True)
    about = f"{options.seeds} seeds, {options.clips} test clips, PSNR in dB; ± is the spread over seeds"
    print(f"\n{markdown_lines(lines)}\n\n{about}.")


if __name__ == "__main__":
    main(tyro.cli(Options))
