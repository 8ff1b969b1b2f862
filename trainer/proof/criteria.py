"""What the recipe `proof` has to show. The criteria were fixed before it was run; `measure` checks them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Rows = Mapping[str, Mapping[str, float | None]]
"""Figures by column (see `evaluate.ALL_COLUMNS`) of one run's images or clips."""


@dataclass(frozen=True)
class Criterion:
    """`figure` of one column divided by the same figure of another must be at most, or at least, `bound`.

    A kind of sample (image, video) that does not have the figure is left out.
    """

    name: str
    figure: str
    column: str
    against: str
    side: Literal["at most", "at least"]
    bound: float

    def ratio(self, rows: Rows) -> float | None:
        """The ratio of the two columns; None if a figure is missing or the denominator is 0."""
        own, other = rows[self.column].get(self.figure), rows[self.against].get(self.figure)
        return None if own is None or not other else own / other

    def holds(self, ratio: float) -> bool:
        return ratio <= self.bound if self.side == "at most" else ratio >= self.bound


CRITERIA = (
    Criterion(
        "a1: nearer to real samples than the distilled model", "fd", "apt_1", "distilled_1", "at most", 0.80
    ),
    Criterion("a2: the same by patch", "patch_fd", "apt_1", "distilled_1", "at most", 0.75),
    Criterion(
        "a3: keeps two thirds of its structure", "structure", "apt_1", "distilled_1", "at least", 2 / 3
    ),
    Criterion(
        "b1: nearer than the base's steps at the paper's guidance",
        "fd",
        "apt_1",
        "base_25_cfg7.5",
        "at most",
        1.0,
    ),
    Criterion("b2: the same by patch", "patch_fd", "apt_1", "base_25_cfg7.5", "at most", 1.0),
    Criterion("c: as sharp as the VAE allows", "sharpness", "apt_1", "real_vae", "at least", 0.95),
    Criterion(
        "d1: things travel as far as in the distilled model's clips",
        "motion",
        "apt_1",
        "distilled_1",
        "at least",
        1.0,
    ),
    Criterion(
        "d2: and as often where they are told to",
        "alignment_direction",
        "apt_1",
        "distilled_1",
        "at least",
        1.0,
    ),
    Criterion("e: two steps restore structure", "structure", "apt_2", "distilled_1", "at least", 1.0),
)
"""Criterion (f), that training collapses without aR1, is row `no_ar1` of `ablate`. Never change the bounds
after a run: a criterion that does not hold is reported as failed.
"""


def check(by_run: Sequence[Rows]) -> list[dict]:
    """One row per criterion: what it asks for, the ratio in each run, and in how many runs it holds.

    Criteria without figures in any run are left out.
    """
    out = []
    for criterion in CRITERIA:
        known = [ratio for rows in by_run if (ratio := criterion.ratio(rows)) is not None]
        if known:
            asked = (
                f"{criterion.figure} of {criterion.column} / {criterion.against} {criterion.side} "
                f"{criterion.bound:.3g}"
            )
            out.append(
                {
                    "name": criterion.name,
                    "asked": asked,
                    "ratios": [round(ratio, 4) for ratio in known],
                    "holds": sum(map(criterion.holds, known)),
                    "runs": len(known),
                }
            )
    return out
