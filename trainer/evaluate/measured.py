"""What was measured on each clip, and the folder that holds it while an evaluation runs.

Every clip has one file there, so that several processes can share the work, and an evaluation that was
stopped can go on.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from apt_core.errors import AptError
from apt_core.files.atomic import make_folder, replacing
from apt_core.files.jsonfile import read_object, write_json

from .clip_score import ClipScore
from .features import Features
from .metrics import CLIP, CLIP_SCORE, DIVERSITY, JUDGED, diversity, judged, thumbnail

UNFINISHED = "unfinished"
"""The folder of what is measured so far, inside the result's. It is removed when the result is written."""
REQUEST = "request.json"
FEATURES = "features of "


@dataclass(frozen=True)
class Record:
    """What was measured on one clip.

    row: its metrics by name.
    features: feature arrays `[n, d]`, by the name of the distance they are for.
    small: its thumbnail, if diversity was asked for.
    seconds: how long it took to make; first: whether that includes reading the model's weights.
    """

    row: dict[str, float | None]
    features: dict[str, np.ndarray]
    small: np.ndarray | None
    seconds: float = 0.0
    first: bool = False

    def write(self, path: Path) -> None:
        """As .npz, whole or not at all."""
        about = json.dumps({"row": self.row, "seconds": self.seconds, "first": self.first})
        arrays = {FEATURES + name: part for name, part in self.features.items()}
        if self.small is not None:
            arrays["small"] = self.small
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, about=np.array(about), **arrays)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises AptError for a file that is damaged."""
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            row, seconds, first = about["row"], about["seconds"], about["first"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise AptError(f"{path} cannot be read ({error}): remove it, and evaluate goes on.") from None
        small = arrays.pop("small", None)
        features = {name.removeprefix(FEATURES): part for name, part in arrays.items()}
        return cls(row, features, small, seconds, first)


def measure(
    clip: np.ndarray,
    names: Sequence[str],
    networks: Sequence[Features],
    score: ClipScore | None = None,
    words: str | None = None,
) -> Record:
    """Measure all that is asked for on a clip, uint8 `[F, H, W, 3]`. score: for its fit to `words`, its
    prompt or caption; without words the figure is None.
    """
    row = {name: CLIP[name].of(clip) for name in names if name in CLIP}
    if score is not None:
        row[CLIP_SCORE] = score(clip, words) if words else None
    if any(name in JUDGED for name in names):
        row |= {name: value for name, value in judged(clip, words).items() if name in names}
    features = {name: part for network in networks for name, part in network(clip).items()}
    return Record(row, features, thumbnail(clip) if DIVERSITY in names else None)


@dataclass
class Measured:
    """What was measured on one set of clips (one model's, or the real ones), in order.

    files: paths of the clips, relative to the result's folder. count: samples per prompt.
    """

    records: list[Record] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    count: int = 1

    def mean(self, name: str) -> float | None:
        """The mean over the clips for which the metric is defined; None if there are none."""
        values = [r.row[name] for r in self.records if r.row[name] is not None]
        return float(np.mean(values)) if values else None

    def features(self) -> dict[str, list[np.ndarray]]:
        """The feature arrays of each clip, by the name of the distance they are for."""
        names = self.records[0].features if self.records else ()
        return {name: [record.features[name] for record in self.records] for name in names}

    def diversity(self) -> float | None:
        small = [record.small for record in self.records if record.small is not None]
        return diversity([small[start : start + self.count] for start in range(0, len(small), self.count)])

    def seconds(self) -> tuple[float, float]:
        """The longest time that includes reading weights, and the median of the other times."""
        first = [record.seconds for record in self.records if record.first]
        each = [record.seconds for record in self.records if not record.first] or first
        return max(first or each), float(np.median(each))


class Desk:
    """The result's folder while an evaluation runs."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / UNFINISHED

    def open(self, request: Mapping) -> None:
        """Begin, or go on with the same request. request: everything that figures depend on, as JSON values.
        Raises AptError if the folder holds anything else.
        """
        kept = self.folder / REQUEST
        if kept.is_file():
            before = read_object(kept, f"remove {self.out}, or give another --out")
            if before != json.loads(json.dumps(request)):
                raise AptError(
                    f"{self.out} holds an unfinished evaluation of other models, files or settings: give "
                    "those again, another --out, or remove it."
                )
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise AptError(f"{self.out} already exists and is not empty: give another --out, or remove it.")
        else:
            make_folder(self.folder)
            write_json(kept, request)

    def record(self, place: str, number: int) -> Path:
        return self.folder / place / f"{number:06d}.npz"

    def missing(self, place: str, count: int) -> list[int]:
        """The numbers of those of `count` clips that are not measured yet."""
        return [number for number in range(count) if not self.record(place, number).exists()]

    def read(self, place: str, files: Sequence[str], count: int) -> Measured:
        records = [Record.read(self.record(place, number)) for number in range(len(files))]
        return Measured(records, list(files), count)

    def close(self) -> None:
        """Remove what only an unfinished evaluation needs."""
        shutil.rmtree(self.folder)
