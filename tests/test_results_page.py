"""The figures of the proof in docs/results.md are those of the file that `measure` wrote."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PROOF = json.loads((DOCS / "results" / "proof-2026-11-26.json").read_text(encoding="utf-8"))
PARTS = {"Images:": "image_columns", "Clips (9 frames):": "columns"}


def tables(title: str, page: str) -> tuple[list[list[str]], list[list[str]]]:
    """The two tables below a title, figures and criteria, each a list of rows with the head first."""
    below = page.partition(f"\n{title}\n\n")[2].split("\n\n")
    return tuple(
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()
            if not line.startswith("|---")
        ]
        for table in below[:2]
    )


def untrue(title: str, page: str) -> list[tuple]:
    """What the tables below a title say that the file does not."""
    figures, criteria = tables(title, page)
    key, found = PARTS[title], []
    for row, *cells in figures[1:]:
        for column, cell in zip(figures[0][1:], cells, strict=True):
            mean, _, half = cell.partition(" ± ")
            digits = len(mean.partition(".")[2])
            if mean != f"{PROOF[key][row][column]:.{digits}f}":
                found.append((row, column, cell))
            if half and half != f"{PROOF[f'{key}_interval'][row][column]:.2f}":
                found.append((row, column, cell))
    for (name, asked, ratios, holds), true in zip(criteria[1:], PROOF[f"{key}_criteria"], strict=True):
        words = f"{true['name'].partition(': ')[2]}: {true['asked']}"
        wanted = [
            true["name"].partition(":")[0],
            words,
            ", ".join(f"{ratio:.2f}" for ratio in true["ratios"]),
            f"{true['holds']} of {true['runs']}",
        ]
        if [name, asked, ratios, holds] != wanted:
            found.append((name, asked, ratios, holds))
    return found


@pytest.mark.parametrize("title", PARTS)
def test_the_tables_of_the_proof_say_what_was_measured(title):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    figures, criteria = tables(title, page)
    assert len(figures) == 10 and len(criteria) >= 8
    assert untrue(title, page) == []


@pytest.mark.parametrize("title", PARTS)
def test_a_wrong_digit_is_noticed(title):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    before, start, below = page.partition(f"\n{title}\n")
    for pattern in (r"(apt_1 \| )\d", r"(± 0\.)\d\d", r"(at most 0\.8 \| 0\.)\d", r"(\| )\d( of 3)"):
        changed = re.sub(
            pattern, lambda found: f"{found[1]}5{found[2] if found.re.groups > 1 else ''}", below, count=1
        )
        assert len(untrue(title, before + start + changed)) == 1


ROUNDED = {
    "fd": 2,
    "patch_fd": 2,
    "sharpness": 2,
    "structure": 2,
    "alignment": 2,
    "diversity": 2,
    "motion": 1,
}
STAGE_1 = {
    "the base in 25 Euler steps, guidance 2": "base",
    "after consistency distillation": "distilled",
    "after distribution matching": "distilled_dmd",
    "the first, and then stage 2": "paper",
    "the second, and then stage 2": "stage1_dmd",
}


def rows_of(file: str) -> dict[str, dict]:
    return json.loads((DOCS / "results" / f"{file}-2026-11-26.json").read_text(encoding="utf-8"))["rows"]


def cells_of(page: str, head: str) -> list[list[str]]:
    """The rows of the table whose head begins so, without the head."""
    table = page.partition(f"\n{head}")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def rounded(figures: dict, names: dict[str, int]) -> list[str]:
    return [f"{figures[name]['mean']:.{n}f}" if name in figures else "" for name, n in names.items()]


def untrue_ablations(page: str) -> list[str]:
    """The rows of the ablations that say something else than the files of three seeds, or of seed 0."""
    rows, found = rows_of("ablations") | rows_of("ablations-three-seeds"), []
    for cells in cells_of(page, "| row | what it changes |"):
        row = rows[cells[0].strip("`")]
        seeds = [f"{row['by_seed'][seed]['fd']:.2f}" for seed in sorted(row["by_seed"])]
        names = {name: 2 for name in list(ROUNDED)[1:6]} | {"d_adversarial": 2}
        said = [row["what"], ", ".join(seeds), *rounded(row["figures"], names)]
        said += [row["claim"], row["verdict"]] if row["claim"] else ["", ""]
        found += [cells[0]] if said != cells[1:] else []
    return found


def untrue_stage_1(page: str) -> list[str]:
    """The rows of the comparison of the two methods of stage 1 that the files do not have."""
    rows = {
        "images": rows_of("ablation-stage1-image"),
        "clips": rows_of("ablation-stage1-video"),
    }
    page = page.partition("\n## Stage 1 by distribution matching\n")[2]
    table = cells_of(page, "| | fd | patch_fd |")
    assert len(table) == 2 * len(STAGE_1)
    found = []
    for name, *cells in table:
        kind, _, what = name.partition(": ")
        if rounded(rows[kind][STAGE_1[what]]["figures"], ROUNDED) != cells:
            found.append(name)
    return found


def test_the_tables_of_the_ablations_say_what_was_measured():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert len(cells_of(page, "| row | what it changes |")) > 20
    assert untrue_ablations(page) == []
    assert untrue_ablations(page.replace("| 2.69, 2.91, 2.33 |", "| 2.69, 2.91, 2.34 |")) == ["`no_ar1`"]
    assert untrue_stage_1(page) == []
    assert untrue_stage_1(page.replace("| 3.19 | 1.83 |", "| 3.18 | 1.83 |")) == [
        "images: after distribution matching"
    ]
