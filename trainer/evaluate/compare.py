"""`evaluate`: sample several models at the same prompts and seeds, measure them (against real clips if there
are any), and write the results as JSON, CSV and a page.
"""

import csv
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from apt_core.errors import AptError
from apt_core.files.atomic import replacing, replacing_folder
from apt_core.files.media_write import write_image, write_video
from trainer.checkpoints.generate import read_prompts
from trainer.config import Files
from trainer.files import write_json
from trainer.run.progress import console, stage_bar

from .features import Features, check_count, distance, read_networks
from .metrics import CLIP, DIVERSITY, FD, NAMES, diversity, thumbnail
from .models import Model, Wishes, open_models, sample, with_prompts
from .page import cell, write_page
from .real import Real, find_real

PACKAGES = ("comfyui-apt", "torch", "diffusers", "transformers", "numpy", "scipy", "av")
REALS = 16
"""How many real clips are used when their captions are the prompts."""
RESULT, TABLE, CLIPS, PAGE = "evaluation.json", "models.csv", "clips.csv", "evaluation.html"


@dataclass
class Measured:
    """What was measured on one set of clips (one model's, or the real ones).

    rows: for each clip its metrics by name.
    features: feature arrays `[n, d]` of each clip, by the name of the distance they are for.
    groups: thumbnails of the clips of each prompt, by the prompt's number.
    files: paths of the clips, relative to the result's folder.
    seconds: how long each clip took to make.
    """

    rows: list[dict[str, float | None]] = field(default_factory=list)
    features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    groups: dict[int, list[np.ndarray]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, clip: np.ndarray, names: Sequence[str], networks: Sequence[Features], prompt: int) -> None:
        self.rows.append({name: CLIP[name].of(clip) for name in names if name in CLIP})
        for network in networks:
            for name, part in network(clip).items():
                self.features.setdefault(name, []).append(part)
        if DIVERSITY in names:
            self.groups.setdefault(prompt, []).append(thumbnail(clip))

    def mean(self, name: str) -> float | None:
        """The mean over the clips for which the metric is defined; None if there are none."""
        values = [row[name] for row in self.rows if row[name] is not None]
        return float(np.mean(values)) if values else None


def chosen(names: str | None, features: Path | None) -> list[str]:
    """The metrics in a comma-separated list. Without a list, all metrics, `fd` only if `features` is given.

    Raises AptError for a name that is no metric, and if only one of `fd` and `features` is given.
    """
    if names is None:
        return [name for name in NAMES if name != FD or features is not None]
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if unknown := [name for name in wanted if name not in NAMES] or ([] if wanted else [names]):
        raise AptError(f"there is no metric {unknown[0]!r}: use some of {', '.join(NAMES)}.")
    if (FD in wanted) != (features is not None):
        raise AptError(
            "fd needs --features FILE.toml, which says what network to use: add it, or leave fd out."
            if FD in wanted
            else f"--features {features} is only used by fd: add fd to --metrics, or leave it out."
        )
    return wanted


def evaluate(
    checkpoints: Sequence[Path],
    out: Path,
    wishes: Wishes = Wishes(),
    *,
    prompts: Path | None = None,
    data: Path | None = None,
    metrics: str | None = None,
    features: Path | None = None,
    emas: Sequence[float] = (),
    reals: int | None = None,
    files: Files = Files(),
    device: torch.device = torch.device("cpu"),
) -> dict:
    """Sample every model at the same prompts and seeds, measure the samples, and write the folder `out`:
    evaluation.json, models.csv, clips.csv, evaluation.html and the samples. Returns what evaluation.json
    holds.

    prompts: a text file with one prompt per line; by default the captions of `data`.
    data: real clips, in a folder or in shards. The first `reals` of them are used, by default as many as
        there are samples of one model.
    features: a TOML file, see `features.Network`.
    emas: of each training state, the averages with these decays.

    Raises AptError, before any weight is read, if there is no prompt, files do not fit each other, models
    make different sizes, `out` already holds files, or there are too few clips for a Frechet distance.
    """
    names = chosen(metrics, features)
    if FD in names and data is None:
        raise AptError("fd compares with real clips: add --data FOLDER, or leave fd out.")
    if reals is not None and data is None:
        raise AptError(
            f"--reals {reals} is a number of real clips, but there are none: add --data FOLDER, or leave it out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AptError(f"{out} already exists and is not empty: give another --out, or remove it.")
    if prompts is None and data is None:
        raise AptError("there is no prompt: give --prompts FILE, or --data with captions.")
    texts = read_prompts(prompts) if prompts else []
    models = open_models(checkpoints, emas, files, wishes)
    request, sources = models[0].request, models[0].sources
    real = None
    if data is not None:
        real = find_real(data, request, request.latents(sources), reals or len(texts) * wishes.count or REALS)
        texts = texts or real.prompts()
    if not texts:
        raise AptError(f"there is no prompt, and {data} has no captions: give --prompts FILE.")
    models = with_prompts(models, texts)
    networks = [Features(n, device) for n in read_networks(features)] if FD in names else []
    _check_enough(networks, models[0], real)
    with replacing_folder(out) as folder:
        columns = _measure(models, real, names, networks, folder, device)
        result = _result(models, real, names, networks, columns, wishes, device)
        write_json(folder / RESULT, result)
        _write_csv(folder, result)
        write_page(folder / PAGE, result)
    _tell(result, out)
    return result


def _check_enough(networks: Sequence[Features], model: Model, real: Real | None) -> None:
    request = model.request
    blank = np.zeros((request.frames, request.height, request.width, 3), np.uint8)
    for network in networks:
        for name, part in network(blank).items():
            counts = {
                "the real clips": len(real.names) * len(part),
                "each model": request.samples * len(part),
            }
            check_count(name, part.shape[1], counts)


def _measure(
    models: Sequence[Model],
    real: Real | None,
    names: Sequence[str],
    networks: Sequence[Features],
    folder: Path,
    device: torch.device,
) -> dict[str | None, Measured]:
    """The measurements of each model by its label; those of the real clips have the key None."""
    columns: dict[str | None, Measured] = {}
    total = len(models) * models[0].request.samples + (len(real.names) if real else 0)
    done = 0
    with stage_bar("Evaluating") as report:

        def take(label: str | None, clips: Iterable[np.ndarray], count: int) -> None:
            nonlocal done
            column = columns[label] = Measured()
            place = "real" if label is None else f"{len(columns):02d}-{_slug(label)}"
            start = time.perf_counter()
            for number, clip in enumerate(clips):
                column.seconds.append(time.perf_counter() - start)
                column.add(clip, names, networks, number // count)
                column.files.append(_write(folder, place, number, clip, models[0]))
                done += 1
                report(done, total)
                start = time.perf_counter()

        for number, model in enumerate(models):
            pipe = model.open(device)
            if real is not None and number == 0:
                take(None, real.clips(model.request, pipe), 1)
            take(model.label, sample(pipe, model.request), model.request.count)
            del pipe  # its weights make room for the next one's
    return columns


def _write(folder: Path, name: str, number: int, clip: np.ndarray, model: Model) -> str:
    suffix = "png" if len(clip) == 1 else "mp4"
    path = folder / "clips" / name / f"{number:04d}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(clip) == 1:
        write_image(path, clip)
    else:
        write_video(path, clip, model.request.fps)
    return path.relative_to(folder).as_posix()


def _result(
    models: Sequence[Model],
    real: Real | None,
    names: Sequence[str],
    networks: Sequence[Features],
    columns: dict[str | None, Measured],
    wishes: Wishes,
    device: torch.device,
) -> dict:
    request, digests = models[0].request, {}
    true = columns.get(None)

    def figures(column: Measured) -> dict:
        found = {}
        for name in names:
            if name in CLIP:
                value, beside = column.mean(name), true.mean(name) if true else None
                ratio = value / beside if value is not None and beside and column is not true else None
                found[name] = {"value": value, "of_real": ratio}
        if DIVERSITY in names and column is not true:
            found[DIVERSITY] = {"value": diversity(list(column.groups.values())), "of_real": None}
        if true is not None and column is not true:
            for name, parts in column.features.items():
                found[name] = {"value": distance(true.features[name], parts), "of_real": None}
        return found

    def clips(column: Measured) -> list[dict]:
        return [{"file": file, "metrics": row} for file, row in zip(column.files, column.rows)]

    rows = [
        model.facts(digests)
        | {
            "seconds_first": columns[model.label].seconds[0],
            "seconds_each": float(
                np.median(columns[model.label].seconds[1:] or columns[model.label].seconds)
            ),
            "metrics": figures(columns[model.label]),
            "clips": clips(columns[model.label]),
        }
        for model in models
    ]
    result = {
        "format": "apt-evaluation",
        "version": 1,
        "prompts": list(request.prompts),
        "seed": request.seed,
        "count": request.count,
        "size": {name: getattr(request, name) for name in ("height", "width", "frames", "fps")},
        "wishes": asdict(wishes),
        "features": [
            {"name": n.network.name, "file": n.network.path.name, **n.network.model_dump(exclude={"path"})}
            for n in networks
        ],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "models": rows,
        "real": None,
    }
    if real is not None:
        shown = [
            entry | {"name": name, "caption": caption}
            for entry, name, caption in zip(clips(true), real.names, real.captions)
        ]
        result["real"] = {"what": real.what, "metrics": figures(true), "clips": shown}
    return result


def _write_csv(folder: Path, result: dict) -> None:
    """Two tables: models.csv with a line per model, clips.csv with a line per clip."""
    names = list(dict.fromkeys(name for model in result["models"] for name in model["metrics"]))
    sets = [*result["models"], *([{"label": "real"} | result["real"]] if result["real"] else [])]
    head = ["model", *(c for name in names for c in (name, f"{name}_of_real")), "seconds_each"]
    lines = []
    for entry in sets:
        cells = [entry["metrics"].get(name, {}) for name in names]
        values = [value for cell in cells for value in (cell.get("value"), cell.get("of_real"))]
        lines.append([entry["label"], *values, entry.get("seconds_each")])
    _csv(folder / TABLE, head, lines)
    single = [name for name in names if name in CLIP]
    lines = []
    for entry in sets:
        for number, clip in enumerate(entry["clips"]):
            prompt = clip["caption"] if "caption" in clip else result["prompts"][number // result["count"]]
            lines.append([entry["label"], number, prompt, clip["file"], *map(clip["metrics"].get, single)])
    _csv(folder / CLIPS, ["model", "number", "prompt", "file", *single], lines)


def _csv(path: Path, head: Sequence, lines: Iterable[Sequence]) -> None:
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *lines])


def _slug(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", label).strip("-.") or "model"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tell(result: dict, out: Path) -> None:
    names = list(dict.fromkeys(name for model in result["models"] for name in model["metrics"]))
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("")
    sets = [*result["models"], *([{"label": "real"} | result["real"]] if result["real"] else [])]
    for entry in sets:
        table.add_column(entry["label"].replace("[", "\\["), justify="right")
    for name in names:
        table.add_row(name, *(cell(entry["metrics"].get(name)) for entry in sets))
    console.print(table)
    console.print(f"{out / PAGE}", markup=False, highlight=False, soft_wrap=True)
