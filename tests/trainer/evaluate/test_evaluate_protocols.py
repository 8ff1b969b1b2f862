"""`evaluate --protocol`: the paper's settings, and its figures beside ours."""

import json

import pytest
from typer.testing import CliRunner

from apt_core.engine.request import Request
from apt_core.errors import AptError
from trainer.__main__ import app
from trainer.evaluate.models import Wishes
from trainer.evaluate.protocols import (
    PROTOCOLS,
    as_html,
    beside_paper,
    cells,
    departures,
    find_protocol,
    notes,
    with_sizes,
)

FEATURES = [
    {"file": "inception-clip"},  # a folder of CLIP has no input
    {"file": "efficientnet.pt", "input": "frames"},
    {"file": "inception.pt", "input": "frames"},
]
FIGURES = {"fd_efficientnet": 1.0, "fd_inception": 28.125, "fd_patch_inception": 40.0, "clip_score": 31.5}


def result(label="mine", features=FEATURES, **figures) -> dict:
    metrics = {name: {"value": value, "of_real": None} for name, value in figures.items()}
    return {"models": [{"label": label, "metrics": metrics}], "features": features}


def images(many: int, **other) -> Request:
    return Request(["x"] * many, **({"height": 1024, "width": 1024, "frames": 1} | other))


def command(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_a_run_says_that_it_is_not_the_protocol_in_every_place(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square")
    size = ("--height", 48, "--width", 48, "--metrics", "contrast", "--out", tmp_path / "out")
    run = command("mini", "--prompts", tmp_path / "prompts.txt", "--protocol", "apt-images", *size)
    assert run.exit_code == 0, run.output
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["size"] | {"fps": 0} == {"height": 48, "width": 48, "frames": 1, "fps": 0}
    assert written["protocol"]["departures"] == [
        "height is 48 instead of 1024",
        "width is 48 instead of 1024",
        "there are 2 prompts instead of 5,000 or 10,000",
    ]
    assert written["protocol"]["rows"][0] == {
        **{"figure": "FID", "paper": [27.9, 26.9], "measured_as": None, "here": {"apt_mini": None}}
    }
    said = "This is not the protocol apt-images: height is 48 instead of 1024; width is 48 instead of 1024; "
    page = (tmp_path / "out" / "evaluation.html").read_text()
    for text in (run.output, page):
        assert said + "there are 2 prompts instead of 5,000 or 10,000." in text
        assert "paper: APT, 1 step" in text.replace("\n", " ") and "27.9" in text and "here: apt_mini" in text


def test_the_protocol_itself_has_no_departure():
    for name, request in (
        ("apt-images", images(5_000)),
        ("apt-images", images(10_000)),
        ("apt-video", Request(["x"], height=720, width=1280, frames=49, fps=24.0)),
    ):
        assert departures(PROTOCOLS[name], request) == []
        assert not any("not the protocol" in note for note in notes(beside_paper(name, request, result())))
    assert departures(PROTOCOLS["apt-images"], images(4_999, count=2)) == [
        "there are 4,999 prompts instead of 5,000 or 10,000",
        "there are 2 samples of each prompt instead of 1",
    ]
    video = Request(["x"], height=704, width=1280, frames=49, fps=16.0)
    assert departures(PROTOCOLS["apt-video"], video) == [
        "height is 704 instead of 720",
        "fps is 16 instead of 24",
    ]


def test_its_size_is_taken_where_none_is_given():
    wishes = with_sizes(Wishes(height=704, seed=3), PROTOCOLS["apt-video"])
    assert wishes == Wishes(height=704, width=1280, frames=49, fps=24.0, seed=3)
    assert with_sizes(Wishes(), PROTOCOLS["apt-images"]) == Wishes(height=1024, width=1024, frames=1)


def test_our_figures_stand_beside_the_papers_under_their_own_names():
    beside = beside_paper("apt-images", images(5_000), result("a <b>", **FIGURES))
    assert cells(beside) == [
        ["", "paper: APT, 1 step", "paper: base, 25 steps", "here: a <b>"],
        ["FID (here fd_inception)", "27.9", "26.9", "28.1"],
        ["PFID (here fd_patch_inception)", "34.6", "30.6", "40"],
        ["CLIP (here clip_score)", "32.3", "33.2", "31.5"],
    ]
    assert "<th scope=col>here: a &lt;b&gt;</th>" in as_html(beside) and as_html(None) == ""
    other = beside_paper("apt-images", images(5_000), result(features=FEATURES[:2], fd_efficientnet=1.0))
    assert [line[3] for line in cells(other)[1:]] == ["-", "-", "-"]


def test_the_votes_of_table_4_are_not_measured_here():
    request = Request(["x"], height=720, width=1280, frames=49, fps=24.0)
    beside = beside_paper("apt-video", request, result(**FIGURES))
    assert [line[1:] for line in cells(beside)[1:]] == [
        ["10", "32", "-"],
        ["-39", "-31", "-"],
        ["-8", "-9", "-"],
    ]
    assert "Votes are counted by the command preference and not here." in notes(beside)


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(AptError, match="no protocol 'coco': use one of apt-images, apt-video"):
        find_protocol("coco", tmp_path / "prompts.txt")
    run = command("mini", "--protocol", "apt-images", "--data", tmp_path, "--out", tmp_path / "out")
    assert (
        run.exit_code == 2 and "needs --prompts FILE: give the first 5,000 or 10,000 captions" in run.stderr
    )
    (tmp_path / "blank.txt").write_text("\n \n")
    run = command("mini", "--prompts", tmp_path / "blank.txt", "--out", tmp_path / "out")
    assert run.exit_code == 2 and "blank.txt holds no prompt: write one a line." in run.stderr
    assert not (tmp_path / "out").exists()
