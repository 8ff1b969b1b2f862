"""Summarise an ablation over its seeds: means, intervals, differences to the reference, and verdicts."""

from collections.abc import Mapping

from .variants import REFERENCE, Variant
from .verdict import CONFIDENCE, RULE, Estimate, difference, estimate, outcome, verdict

FIGURES = {
    "fd": "Fréchet distance, less is better",
    "patch_fd": "Fréchet distance of patches, less is better",
    "sharpness": "sharpness against real, 1 is real",
    "structure": "one whole object, more is better",
    "alignment": "text alignment, more is better",
    "diversity": "diversity (coverage of real), more is better",
    "motion": "motion of the object, in clips",
    "d_adversarial": "the discriminator's loss at the end (1.386: it tells nothing)",
}


def table(
    variants: Mapping[str, Variant], rows: Mapping[str, Mapping[int, Mapping]], samples: int | None = None
) -> dict:
    """The rows of ablations.json.

    rows: by variant and seed, {"figures": {...}, "failed": why the training broke off, or None}.
    samples: how many samples each row was judged on (see `verdict.difference`).
    Each variant gets its figures and their differences to the reference, as {mean, half, seeds} with half the
    width of the interval (None for one seed), and by_seed, failed, tests and verdict.
    """
    figures = {
        name: {seed: row["figures"] for seed, row in by_seed.items()} for name, by_seed in rows.items()
    }
    out = {}
    for name, variant in variants.items():
        seen = [
            figure for figure in FIGURES if any(row.get(figure) is not None for row in figures[name].values())
        ]
        tests = []
        for test in variant.tests:
            found = difference(figures[name], figures[test.against], test.figure, samples)
            tests.append(
                {
                    "figure": test.figure,
                    "claimed": "more" if test.sign > 0 else "less",
                    "against": test.against,
                    "difference": _plain(found),
                    "outcome": outcome(found, test.sign),
                }
            )
        out[name] = {
            "what": variant.what,
            "claim": variant.claim,
            "section": variant.section,
            "verdict": verdict([test["outcome"] for test in tests]),
            "tests": tests,
            "figures": {
                figure: _plain(estimate(row.get(figure) for row in figures[name].values())) for figure in seen
            },
            "difference": {
                figure: _plain(difference(figures[name], figures[REFERENCE], figure, samples))
                for figure in seen
            },
            "by_seed": {str(seed): row for seed, row in figures[name].items()},
            "failed": {str(seed): row["failed"] for seed, row in rows[name].items() if row.get("failed")},
            "settings": next((row.get("settings") for row in rows[name].values()), None),
            **({"stage1": dict(variant.stage1)} if variant.stage1 else {}),
        }
    return {"rule": RULE, "confidence": CONFIDENCE, "figures": FIGURES, "rows": out}


def _plain(found: Estimate | None) -> dict | None:
    if found is None:
        return None
    return {
        "mean": round(found.mean, 6),
        "half": None if found.half is None else round(found.half, 6),
        "seeds": found.seeds,
    }
