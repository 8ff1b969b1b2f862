"""`evaluate --protocol`: the paper's settings, and its figures beside ours."""

import csv
import json
from functools import partial

import commands
import numpy as np
import pytest

from apt_core.engine.request import Request
from apt_core.errors import AptError
from apt_core.files.media_write import write_image
from trainer.evaluate.choice import chosen
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
from trainer.evaluate.published import INCEPTION
from trainer.evaluate.tables import write_tables

FEATURES = [{"name": "fid", "file": "weights.pth"}, {"name": "clip_score", "file": "tiny-clip"}]
PREFERENCES = '"preference, fidelity","preference, structure","preference, text"'
FIGURES = {"fid": 28.125, "pfid": 40.0, "clip_score": 31.5}


def result(label="mine", features=FEATURES, **figures) -> dict:
    metrics = {name: {"value": value, "of_real": None} for name, value in figures.items()}
    return {"models": [{"label": label, "metrics": metrics}], "features": features}


def images(many: int, **other) -> Request:
    return Request(["x"] * many, **({"height": 1024, "width": 1024, "frames": 1} | other))


command = partial(commands.command, "evaluate")


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


def test_models_csv_holds_the_papers_figures(tmp_path):
    found = result("mine", fid=28.125) | {"real": None, "prompts": []}
    found["models"][0] |= {"seconds_each": 2.0, "clips": []}
    found["protocol"] = beside_paper("apt-images", images(5_000), found)
    write_tables(tmp_path, found)
    assert (tmp_path / "models.csv").read_text().splitlines() == [
        "source,model,fid,fid_of_real,seconds_each,pfid,clip_score," + PREFERENCES,
        "here,mine,28.125,,2.0,,,,,",
        'paper,"APT, 1 step",27.9,,,34.6,32.3,37,-13,-8',
        'paper,"base, 25 steps",26.9,,,30.6,33.2,,,',
    ]
    found["protocol"] = beside_paper("apt-video", images(5, fps=24.0), found)
    write_tables(tmp_path, found)
    with (tmp_path / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["source"], r["preference, structure"]) for r in rows] == [
        ("here", ""),
        ("paper", "-39"),
        ("paper", "-31"),
    ]
    del found["protocol"]
    write_tables(tmp_path, found)
    assert (tmp_path / "models.csv").read_text().splitlines()[0] == "model,fid,fid_of_real,seconds_each"


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
        ["FID (here fid)", "27.9", "26.9", "28.1"],
        ["PFID (here pfid)", "34.6", "30.6", "40"],
        ["CLIP (here clip_score)", "32.3", "33.2", "31.5"],
        ["preference, fidelity", "37", "-", "-"],
        ["preference, structure", "-13", "-", "-"],
        ["preference, text", "-8", "-", "-"],
    ]
    assert "<th scope=col>here: a &lt;b&gt;</th>" in as_html(beside) and as_html(None) == ""
    assert "clip_score here is of tiny-clip." in notes(beside)
    # in the features of another file it is no FID, whatever the file is called
    other = result(features=[{"name": "fd_inception", "file": "inception.pt"}], fd_inception=28.0)
    beside = beside_paper("apt-images", images(5_000), other)
    assert [line[3] for line in cells(beside)[1:]] == ["-"] * 6
    assert not any("clip_score here" in note for note in notes(beside))


def test_the_votes_of_table_4_are_not_measured_here():
    request = Request(["x"], height=720, width=1280, frames=49, fps=24.0)
    beside = beside_paper("apt-video", request, result(**FIGURES))
    assert [line[1:] for line in cells(beside)[1:]] == [
        ["10", "32", "-"],
        ["-39", "-31", "-"],
        ["-8", "-9", "-"],
    ]
    assert "Votes are counted by the command preference and not here." in notes(beside)


def test_it_measures_what_the_paper_measures(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square")
    given = (
        "mini",
        "--prompts",
        tmp_path / "prompts.txt",
        "--protocol",
        "apt-images",
        "--out",
        tmp_path / "o",
    )
    run = command(*given)
    assert run.exit_code == 2 and run.stderr.count("\n") == 1
    assert (
        "fid needs the weights that it is defined by, weights-inception-2015-12-05-6726825d.pth" in run.stderr
    )
    assert (
        f"(SHA-256 {INCEPTION})" in run.stderr and "[[features]] table of --features FILE.toml" in run.stderr
    )
    digests = {"[[features]]": INCEPTION, "[clip]": "0" * 64}
    lines = [f"{head}\npath = 'missing'\nsha256 = '{digest}'\n" for head, digest in digests.items()]
    features = tmp_path / "features.toml"
    features.write_text(lines[0])
    run = command(*given, "--features", features)
    assert "clip_score needs --features FILE.toml with a [clip] table" in run.stderr
    features.write_text("".join(lines))
    run = command(*given, "--features", features)
    assert "fid compares with real clips: add --data FOLDER" in run.stderr
    (tmp_path / "real").mkdir()
    write_image(tmp_path / "real" / "0.png", np.zeros((1, 1024, 1024, 3), np.uint8))
    run = command(*given, "--features", features, "--data", tmp_path / "real")
    assert run.exit_code == 2 and run.stderr.count("\n") == 1
    assert (
        f"{tmp_path / 'missing'}, the weights of fid, does not exist: "
        "put weights-inception-2015-12-05-6726825d"
        f".pth with SHA-256 {INCEPTION} there" in run.stderr
    )
    assert chosen("motion", None, ("fid",)) == ["motion"]  # names that a user gives win
    assert PROTOCOLS["apt-video"].metrics == ()


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
