"""The paper's protocols (section 4, appendix A) as settings, with the figures that it gives for them.

A result is compared with a row of the paper only under the name of what was measured, and says in which
points it is not the protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from apt_core.engine.request import Request
from apt_core.errors import AptError

from . import metrics
from .models import Wishes


@dataclass(frozen=True)
class Protocol:
    """prompts: what the file of prompts must hold; counts: how many, in any of these numbers, with one sample
    of each; empty where the number is free.
    height, width, frames, fps: of a sample; fps None for pictures.
    metrics: what the paper measures, by our names; empty where it only counts votes.
    source, columns, rows: the paper's figures: where they stand, whose they are, and the values by name.
    """

    prompts: str
    counts: tuple[int, ...]
    height: int
    width: int
    frames: int
    fps: float | None
    source: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    metrics: tuple[str, ...] = ()

    def sizes(self) -> dict[str, float]:
        sizes = {"height": self.height, "width": self.width, "frames": self.frames}
        return sizes if self.fps is None else sizes | {"fps": self.fps}


OURS = {"FID": metrics.FID, "PFID": metrics.PFID, "CLIP": metrics.CLIP_SCORE}
"""The paper's names of figures, and ours."""
PREFERENCE = "preference, "
PROTOCOLS = {
    "apt-images": Protocol(
        "the first 5,000 or 10,000 captions of COCO-2014 val",
        (5_000, 10_000),
        1024,
        1024,
        1,
        None,
        "appendix A, 5,000 captions, CLIP-ViT-g-14-laion2B; preference: table 1, percent against the base",
        ("APT, 1 step", "base, 25 steps"),
        {
            "FID": (27.9, 26.9),
            "PFID": (34.6, 30.6),
            "CLIP": (32.3, 33.2),
            f"{PREFERENCE}fidelity": (37, None),
            f"{PREFERENCE}structure": (-13, None),
            f"{PREFERENCE}text": (-8, None),
        },
        tuple(OURS.values()),
    ),
    "apt-video": Protocol(
        "prompts of videos",
        (),
        720,
        1280,
        49,
        24.0,
        "table 4, percent against the 25-step base by votes",
        ("APT, 1 step", "APT, 2 steps"),
        {
            f"{PREFERENCE}fidelity": (10, 32),
            f"{PREFERENCE}structure": (-39, -31),
            f"{PREFERENCE}text": (-8, -9),
        },
    ),
}


def find_protocol(name: str, prompts: Path | None) -> Protocol:
    """Raises AptError for a name that is none, and if there is no file of prompts."""
    if name not in PROTOCOLS:
        raise AptError(f"there is no protocol {name!r}: use one of {', '.join(PROTOCOLS)}.")
    if prompts is None:
        raise AptError(f"--protocol {name} needs --prompts FILE: give {PROTOCOLS[name].prompts}, one a line.")
    return PROTOCOLS[name]


def with_sizes(wishes: Wishes, protocol: Protocol) -> Wishes:
    """The wishes, with the protocol's size where they name none."""
    free = {name: value for name, value in protocol.sizes().items() if getattr(wishes, name) is None}
    return replace(wishes, **free)


def departures(protocol: Protocol, request: Request) -> list[str]:
    """In which points a request is not the protocol, in words."""
    found = [
        f"{name} is {getattr(request, name):g} instead of {value:g}"
        for name, value in protocol.sizes().items()
        if getattr(request, name) != value
    ]
    if protocol.counts and len(request.prompts) not in protocol.counts:
        wanted = " or ".join(f"{count:,}" for count in protocol.counts)
        found.append(f"there are {len(request.prompts):,} prompts instead of {wanted}")
    if protocol.counts and request.count != 1:
        found.append(f"there are {request.count} samples of each prompt instead of 1")
    return found


def beside_paper(name: str, request: Request, result: dict) -> dict:
    """The paper's figures and ours, as JSON values.

    Ours stand beside a figure only if the same one was measured: FID and PFID in the features of the file of
    weights that defines them, known by its hash. CLIP stands beside `clip_score`, whose model is named.
    """
    protocol, rows = PROTOCOLS[name], []
    for figure, values in protocol.rows.items():
        key = OURS.get(figure)
        key = key if any(key in model["metrics"] for model in result["models"]) else None
        here = {model["label"]: model["metrics"].get(key, {}).get("value") for model in result["models"]}
        rows.append({"figure": figure, "paper": list(values), "measured_as": key, "here": here})
    clip = next((n["file"] for n in result["features"] if n["name"] == metrics.CLIP_SCORE), None)
    return {
        "name": name,
        "clip": clip,
        "prompts": protocol.prompts,
        "departures": departures(protocol, request),
        "source": protocol.source,
        "columns": list(protocol.columns),
        "rows": rows,
    }


def cells(beside: dict) -> list[list[str]]:
    """A heading and a line per figure."""
    labels = list(beside["rows"][0]["here"])
    head = [
        "",
        *(f"paper: {column}" for column in beside["columns"]),
        *(f"here: {label}" for label in labels),
    ]
    lines = [head]
    for row in beside["rows"]:
        ours = f" (here {row['measured_as']})" if row["measured_as"] else ""
        here = [row["here"][label] for label in labels]
        lines.append(
            [
                row["figure"] + ours,
                *("-" if value is None else f"{value:g}" for value in row["paper"]),
                *("-" if value is None else f"{value:.3g}" for value in here),
            ]
        )
    return lines


def papers(beside: dict) -> list[dict[str, str | float | None]]:
    """The paper's figures for each of its columns, by our names where we have one."""
    return [
        {"model": column} | {OURS.get(r["figure"], r["figure"]): r["paper"][n] for r in beside["rows"]}
        for n, column in enumerate(beside["columns"])
    ]


def notes(beside: dict) -> list[str]:
    """What a reader must know of the figures, in sentences."""
    said = [f"Paper: {beside['source']}."]
    if beside["departures"]:
        said.append(f"This is not the protocol {beside['name']}: {'; '.join(beside['departures'])}.")
    said.append(f"Nothing here checks that the prompts are {beside['prompts']}.")
    if beside["clip"] and any(row["measured_as"] == metrics.CLIP_SCORE for row in beside["rows"]):
        said.append(f"{metrics.CLIP_SCORE} here is of {beside['clip']}.")
    if any(row["figure"].startswith(PREFERENCE) for row in beside["rows"]):
        said.append("Votes are counted by the command preference and not here.")
    return said


def as_html(beside: dict | None) -> str:
    """The table and the notes for the page; nothing without a protocol."""
    if beside is None:
        return ""
    head, *lines = cells(beside)
    return (
        f"<table id=paper><thead>{_line('th scope=col', head)}</thead><tbody>"
        + "".join(_line("td", line) for line in lines)
        + f"</tbody></table>\n<p class=hint>{escape(' '.join(notes(beside)))}</p>"
    )


def _line(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag.split()[0]}>" for text in texts) + "</tr>"
