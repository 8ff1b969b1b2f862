"""When the figures of an ablation bear a claim out: one rule over seeds for all claims, and nothing by hand."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
HOLDS, DOES_NOT, CANNOT_TELL, NO_CLAIM = "holds here", "does not", "cannot be told", "no claim"
RULE = (
    "A test compares one figure of two rows seed by seed: d is the row's minus the other's. "
    f"Where the {CONFIDENCE:.0%} interval of d's mean over seeds (Student's t) lies on the claimed side of 0, the test holds; where it lies on the other "
    "side, it does not; else, and with fewer than two seeds, it cannot be told. Of a share of the samples the interval is never narrower than "
    "what that many samples leave open (normal approximation): two seeds may lie together by luck. A claim holds when all its tests hold, does not when one of them "
    "does not, and else cannot be told."
)


SHARES = ("structure", "alignment", "diversity")
"""Figures that are shares of the samples of a row."""


@dataclass(frozen=True)
class Estimate:
    """A mean over so many seeds, and half the width of its interval (None for fewer than two)."""

    mean: float
    half: float | None
    seeds: int

    def side(self) -> int:
        """1 or -1 where the whole interval lies above or below 0, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the interval of the values' mean (Student's t with n - 1 degrees of freedom); None
    for fewer than two.
    """
    n = len(values)
    return (
        float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
    )


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and interval of the values that there are; None for none."""
    known = [value for value in values if value is not None]
    return Estimate(float(np.mean(known)), half_width(known), len(known)) if known else None


def difference(
    one: Mapping[int, Mapping], other: Mapping[int, Mapping], figure: str, samples: int | None = None
) -> Estimate | None:
    """Of one figure, from rows of figures by seed: `one` minus `other`, seed by seed, where both have it.

    samples: that each row was judged on. The interval of a share (SHARES) is then at least as wide as that of
    shares of so many samples, taken as independent between the rows.
    """
    pairs = [(one[seed].get(figure), other[seed].get(figure)) for seed in one if seed in other]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    found = estimate(a - b for a, b in known)
    if found is None or found.half is None or not samples or figure not in SHARES:
        return found
    variance = sum(share * (1 - share) for pair in known for share in pair) / samples / len(known) ** 2
    left_open = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * max(variance, 0.0) ** 0.5
    return replace(found, half=max(found.half, left_open))


def outcome(found: Estimate | None, sign: int) -> str:
    """What a difference says of the claim that it is above (sign 1) or below (-1) 0."""
    side = found.side() * sign if found else 0
    return {1: HOLDS, -1: DOES_NOT, 0: CANNOT_TELL}[side]


def verdict(outcomes: Sequence[str]) -> str:
    """Of a claim, from the outcomes of its tests; NO_CLAIM for none."""
    if not outcomes:
        return NO_CLAIM
    if DOES_NOT in outcomes:
        return DOES_NOT
    return HOLDS if all(found == HOLDS for found in outcomes) else CANNOT_TELL
