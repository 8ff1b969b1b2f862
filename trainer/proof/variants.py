"""The variants of stages 1 and 2 that an ablation compares, and the paper's claim on each.

Sections and figures are those of the paper (arXiv 2501.08316).
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from apt_core.errors import AptError
from apt_core.models.wan import PAPER_FRACTIONS
from trainer.config import Adversarial, Preset

REFERENCE = "paper"
UPDATES = (50, 100, 150, 250, 350)
"""At which updates the long run is judged, as in fig. 8."""
SIGMAS = (0.1, 0.3, 3.0)
"""Factors on the recipe's sigma."""
STEPS = (1, 2, 4)
STAGE1 = "dmd"
"""The recipe with the other method for stage 1, at the same compute; it is compared with the reference's."""
MORE, LESS = 1, -1


@dataclass(frozen=True)
class Comparison:
    """A test: the row's figure is above (sign 1) or below (sign -1) the same figure of another row."""

    figure: str
    sign: int
    against: str = REFERENCE


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    what: a few words for the table.
    claim, section: what the paper claims, and where; "" for no claim. tests: they decide if it holds here.
    settings: of the phase; None for a row that trains nothing in stage 2.
    stage1: settings of the earlier stages that it changes, by full name; it then gets its own stage 1.
    course: the folder of its training; rows with the same course share one training.
    from_base: start the generator from the base.
    points: after how many updates weights are written; the last ones are judged.
    raw: judge the raw weights instead of their EMA.
    column: how to sample (see trainer.proof.evaluate.Sampler).
    """

    name: str
    what: str
    claim: str = ""
    section: str = ""
    tests: tuple[Comparison, ...] = ()
    settings: Adversarial | None = None
    stage1: Mapping[str, Any] = field(default_factory=dict)
    course: str = ""
    from_base: bool = False
    points: tuple[int, ...] = ()
    raw: bool = False
    column: str = "apt_1"

    @property
    def group(self) -> str:
        """The name without a number at its end ("sigma" for sigma_0.03); "" if it does not end in one."""
        head, _, tail = self.name.rpartition("_")
        return head if tail.replace(".", "").isdigit() else ""


def all_variants(preset: Preset, recipe: str, phase: str) -> dict[str, Variant]:
    """Every variant of a recipe's phase by name, the reference first.

    Raises AptError as `Preset.phases` does.
    """
    own = preset.phase(phase, recipe)
    rows: list[Variant] = []

    def row(
        name: str,
        what: str,
        claim: str = "",
        section: str = "",
        *tests: Comparison,
        change: Mapping | None = None,
        **options,
    ) -> None:
        settings = Adversarial.model_validate(own.model_dump() | dict(change or {}))
        rows.append(
            Variant(
                name,
                what,
                claim,
                section,
                tests,
                settings,
                **({"course": name, "points": (settings.updates,)} | options),
            )
        )

    def same(name: str, what: str, claim: str = "", section: str = "", *tests: Comparison, **options) -> None:
        row(name, what, claim, section, *tests, **({"course": REFERENCE} | options))

    worse, collapsed = Comparison("fd", MORE), Comparison("diversity", LESS)
    same(
        REFERENCE,
        f"the recipe {recipe} as it is",
        "one step against the base in 25 steps with guidance: structure and text alignment fall",
        "tables 1 and 4",
        Comparison("structure", LESS, "base"),
        Comparison("alignment", LESS, "base"),
    )
    steps, guidance = preset.sampling.steps, preset.sampling.guidance
    rows.append(
        Variant("base", f"the base in {steps} Euler steps, guidance {guidance:g}", column="base_25_cfg")
    )
    rows.append(Variant("distilled", "after stage 1, in one step", column="distilled_1"))
    if STAGE1 in preset.stage2 and recipe != STAGE1:
        also = preset.phases(STAGE1).also
        stage1 = {name: also[name] for name in also if name.startswith(("distill.", "train."))}
        words = f"after stage 1 by {stage1['distill.method']}, as much compute"
        rows.append(Variant("distilled_dmd", f"{words}, in one step", stage1=stage1, column="distilled_1"))
        row("stage1_dmd", f"{words}, and then the recipe", stage1=stage1)
    row(
        "no_ar1",
        "no penalty",
        "without aR1 the discriminator's loss goes to 0 and the generator makes coloured plates",
        "5.1, fig. 5",
        Comparison("d_adversarial", LESS),
        worse,
        change={"r1_weight": 0.0, "r2_weight": 0.0},
    )
    row(
        "t0",
        "the discriminator's time is 0",
        "t = 0 as the discriminator's timestep collapses",
        "3.3",
        worse,
        collapsed,
        change={"discriminator_time": 0.0},
    )
    row(
        "last_layer",
        "one head, at the last layer",
        "with features of the last layer alone objects come out with wrong proportions",
        "5.2, fig. 7",
        Comparison("structure", LESS),
        change={"taps": (1.0,)},
    )
    for name, share in (("half_depth", 1 / 2), ("two_thirds_depth", 2 / 3)):
        taps = tuple(share * fraction for fraction in PAPER_FRACTIONS)
        words = name.removesuffix("_depth").replace("_", " ")
        row(
            name,
            f"a discriminator of {words} of the blocks",
            f"full depth beats {words}",
            "5.2, fig. 6",
            worse,
            change={"taps": taps},
        )
    row(
        "frozen_backbone",
        "of the discriminator only its heads are trained",
        "training all of it is better than a frozen backbone",
        "3.3",
        worse,
        change={"train_backbone": False},
    )
    row(
        "from_distilled",
        "the discriminator starts where the generator does",
        "the base's weights are better than the distilled ones",
        "3.3",
        worse,
        change={"discriminator_start": "start"},
    )
    row(
        "no_distillation",
        "the generator starts from the base",
        "an undistilled generator collapses",
        "3.2",
        worse,
        collapsed,
        from_base=True,
    )
    for name, part in (("batch_quarter", 4), ("batch_sixteenth", 16)):
        if own.batch % part == 0:
            row(
                name,
                f"a batch of {own.batch // part}, not {own.batch}",
                "small batches collapse to a mode",
                "5.4, fig. 9",
                collapsed,
                change={"batch": own.batch // part},
            )
    same(
        "no_ema",
        "the raw weights, not their average",
        "the average is better",
        "5.3, fig. 8",
        worse,
        raw=True,
    )
    for times in SIGMAS:
        sigma = float(f"{own.r1_sigma * times:g}")
        row(f"sigma_{sigma:g}", f"sigma of aR1 {sigma:g}, not {own.r1_sigma:g}", change={"r1_sigma": sigma})
    if "stable" in preset.stage2 and recipe != "stable":
        row(
            "stable",
            "the recipe stable: relativistic, aR1 and aR2",
            change=preset.phase(phase, "stable").model_dump(),
        )
    for number, updates in enumerate(UPDATES):
        claim, section, test = (
            "quality rises until near 350 updates",
            "5.3, fig. 8",
            Comparison("fd", MORE, f"updates_{UPDATES[-1]}"),
        )
        if number == 0:
            claim, test = "sharp after 50 updates", Comparison("sharpness", MORE, "distilled")
        elif updates == UPDATES[-1]:
            test = Comparison("fd", LESS, f"updates_{UPDATES[0]}")
        row(
            f"updates_{updates}",
            f"after {updates} updates of one long run",
            claim,
            section,
            test,
            change={"updates": updates},
            course="long",
            points=UPDATES[: number + 1],
        )
    row(
        "no_ar1_long",
        f"no penalty, after {UPDATES[-1]} updates",
        "without aR1 the discriminator's loss goes to 0 and the generator makes coloured plates",
        "5.1, fig. 5",
        *(
            Comparison(figure, sign, f"updates_{UPDATES[-1]}")
            for figure, sign in (("d_adversarial", LESS), ("fd", MORE), ("diversity", LESS))
        ),
        change={"r1_weight": 0.0, "r2_weight": 0.0, "updates": UPDATES[-1]},
    )
    for count in STEPS:
        claim, section, tests = {
            2: (
                "two steps, never trained for, have better detail and structure",
                "3.5",
                (Comparison("patch_fd", LESS, "steps_1"), Comparison("structure", MORE, "steps_1")),
            ),
            4: ("more steps bring artifacts", "3.5", (Comparison("patch_fd", MORE, "steps_2"),)),
        }.get(count, ("", "", ()))
        same(
            f"steps_{count}",
            f"{REFERENCE} in {count} step{'s' if count > 1 else ''}",
            claim,
            section,
            *tests,
            column=f"apt_{count}",
        )
    return {variant.name: variant for variant in rows}


def choose(variants: Mapping[str, Variant], only: Iterable[str]) -> dict[str, Variant]:
    """The variants that `only` names, and those that they are compared with, in the table's order.

    only: names of variants or groups ("sigma", "updates", "steps", "batch", "stage1"); if empty, all
    variants. Raises AptError for any other name, and suggests the nearest ones.
    """
    groups: dict[str, list[str]] = {"batch": [name for name in variants if name.startswith("batch_")]}
    if others := [name for name, variant in variants.items() if variant.stage1]:
        groups["stage1"] = ["distilled", *others]
    for name, variant in variants.items():
        if variant.group:
            groups.setdefault(variant.group, []).append(name)
    wanted = [name for name in only if name] or list(variants)
    known = [*variants, *(group for group, names in groups.items() if names)]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise AptError(
                f"there is no variant {name!r}{f' (did you mean {_or(near)}?)' if near else ''}: "
                f"use {_or(known)}."
            )
    todo, found = (
        [member for name in wanted for member in ([name] if name in variants else groups[name])],
        set(),
    )
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [REFERENCE, *(test.against for test in variants[name].tests)]
    return {name: variant for name, variant in variants.items() if name in found}


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
