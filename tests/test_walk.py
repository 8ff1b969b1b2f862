"""The walk of docs/train.md on the miniature, run as it stands there, on clips of one's own; and its words
are those that the log prints.
"""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.__main__ import app
from trainer.config import load_preset
from trainer.mini.drawn_files import draw_files
from trainer.run.progress import SHOWN

PAGE = Path(__file__).parents[1] / "docs" / "train.md"
TITLE = "## The same walk on a laptop"


def walk() -> list[list[str]]:
    section = PAGE.read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.S)
    return [shlex.split(line.split("-m trainer ")[1]) for line in block[1].replace("\\\n", "").splitlines()]


def test_every_column_of_the_walk_is_printed_under_its_name():
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("### 4. What the log should look like")[1].split("### 5.")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.M)
    named = {
        name: column for row in rows for name, column in re.findall(r"`([^`]+)`(?: \(`([^`]+)`\))?", row)
    }
    assert len(named) >= 14
    for name, column in named.items():
        assert name in SHOWN.values(), name
        assert not column or SHOWN[column] == name, (column, name)


@pytest.mark.slow
def test_the_walk_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_preset("mini").data.model_copy(update={"images": 40, "clips": 60})
    draw_files(tmp_path / "clips", data, 0, lambda *args: None)
    for caption in (tmp_path / "clips").glob("*.txt"):
        caption.write_text("my " + caption.read_text(encoding="utf-8").removeprefix("a "), encoding="utf-8")
    shown = ""
    for arguments in walk():
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{arguments}: {result.output}"
        shown += result.output
    assert "40 images, 60 videos" in shown and "apt-mini.safetensors is the result" in shown
    assert (tmp_path / "loras" / "try-apt.safetensors").is_file()
    assert {path.name for path in (tmp_path / "runs" / "try").glob("curves-*.png")} == {
        "curves-distill.png",
        "curves-image.png",
        "curves-video.png",
    }
    assert [path.suffix for path in (tmp_path / "samples").iterdir()] == [".mp4"]
