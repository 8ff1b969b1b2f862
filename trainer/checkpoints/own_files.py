"""What `inspect` says of files and folders that this project writes and that are no models."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apt_core.errors import AptError
from apt_core.files.contract import metadata_json
from apt_core.files.lora_keys import is_lora
from apt_core.files.tensorfile import Header
from trainer.data.prompts import PROMPTS
from trainer.data.shards import INDEX
from trainer.run.folders import ABOUT, DIFFERENCES, FACTS, newest_state


@dataclass(frozen=True)
class Own:
    """A kind of safetensors file. what: its name; used: by which commands; holds(path, header): whether a
    file is one.
    """

    what: str
    used: str
    holds: Callable[[Path, Header], bool]


def _prompts(path: Path, header: Header) -> list:
    """The prompts that a file names, one for each of its tensors; [] for any other file."""
    try:
        found = metadata_json(path, header.metadata, "about").get("prompts")
    except AptError:  # another program's `about`
        return []
    return found if isinstance(found, list) and len(found) == len(header.shapes) else []


OWN = (
    Own(
        "what a LoRA's start changes beside adapters",
        "training and export, with the training states beside it",
        lambda path, header: path.name == DIFFERENCES and is_lora(header.shapes),
    ),
    Own(
        "shard of latents",
        f"training, by the {INDEX} beside it",
        lambda path, header: {"latents", "text", "offsets"} <= header.shapes.keys(),
    ),
    Own(
        "features of the miniature's judge",
        "demo, measure and ablate, and evaluate where it judges drawn clips",
        lambda path, header: (
            {"layers.0.weight", "heads.shape.weight", "heads.damage.weight"} <= header.shapes.keys()
        ),
    ),
    Own(
        "embeddings of prompts",
        "training, in the place of the text encoder",
        lambda path, header: bool(_prompts(path, header)) or path.name == PROMPTS and not header.shapes,
    ),
    Own(
        "embedding of one prompt, kept for the next time",
        "sampling, in the place of the text encoder; it is made again where it is missing",
        lambda path, header: header.shapes.keys() == {"embedding"} and "digest" in header.metadata,
    ),
)
NOTES = {
    ABOUT: "says what the training states beside it were trained from",
    FACTS: "facts of the training state that its folder is",
    INDEX: "index of the shards that its folder holds",
    "apt.json": "says of the diffusers folder around it what a file says in its metadata",
    "state.json": "says which stages of a demo have finished",
    "report.json": "figures of a demo",
    "ablations.json": "figures of an ablation",
    "evaluation.json": "figures of an evaluation",
    "history.csv": "log of a stage, which `plot` draws",
}
"""Files that are no safetensors, by name."""
EVALUATION = "evaluation.json"


def own_kind(path: Path, header: Header) -> Own | None:
    """The kind of a safetensors file, None for a model and for a file of another program."""
    return next((kind for kind in OWN if kind.holds(path, header)), None)


def own_facts(path: Path, kind: Own, header: Header) -> dict[str, str]:
    """What `inspect` prints of a file of this kind besides its name and numbers."""
    prompts = "\n".join(map(str, _prompts(path, header)))
    return ({"prompts": prompts} if prompts else {}) | {"used by": kind.used}


def note_facts(path: Path) -> dict[str, str]:
    """Facts about a file that is no safetensors; {} for one that this project does not write."""
    if path.suffix == ".npz":
        return _measured(path)
    return {"what": NOTES[path.name]} if path.is_file() and path.name in NOTES else {}


def _measured(path: Path) -> dict[str, str]:
    try:
        with np.load(path) as file:
            row = json.loads(str(file["about"]))["row"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return {}
    figures = "\n".join(f"{name}  {value}" for name, value in row.items())
    return {"what": "what an evaluation has measured on one clip", "figures": figures or "none"}


def folder_facts(path: Path) -> dict[str, str]:
    """Facts about a folder without a model in it: of a run that has finished no stage, of its states, of an
    evaluation; {} for any other.
    """
    if (path / EVALUATION).is_file():
        return {"what": "folder of an evaluation", "figures": str(path / EVALUATION)}
    states = path if path.name == "states" else path / "states"
    stages = sorted(folder for folder in states.iterdir() if folder.is_dir()) if states.is_dir() else []
    found = {f"{stage.name} goes on": f"from {state}" for stage in stages if (state := newest_state(stage))}
    if path == states:
        return {"what": "training states of a run"} | found if found else {}
    if (path / "latents" / INDEX).is_file():
        found = {"latents": str(path / "latents")} | found
    return {"what": "folder of a run that has finished no stage"} | found if found else {}
