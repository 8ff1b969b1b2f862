"""What is said of a folder that holds a run with other settings."""

from pathlib import Path

import pytest

from apt_core.errors import AptError
from trainer.run.identity import differing, refuse_another

STORED = {"seed": 0, "preset": {"lr": 1}, "data": None, "of another version": 1}


def test_a_missing_setting_counts_as_none_and_more_than_is_asked_for_is_no_difference():
    assert differing(STORED, {"preset": {"lr": 1}, "seed": 0, "data": None, "recipe": None}) == []
    assert differing(STORED, {"seed": 1, "data": "clips", "preset": {"lr": 1}}) == ["data", "seed"]
    refuse_another(Path("out"), "run", STORED, {"seed": 0})


@pytest.mark.parametrize(
    "now, kind, or_else, says",
    [
        ({"seed": 1}, "run", "", "a run with another seed (0, now 1): give another --out, or the # run."),
        (
            {"data": "clips", "seed": 1, "preset": {}},
            "ablation",
            "",
            "an ablation with another data and 2 more (None, now 'clips'): give another --out, or the # "
            "ablation.",
        ),
        (
            {"preset": {"lr": 2}},
            "run",
            "delete it",
            "a run with another preset: give another --out, or the # run, or delete it.",
        ),
        ({"recipe": "x"}, "run", "", "a run with another recipe (None, now 'x'): give another --out, or "),
    ],
)
def test_one_sentence_with_the_first_setting_and_its_values_unless_they_are_tables(now, kind, or_else, says):
    with pytest.raises(AptError) as refused:
        refuse_another(Path("out"), kind, STORED, now, or_else)
    assert str(refused.value).startswith("out holds " + says.replace("#", "settings of that"))
