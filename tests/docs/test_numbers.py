"""Numbers in the README, the pages and the cards agree with RESULTS.md, which alone is measured again."""

from __future__ import annotations

import hashlib
import re

import pytest
import yaml

from tests.docs.blocks import CARDS, PAGES, ROOT, generator

CELL = re.compile(r"([+-]?\d+\.\d+) \[([+-]?\d+\.\d+), ([+-]?\d+\.\d+)\]")
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
POLICY_CARDS = [card for card in CARDS if card.parent.parent.name == "pretrained"]
REPORTED_CARDS = [card for card in POLICY_CARDS if f"- pretrained/{card.parent.name}: " in RESULTS]
HOST_CARDS = [card for card in CARDS if card not in POLICY_CARDS]


def rows(markdown: str) -> list[list[str]]:
    """The cells of all rows of a page's tables."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not set(line) <= set("|-: ")]


def measured(markdown: str) -> dict[tuple[str, str, str], list[str]]:
    """(workload, budget, policy) → the PSNR cells of the tables that `markdown_table` has written."""
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in rows(markdown):
        if len(row) >= 5 and row[1].isdigit():
            for policy in row[2].split(" = "):
                cells.setdefault((row[0], row[1], policy), []).append(row[3])
    return cells


def section_of(table: str) -> str:
    """The text between the marks of a table of RESULTS.md."""
    return RESULTS.partition(f"<!-- begin {table} -->\n")[2].partition(f"\n<!-- end {table} -->")[0]


def psnr_cells(markdown: str) -> list[str]:
    """The cells of PSNR, also of frames that were exchanged, and of its differences, in the tables of reproduce and regret."""
    cells, columns = [], []
    for row in rows(markdown):
        if row[0] in ("workload", "policy"):
            columns = [place for place, name in enumerate(row) if "PSNR" in name]
        else:
            cells += [row[place] for place in columns if CELL.fullmatch(row[place])]
    return cells


def interval(cell: str) -> tuple[float, float, float]:
    return tuple(map(float, CELL.fullmatch(cell).groups()))


def overlap(first: str, second: str) -> bool:
    (_, low, high), (_, other_low, other_high) = interval(first), interval(second)
    return low <= other_high and other_low <= high


def test_the_table_of_the_readme_is_that_of_the_results():
    table = rows(README)
    columns = [re.fullmatch(r"`(\w+)`, budget (\d+)", name).groups() for name in table[0][1:]]
    for label, *cells in table[1:]:
        names = re.findall(r"`([\w/-]+)`( \(tuned\))?", label)
        names = names * len(columns) if len(names) == 1 else names
        assert any(cells) and (all(cells) or "alone" in label)
        for (workload, budget), (policy, tuned), cell in zip(columns, names, cells, strict=True):
            if not cell:
                continue
            policy = f"{policy} tuned on {workload} {budget}" if tuned else policy
            assert cell in measured(RESULTS)[workload, budget, policy], (policy, workload)


def test_the_table_of_the_readme_is_what_its_program_writes():
    table = README.partition("<!-- begin results -->\n")[2].partition("\n<!-- end results -->")[0]
    assert table == generator("readme_table").readme_table(RESULTS)


def test_the_program_of_the_readme_names_a_table_that_is_missing():
    with pytest.raises(ValueError, match=r"RESULTS\.md has no full_history and pretrained/general on cuts 4 in the table cuts"):
        generator("readme_table").readme_table(RESULTS.replace("<!-- begin cuts -->", ""))


def test_the_best_rules_of_the_readme_are_the_best():
    """The rows that claim the best rule of a tier name the highest PSNR of the table of that workload, tuned forms included."""
    reads_latents = {"nearest_neighbour", "least_novel", "k_center", "latent_ri", "keepsake"}
    remembers = {"path_tracker", "scene_tracker"}
    for label, *_ in rows(README):
        if not label.startswith("best rule"):
            continue
        excluded = remembers if "without a memory" in label else set()
        tables = [("headline", "pan"), ("cuts", "cuts"), ("orbit", "orbit"), ("maze", "maze_retrieval")]
        for (table, workload), (named, tuned) in zip(tables, re.findall(r"`(\w+)`( \(tuned\))?", label), strict=True):
            rules = {
                policy: interval(cell)[0]
                for (name, _, policy), (cell,) in measured(section_of(table)).items()
                if name == workload
                and "/" not in policy
                and not policy.startswith(("full_history", "partition"))
                and (policy.split()[0] in reads_latents) == ("latents" in label)
                and policy.split()[0] not in excluded
            }
            best = max(rules, key=rules.get)
            assert (named, bool(tuned)) == (best.split()[0], " tuned on " in best), (workload, label)


def test_the_training_table_of_the_readme_is_that_of_its_configuration():
    """It is of half as many clips as in RESULTS.md, and in bfloat16, which changes a mean by about 0.2 dB (docs/scaling.md)."""
    config = yaml.safe_load((ROOT / "configs/pan_tight.yaml").read_text(encoding="utf-8"))
    printed = {name: float(psnr) for name, psnr in re.findall(r"^(\w+) +(\d+\.\d+)  \d\.\d+", README, re.MULTILINE)}
    assert printed.keys() == {"learned", *config["table"]}
    results = {name: measured(RESULTS).get((config["workload"], str(config["budget"]), name)) for name in config["table"]}
    assert sum(map(bool, results.values())) >= 3
    assert f"{config['workload']}, budget {config['budget']}, {config['test_clips']} test clips" in README
    for name in filter(results.get, results):
        low, high = interval(results[name][0])[1:]
        assert low - (high - low) - 0.2 <= printed[name] <= high + (high - low) + 0.2, name


@pytest.mark.parametrize("card", REPORTED_CARDS, ids=lambda card: card.parent.name)
def test_a_policy_card_agrees_with_the_results(card):
    """Cards are measured in bfloat16 on fewer clips, so their intervals overlap with those of RESULTS.md."""
    results, card_cells = measured(RESULTS), measured(card.read_text(encoding="utf-8"))
    shared = card_cells.keys() & results.keys()
    assert any(policy == f"pretrained/{card.parent.name}" for _, _, policy in shared)
    for key in shared:
        assert all(overlap(cell, other) for cell in card_cells[key] for other in results[key]), key


@pytest.mark.parametrize("card", POLICY_CARDS, ids=lambda card: card.parent.name)
def test_a_policy_card_and_the_results_name_the_weights_that_ship(card):
    digest = hashlib.sha256((card.parent / "policy.safetensors").read_bytes()).hexdigest()
    assert digest in card.read_text(encoding="utf-8")
    if card not in REPORTED_CARDS:
        return
    named = set(re.findall(rf"^- pretrained/{card.parent.name}: .*weights (\w+)\.$", RESULTS, re.MULTILINE))
    assert named == {digest[:8]}


def test_the_results_have_the_captions_policies_and_commands_of_the_configuration():
    config = yaml.safe_load((ROOT / "configs/results.yaml").read_text(encoding="utf-8"))
    for name, table in config["tables"].items():
        section = section_of(name)
        assert section.startswith(f"## {name}\n\n{table['caption'].strip()}\n\n|"), name
        labels = {label.partition(" (")[0] for row in rows(section)[1:] for label in row[2].split(" = ")}
        tuned = {
            f"{rule} tuned on {workload} {budget}"
            for part in table["parts"]
            for rule in part.get("tune", ())
            for workload in part["workloads"]
            for budget in part["budgets"]
        }
        assert labels == {policy for part in table["parts"] for policy in part["policies"]} | tuned
        trained = r"^- (\S+): trained on .* by `python train_agent.py (.*)`(?: at commit \w+)?; weights \w+\.$"
        commands = dict(re.findall(trained, section, re.M))
        assert commands == {policy: config["agents"][policy] for policy in commands}
        members = {policy for row in table.get("runs", {}).values() for policy in row}
        assert commands.keys() == (labels | members) & config["agents"].keys(), name


@pytest.mark.parametrize("card", HOST_CARDS, ids=lambda card: card.parent.name)
def test_a_host_card_agrees_with_the_results(card):
    """Cards are of about as many other clips: the means differ by at most the 99.9 % interval of such a difference."""
    text = card.read_text(encoding="utf-8")
    weights = re.search(r"hash (\w{8})", text)[1]
    assert f"({weights})" in RESULTS
    results = measured(RESULTS)
    head, *table = rows(text.partition("## Next frame")[0])
    budget = re.search(r"budget (\d+)", head[3])[1]
    for world, _, full_history, recent_fill in table:
        for policy, value in (("full_history", full_history), ("recent_fill", recent_fill)):
            cells = [
                cell
                for (workload, size, name), measured_cells in results.items()
                for cell in measured_cells
                if (workload, name) == (world, policy) and (size == budget or name == "full_history")
            ]
            widths = 2**0.5 * 3.29 / 1.96 / 2
            near = [abs(mean - float(value)) <= widths * (high - low) for mean, low, high in map(interval, cells)]
            assert any(near), (world, policy)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_decibels_in_prose_are_in_the_results(page):
    """A number of dB in a sentence is a mean PSNR, or a mean difference, of RESULTS.md, rounded; others are named here."""
    cells = psnr_cells(RESULTS)
    means = [abs(float(cell.partition(" ")[0])) for cell in cells]
    of_the_task = {"40", "3", "21.8", "22.5", "24.7"}  # the last three are on the card that record writes for doom
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).replace("−", "-")
    for number, its_interval in re.findall(r"(\d+(?:\.\d+)?) dB( \[[^]]+\])?", prose):
        decimals = len(number.partition(".")[2])
        if its_interval:
            assert any(cell.lstrip("+-") == number + its_interval for cell in cells), number + its_interval
        else:
            assert number in of_the_task or any(f"{mean:.{decimals}f}" == number for mean in means), number
