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
