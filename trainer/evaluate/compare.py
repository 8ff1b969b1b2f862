"""`evaluate`: sample several models at the same prompts and seeds, measure them (against real clips if there
are any), and write the results as JSON, CSV and a page.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from apt_core.errors import AptError
from apt_core.files.jsonfile import write_json
from apt_core.files.media_write import write_image, write_video
from apt_core.files.prompts import read_prompts
from trainer.config import Files
from trainer.machines.distributed import World
from trainer.machines.machine import versions
from trainer.run.folders import earlier_note
from trainer.run.progress import say, say_there, stage_bar

from .choice import AGAINST_REAL, chosen, opened, with_judge
from .clip_score import ClipScore, read_clip
from .features import Features, check_count, distance
from .measured import Desk, Measured, measure
from .metrics import CLIP_SCORE, DIVERSITY, EACH
from .models import Model, Wishes, open_models, sample, series, stamp, with_prompts
from .page import write_page
from .protocols import beside_paper, find_protocol, with_sizes
from .real import Real, find_real
from .tables import tell, write_tables
from .vbench import check_folder, lay_out

REALS = 16
"""How many real clips are used when their captions are the prompts."""
RESULT, PAGE = "evaluation.json", "evaluation.html"
REAL = "real"
T = TypeVar("T")


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
    vbench: Path | None = None,
    protocol: str | None = None,
    files: Files = Files(),
    world: World = World(),
) -> dict:
    """Sample every model at the same prompts and seeds, measure the samples, and write the folder `out`:
    evaluation.json, models.csv, clips.csv, evaluation.html and the samples. Returns what evaluation.json
    holds.

    prompts: a text file with one prompt per line; by default the captions of `data`.
    data: real clips, in a folder or in shards. The first `reals` of them are used, by default as many as
        there are samples of one model.
    features: a TOML file, see `features.Network` and `clip_score.ClipFolder`.
    emas: of each training state, the averages with these decays.
    protocol: a name in `protocols.PROTOCOLS`: its size where `wishes` has none, its metrics where `metrics`
        names none, and the paper's figures.
    vbench: a folder for copies of the samples as VBench takes them.
    world: its processes share the work; `out` must be one folder for all of them. What an evaluation of the
        same request had measured before it was stopped is kept.

    Raises AptError, before any weight is read, if there is no prompt, files do not fit each other, models
    make different sizes, `out` or `vbench` already holds files, or there are too few clips for a Frechet
    distance.
    """
    usual = find_protocol(protocol, prompts).metrics if protocol is not None else ()
    names = chosen(metrics, features, usual)
    if data is None and (against := next((name for name in AGAINST_REAL if name in names), None)):
        raise AptError(f"{against} compares with real clips: add --data FOLDER, or leave {against} out.")
    if reals is not None and data is None:
        raise AptError(
            f"--reals {reals} is a number of real clips, but there are none: "
            "add --data FOLDER, or leave it out."
        )
    if prompts is None and data is None:
        raise AptError("there is no prompt: give --prompts FILE, or --data with captions.")
    if protocol is not None:
        wishes = with_sizes(wishes, find_protocol(protocol, prompts))
    texts = read_prompts(prompts) if prompts else []
    for note in filter(None, (earlier_note(checkpoint, wishes.frames == 1) for checkpoint in checkpoints)):
        if world.main:
            say(note)
    models = open_models(checkpoints, emas, files, wishes)
    request, sources = models[0].request, models[0].sources
    if vbench is not None:
        _alike(world, lambda: check_folder(vbench, out, request.frames))
    real = None
    if data is not None:
        real = find_real(data, request, request.latents(sources), reals or len(texts) * wishes.count or REALS)
        texts = texts or real.prompts()
    if not texts:
        raise AptError(f"there is no prompt, and {data} has no captions: give --prompts FILE.")
    models = with_prompts(models, texts)
    names = with_judge(names, texts, request, named=metrics is not None or bool(usual))
    networks = opened(names, features, world.device)
    score = ClipScore(read_clip(features), world.device) if CLIP_SCORE in names else None
    _check_enough(networks, models[0], real)
    desk, asked = Desk(out), _asked(models, real, names, networks, score, wishes)
    _alike(world, lambda: desk.open(asked))
    columns = _measure(models, real, names, networks, score, desk, world)
    result = _alike(world, lambda: _result(models, real, names, networks, score, columns, wishes, world))
    if world.main:
        if protocol is not None:
            result["protocol"] = beside_paper(protocol, models[0].request, result)
        write_json(out / RESULT, result)
        write_tables(out, result)
        write_page(out / PAGE, result)
        commands = lay_out(vbench, out, result) if vbench else []
        desk.close()
        tell(result, out / PAGE, commands)
    world.barrier()
    return result


def _alike(world: World, work: Callable[[], T]) -> T:
    """Call `work` in the first process and return its result, or raise its AptError, in all of them."""
    found, said = None, None
    if world.main:
        try:
            found = work()
        except AptError as error:
            said = str(error)
    found, said = world.gather((found, said))[0]
    if said is not None:
        raise AptError(said)
    return found


def _asked(
    models: Sequence[Model],
    real: Real | None,
    names: Sequence[str],
    networks: Sequence[Features],
    score: ClipScore | None,
    wishes: Wishes,
) -> dict:
    """Everything that the figures depend on, as JSON values. Files are identified by path, size and age."""
    return {
        "models": [[model.label, model.ema, *map(stamp, model.files().values())] for model in models],
        "prompts": models[0].request.prompts,
        "wishes": asdict(wishes),
        "metrics": list(names),
        "networks": [network.network.model_dump(mode="json") for network in networks],
        "clip": score and [score.folder.model_dump(mode="json"), stamp(score.folder.path)],
        "real": real and [stamp(real.folder), real.names],
    }


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
    score: ClipScore | None,
    desk: Desk,
    world: World,
) -> dict[str | None, Measured]:
    """The measurements of each model by its label, made by all processes; those of the real clips have the
    key None. Empty in all but the first process.
    """
    samples = models[0].request.samples
    places = {None: REAL} if real else {}
    places |= {model.label: f"{n + 1:02d}-{_slug(model.label)}" for n, model in enumerate(models)}
    counts = {label: samples if label else len(real.names) for label in places}
    suffix = "png" if models[0].request.frames == 1 else "mp4"
    files = {
        label: [f"clips/{place}/{n:04d}.{suffix}" for n in range(counts[label])]
        for label, place in places.items()
    }
    prompts, count = models[0].request.prompts, models[0].request.count
    missing = world.gather({label: desk.missing(place, counts[label]) for label, place in places.items()})[0]
    there = sum(counts.values()) - sum(map(len, missing.values()))
    if world.main:
        say_there(there, sum(counts.values()), "clips", desk.folder)
    # shared out anew after a stop, so that no process has more than one clip more than another
    mine = {label: numbers[world.rank :: world.size] for label, numbers in missing.items()}
    total, done = sum(map(len, mine.values())), 0
    with stage_bar("Evaluating") as report:

        def take(label: str | None, clips: Iterable[np.ndarray]) -> None:
            nonlocal done
            start = time.perf_counter()
            for nth, (number, clip) in enumerate(zip(mine[label], clips)):
                seconds = time.perf_counter() - start
                words = prompts[number // count] if label else real.captions[number]
                found = measure(clip, names, networks, score, words)
                found = replace(found, seconds=seconds, first=nth == 0)
                _write(desk.out / files[label][number], clip, models[0])
                found.write(desk.record(places[label], number))
                done += 1
                report(done, total)
                start = time.perf_counter()

        for nth, model in enumerate(models):
            pipe = model.open(world.device)
            if real is not None and nth == 0:
                take(None, real.clips(model.request, pipe, mine[None]))
            if missing[model.label]:
                if world.main:
                    pipe.embed(model.request)  # the others find it in the cache, and load no encoder
                world.barrier()
            if mine[model.label]:
                take(model.label, sample(pipe, model.request, mine[model.label]))
            del pipe  # its weights make room for the next one's
    world.barrier()
    return (
        {label: desk.read(place, files[label], count if label else 1) for label, place in places.items()}
        if world.main
        else {}
    )


def _write(path: Path, clip: np.ndarray, model: Model) -> None:
    if len(clip) == 1:
        write_image(path, clip)
    else:
        write_video(path, clip, model.request.fps)


def _result(
    models: Sequence[Model],
    real: Real | None,
    names: Sequence[str],
    networks: Sequence[Features],
    score: ClipScore | None,
    columns: dict[str | None, Measured],
    wishes: Wishes,
    world: World,
) -> dict:
    request, digests, device = models[0].request, {}, world.device
    true = columns.get(None)

    def figures(column: Measured) -> dict:
        found = {}
        for name in names:
            if name in EACH:
                value, beside = column.mean(name), true.mean(name) if true else None
                ratio = value / beside if value is not None and beside and column is not true else None
                found[name] = {"value": value, "of_real": ratio}
        if DIVERSITY in names and column is not true:
            found[DIVERSITY] = {"value": column.diversity(), "of_real": None}
        if true is not None and column is not true:
            beside = true.features()
            for name, parts in column.features().items():
                found[name] = {"value": distance(beside[name], parts), "of_real": None}
        return found

    def clips(column: Measured) -> list[dict]:
        return [{"file": f, "metrics": record.row} for f, record in zip(column.files, column.records)]

    rows = []
    for model, number in zip(models, series(models)):
        column = columns[model.label]
        first, each = column.seconds()
        rows.append(
            model.facts(digests)
            | {
                "series": number,
                "seconds_first": first,
                "seconds_each": each,
                "metrics": figures(column),
                "clips": clips(column),
            }
        )
    used = [network.facts() for network in networks]
    if score:
        about = score.folder.model_dump(exclude={"path"})
        used.append({"name": CLIP_SCORE, "file": score.folder.path.name} | about)
    result = {
        "format": "apt-evaluation",
        "version": 1,
        "prompts": list(request.prompts),
        "seed": request.seed,
        "count": request.count,
        "size": {name: getattr(request, name) for name in ("height", "width", "frames", "fps")},
        "wishes": asdict(wishes),
        "features": used,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world.size,
        "versions": versions(),
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


def _slug(label: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", label).strip("-.") or "model"
