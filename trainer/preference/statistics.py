"""Evaluate a matrix of votes: the paper's score (section 4.2), its interval, and the raters' agreement."""

from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE, RESAMPLES, SEED = 0.95, 10_000, 0
CHUNK = 500


@dataclass(frozen=True)
class Score:
    """The result of one question. good, same, bad: number of votes for A, for neither and for B.

    score: (good - bad) / all, from -1 to 1; low, high: the ends of its interval; agreement: Krippendorff's
    alpha. None if there are too few votes to tell."""

    good: int
    same: int
    bad: int
    score: float | None
    low: float | None
    high: float | None
    agreement: float | None

    def json(self) -> dict:
        return asdict(self)


def score(values: np.ndarray) -> Score:
    """Score the votes `[raters, pairs]`: 1 if A is better, 0 for the same, -1 if B is better, NaN if none."""
    good, same, bad = (int((values == value).sum()) for value in (1, 0, -1))
    votes = good + same + bad
    interval = bootstrap(values) or (None, None)
    return Score(
        good, same, bad, (good - bad) / votes if votes else None, *interval, alpha(values, "ordinal")
    )


def bootstrap(
    values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of the votes `[raters, pairs]` (NaN: no vote).

    It resamples pairs, each with all its votes, because votes on one pair are not independent.
    None for fewer than two pairs with votes."""
    there = ~np.isnan(values)
    sums, counts = np.where(there, values, 0).sum(0), there.sum(0)
    sums, counts = sums[counts > 0], counts[counts > 0]
    n = len(counts)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, CHUNK):
        drawn = rng.integers(n, size=(min(CHUNK, resamples - start), n))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def alpha(values: np.ndarray, metric: str = "ordinal") -> float | None:
    """Krippendorff's alpha of values `[raters, units]` (NaN: no value).

    1 is perfect agreement, 0 is chance, and below 0 is worse than chance. metric: "nominal", "ordinal" or
    "interval" (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011).
    None if no unit has two values, and if all values are equal, because chance would then agree as well.
    """
    values = values[:, (~np.isnan(values)).sum(0) >= 2]
    levels = np.unique(values[~np.isnan(values)])
    if len(levels) < 2:
        return None
    counts = (values[None] == levels[:, None, None]).sum(1).astype(float)  # [levels, units]
    many = counts.sum(0)
    weighted = counts / (many - 1)
    observed = weighted @ counts.T - np.diag(weighted.sum(1))  # coincidence matrix
    margin = observed.sum(1)
    total = margin.sum()
    expected = (np.outer(margin, margin) - np.diag(margin)) / (total - 1)
    distance = _distances(levels, margin, metric)
    return float(1 - (observed * distance).sum() / (expected * distance).sum())


def _distances(levels: np.ndarray, margin: np.ndarray, metric: str) -> np.ndarray:
    """Squared distances between all levels."""
    if metric == "nominal":
        return 1.0 - np.eye(len(levels))
    if metric == "interval":
        return (levels[:, None] - levels) ** 2
    if metric == "ordinal":
        place = np.cumsum(margin) - margin / 2  # how many values lie before each level's middle
        return (place[:, None] - place) ** 2
    raise ValueError(f"there is no metric {metric!r}")
