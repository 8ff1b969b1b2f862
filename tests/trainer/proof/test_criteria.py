"""The criteria of the proof, on figures made up to be on either side of each bound."""

import pytest

from trainer.proof.criteria import CRITERIA, check
from trainer.proof.evaluate import ALL_COLUMNS


def rows(**changes):
    """Figures of which each criterion holds by a hair, and what is changed, as COLUMN__FIGURE."""
    base = dict(fd=10.0, patch_fd=10.0, structure=0.6, sharpness=1.0, motion=16.0, alignment_direction=0.9)
    out = {column: dict(base) for column in ALL_COLUMNS}
    out["apt_1"] |= dict(fd=8.0, patch_fd=7.5, structure=0.4, sharpness=0.95)
    for name, value in changes.items():
        column, _, figure = name.partition("__")
        out[column.replace("7_5", "7.5")][figure] = value
    return out


def test_all_hold_at_their_bounds():
    found = check([rows(), rows()])
    assert [row["name"] for row in found] == [criterion.name for criterion in CRITERIA] and all(
        row["holds"] == row["runs"] == 2 for row in found
    )


@pytest.mark.parametrize(
    "change, broken",
    [
        ({"apt_1__fd": 8.1}, ["a1"]),
        ({"apt_1__patch_fd": 7.6}, ["a2"]),
        ({"apt_1__structure": 0.39}, ["a3"]),
        ({"base_25_cfg7_5__fd": 7.9}, ["b1"]),
        ({"base_25_cfg7_5__patch_fd": 7.4}, ["b2"]),
        ({"apt_1__sharpness": 0.94}, ["c"]),
        ({"apt_1__motion": 15.9}, ["d1"]),
        ({"apt_1__alignment_direction": 0.89}, ["d2"]),
        ({"apt_2__structure": 0.59}, ["e"]),
    ],
)
def test_each_breaks_alone_on_the_wrong_side_of_its_bound(change, broken):
    found = check([rows(), rows(**change)])
    assert [row["name"].partition(":")[0] for row in found if row["holds"] == 1] == broken
    assert all(row["holds"] == 2 for row in found if row["name"].partition(":")[0] not in broken)


def test_what_has_no_figure_is_left_out():
    """Pictures have no motion, and nothing is a share of no structure at all."""
    still = {
        f"{column}__{figure}": None for column in ALL_COLUMNS for figure in ("motion", "alignment_direction")
    }
    names = [
        row["name"].partition(":")[0]
        for row in check(
            [
                rows(
                    **{name.replace("7.5", "7_5"): value for name, value in still.items()},
                    distilled_1__structure=0.0,
                )
            ]
        )
    ]
    assert names == ["a1", "a2", "b1", "b2", "c"]
