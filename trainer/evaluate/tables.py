"""The figures of an evaluation as tables: in CSV, and in the terminal."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from apt_core.files.atomic import replacing
from trainer.run.progress import console, say

from .metrics import EACH
from .page import cell
from .protocols import cells, notes, papers

MODELS, CLIPS = "models.csv", "clips.csv"


def write_tables(folder: Path, result: dict) -> None:
    """Two tables: models.csv with a line per model, and with a protocol one per column of the paper;
    clips.csv with a line per clip.
    """
    names = list(dict.fromkeys(name for model in result["models"] for name in model["metrics"]))
    sets = [*result["models"], *([{"label": "real"} | result["real"]] if result["real"] else [])]
    lines = []
    for entry in sets:
        line = {"model": entry["label"]}
        for name in names:
            figure = entry["metrics"].get(name, {})
            line |= {name: figure.get("value"), f"{name}_of_real": figure.get("of_real")}
        lines.append(line | {"seconds_each": entry.get("seconds_each")})
    if beside := result.get("protocol"):
        lines = [{"source": "here"} | line for line in lines]
        lines += [{"source": "paper"} | line for line in papers(beside)]
    head = list(dict.fromkeys(name for line in lines for name in line))
    _csv(folder / MODELS, head, [[line.get(name) for name in head] for line in lines])
    single = [name for name in names if name in EACH]
    lines = []
    for entry in sets:
        for number, clip in enumerate(entry["clips"]):
            prompt = clip["caption"] if "caption" in clip else result["prompts"][number // result["count"]]
            lines.append([entry["label"], number, prompt, clip["file"], *map(clip["metrics"].get, single)])
    _csv(folder / CLIPS, ["model", "number", "prompt", "file", *single], lines)


def _csv(path: Path, head: Sequence, lines: Iterable[Sequence]) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *lines])


def tell(result: dict, page: Path, commands: Sequence[str] = ()) -> None:
    """The table, where the page is, and the commands that would run VBench."""
    names = list(dict.fromkeys(name for model in result["models"] for name in model["metrics"]))
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("")
    sets = [*result["models"], *([{"label": "real"} | result["real"]] if result["real"] else [])]
    for entry in sets:
        table.add_column(entry["label"].replace("[", "\\["), justify="right", overflow="fold")
    for name in names:
        table.add_row(name, *(cell(entry["metrics"].get(name)) for entry in sets))
    console.print(table)
    if beside := result.get("protocol"):
        head, *lines = cells(beside)
        paper = Table(*(text.replace("[", "\\[") for text in head), box=None, padding=(0, 1), pad_edge=False)
        for line in lines:
            paper.add_row(*(text.replace("[", "\\[") for text in line))
        console.print(paper)
        for note in notes(beside):
            say(note)
    say(f"{page}")
    if commands:
        console.print("VBench has not been run. Where it is installed, this runs it:")
    for line in commands:
        say(line)
