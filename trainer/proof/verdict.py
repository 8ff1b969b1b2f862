"""Decide whether an ablation's figures confirm a claim: one rule for all claims, applied over the seeds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
HOLDS, DOES_NOT, CANNOT_TELL, NO_CLAIM = "holds here", "does not", "cannot be told", "no claim"
RULE = (
    "A test compares one figure of two rows, seed by seed: d is this row's figure minus the other row's. "
    f"It looks at the {CONFIDENCE:.0%} interval of d's mean over the seeds (Student's t). "
    "If the whole interval is "
    "on the claimed side of 0, the test holds; if it is on the other side, it does not. "
    "If 0 is inside, or there "
    "are fewer than two seeds, it cannot be told. Some figures are a share of the samples. "
    "Two seeds may agree on "
    "one by luck, so its interval is never narrower than the number of samples allows (normal "
    "approximation). "
    "A claim holds if all its tests hold. It does not if one of them does not. Otherwise it cannot be told."
)


SHARES = ("structure", "alignment", "diversity")
"""Figures that are a share of a row's samples."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `seeds` seeds. half: half the width of its interval; None for fewer than two seeds."""

    mean: float
    half: float | None
    seeds: int

    def side(self) -> int:
        """1 if the whole interval is above 0, -1 if it is below, otherwise 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the confidence interval of the mean (Student's t with n - 1 degrees of freedom).

    None for fewer than two values.
    """
    n = len(values)
    return (
        float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
    )


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and interval of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return Estimate(float(np.mean(known)), half_width(known), len(known)) if known else None


def difference(
    one: Mapping[int, Mapping], other: Mapping[int, Mapping], figure: str, samples: int | None = None
) -> Estimate | None:
    """The difference of one figure, `one` minus `other`, over the seeds for which both rows have it.

    one, other: figures by seed; None if no seed has both.
    samples: how many samples each row was judged on. If given, the interval of a share (SHARES) is at least
    as wide as that many samples leave it, with the two rows taken as independent.
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
    """What a difference says about the claim that it is above (sign 1) or below (sign -1) 0."""
    side = found.side() * sign if found else 0
    return {1: HOLDS, -1: DOES_NOT, 0: CANNOT_TELL}[side]


def verdict(outcomes: Sequence[str]) -> str:
    """The verdict on a claim from the outcomes of its tests; NO_CLAIM if it has none."""
    if not outcomes:
        return NO_CLAIM
    if DOES_NOT in outcomes:
        return DOES_NOT
    return HOLDS if all(found == HOLDS for found in outcomes) else CANNOT_TELL
