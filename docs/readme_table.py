"""Write the table of results in README.md from RESULTS.md, after `far-env reproduce --all` has measured that again.

python docs/readme_table.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from far_env import baselines
from far_env.agents.reproduce import put_section, read_results
from far_env.io import write_text
from far_env.policies import FULL_HISTORY
from far_env.text import markdown_lines

ROOT = Path(__file__).parent.parent
SECTION = "results"
COLUMNS = (("headline", "pan", 4), ("cuts", "cuts", 4), ("orbit", "orbit", 8), ("maze", "maze_retrieval", 8))
"""Table of RESULTS.md, workload and budget of each column."""
LEARNED = "pretrained/general"
SPECIALISED = "pretrained/orbit"
TUNED = " tuned"
RULES: dict[str, Callable[[baselines.BaselineInfo], bool]] = {
    "best rule that reads latents": lambda rule: rule.tier == "L",
    "best rule with the inputs of the learned policy": lambda rule: rule.tier == "M",
    "best rule of these without a memory of earlier calls": lambda rule: rule.tier == "M" and rule.family != "tracker",
}


def readme_table(results: str) -> str:
    """The table in Markdown: full history, the learned policies, and the best rule of each kind in each column.

    Args:
        results: the content of RESULTS.md.

    Raises:
        ValueError: if a table, or a policy in it, is missing.
    """
    cells = [psnr_cells(results, *column) for column in COLUMNS]
    rows = [["policy", *(f"`{workload}`, budget {budget}" for _, workload, budget in COLUMNS)]]
    shown = {"nothing dropped": FULL_HISTORY, "learned, one policy for all": LEARNED, "learned, for orbit alone": SPECIALISED}
    for label, policy in shown.items():
        rows.append([f"{label}: `{policy}`", *(column.get(policy, "") for column in cells)])
    for label, belongs in RULES.items():
        best = [max((name for name in column if _is_rule(name, belongs)), key=_mean(column)) for column in cells]
        names = ", ".join(f"`{policy}`" + " (tuned)" * bool(tuned) for policy, tuned, _ in (n.partition(TUNED) for n in best))
        rows.append([f"{label}: {names}", *(column[name] for column, name in zip(cells, best, strict=True))])
    return markdown_lines(rows)


def psnr_cells(results: str, table: str, workload: str, budget: int) -> dict[str, str]:
    """Policy → its PSNR with interval, as written, in one workload and budget of a table of RESULTS.md.

    The form of a rule that is tuned on validation clips has `TUNED` behind its name.

    Raises:
        ValueError: if they are not there.
    """
    section = results.partition(f"<!-- begin {table} -->")[2].partition(f"<!-- end {table} -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    cells = {}
    for place, size, policies, psnr, *_ in lines:
        if (place, size) == (workload, str(budget)):
            cells |= {label.split()[0] + TUNED * (TUNED in label): psnr for label in policies.split(" = ")}
    if not {FULL_HISTORY, LEARNED} <= cells.keys():
        raise ValueError(f"RESULTS.md has no {FULL_HISTORY} and {LEARNED} on {workload} {budget} in the table {table}")
    return cells


def _is_rule(name: str, belongs: Callable[[baselines.BaselineInfo], bool]) -> bool:
    policy = name.removesuffix(TUNED)
    return policy in baselines.names() and belongs(baselines.info(policy))


def _mean(cells: dict[str, str]) -> Callable[[str], float]:
    return lambda policy: float(cells[policy].split()[0])


def main() -> None:
    """Replace the table in README.md."""
    readme, table = ROOT / "README.md", readme_table(read_results(ROOT / "RESULTS.md"))
    write_text(readme, put_section(read_results(readme), SECTION, table))
    print(f"{table}\n\nwrote the table into {readme}")


if __name__ == "__main__":
    main()
