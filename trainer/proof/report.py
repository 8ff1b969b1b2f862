"""Sample and judge every column, and write report.json, compare.png and sample.mp4."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from apt_core.files.jsonfile import write_json
from apt_core.models.vae import load_vae
from trainer.mini import ASSETS, VAE
from trainer.mini.clips import Scene, draw
from trainer.mini.features import load_features
from trainer.mini.metrics import Reference
from trainer.run.pictures import comparison, sample_video
from trainer.run.progress import columns_table, console

from .evaluate import COLUMNS, TITLES, Models, Sampler, network_calls, through_vae, to_pixels

ROWS = 6
# No training and no other measurement uses these scenes: see the seeds of the other commands.
PROMPT_SEED, REFERENCE_SEED = 70_000, 80_000


@dataclass(frozen=True)
class Prompts:
    """What to sample, and what to compare the samples with.

    text: padded embeddings of the captions; real: real samples with these captions; reference: other real
    samples (both uint8 `[n, F, H, W, 3]`); scenes: what was drawn, or None for samples that were not drawn.
    """

    captions: list[str]
    text: Tensor
    real: np.ndarray
    reference: np.ndarray
    scenes: list[Scene] | None


def drawn_prompts(batches, kind: str, count: int, seed: int, frames: int) -> Prompts:
    """Draw new scenes: `count` for the prompts and the real column, and `count` others as the reference.

    frames: of each clip; an image has one.
    """
    moving = kind == "video"
    frames = frames if moving else 1
    real, scenes = draw(PROMPT_SEED + seed, range(count), moving, frames)
    reference, _ = draw(REFERENCE_SEED + seed, range(count), moving, frames)
    captions = [scene.caption for scene in scenes]
    return Prompts(captions, batches.embed(captions), real, reference, scenes)


def data_prompts(batches, kind: str, count: int, vae, report: Callable[[int], None]) -> Prompts:
    """Use the data's own samples, decoded by the VAE, for the prompts, the real column and the reference."""
    data = batches.datasets[kind]
    latents, text, captions = data.batch(list(range(min(count, len(data)))))
    real = to_pixels(vae, latents, report=report)
    return Prompts(captions, text, real, real, None)


def evaluate(
    prompts: Prompts,
    sampler: Sampler,
    vae,
    net,
    report: Callable[[int], None],
    columns: Sequence[str] = COLUMNS,
) -> tuple[dict, dict[str, np.ndarray]]:
    """The figures of each column, and the pixels they were measured on."""
    reference = Reference(net, prompts.reference)
    rows, pixels = {}, {}
    for column in columns:
        if column == "real":
            pixels[column] = prompts.real
        elif column == "real_vae":
            pixels[column] = through_vae(vae, prompts.real)
        else:
            pixels[column] = to_pixels(vae, sampler.latents(column), report=report)
        row = reference.measure(pixels[column], prompts.scenes)
        rows[column] = {key: None if value is None else round(value, 4) for key, value in row.items()}
        rows[column] |= {"calls": network_calls(column, sampler.sampling), "samples": len(prompts.captions)}
    return rows, pixels


def write_report(demo, files: dict[str, dict[str, Path]], batches, record: dict, report: Callable) -> dict:
    """The demo's last stage: sample every column, write pictures, video and report.json, print the tables.

    files: the models by kind and name; record: the earlier stages (RunState.record); report: called as
    report(done, total) for a progress bar.
    """
    started = time.perf_counter()
    vae, net = load_vae(VAE).to(demo.device), load_features(ASSETS / "features.safetensors")
    negative = batches.embed([demo.preset.sampling.negative_prompt])
    total, done = (
        5
        * sum(
            demo.samples if demo.data is None else min(demo.samples, len(batches.datasets[k])) for k in files
        ),
        0,
    )

    def advance(n: int) -> None:
        nonlocal done
        done += n
        report(done, max(done, total))

    result = {"columns": {}, "image_columns": {}}
    for kind, paths in files.items():
        if demo.data is None:
            prompts = drawn_prompts(batches, kind, demo.samples, demo.seed, demo.preset.data.frames)
        else:
            prompts = data_prompts(batches, kind, demo.samples, vae, lambda n: None)
        shape = tuple(batches.datasets[kind].batch([0])[0].shape[1:])
        sampler = Sampler(
            Models(**paths), demo.preset.sampling, kind, prompts.text, negative, shape, demo.seed, demo.device
        )
        rows, pixels = evaluate(prompts, sampler, vae, net, advance)
        result["columns" if kind == "video" else "image_columns"] = rows
        _pictures(demo, kind, prompts.captions, pixels, last=kind == list(files)[-1])
    result |= record
    result["seconds"] = record["seconds"] | {"report": round(time.perf_counter() - started, 2)}
    write_json(demo.out / "report.json", result)
    for name, title in (("image_columns", "Images"), ("columns", "Video")):
        if result[name]:
            console.print(
                columns_table(
                    f"{title} ({demo.recipe} recipe, seed {demo.seed}, {demo.samples} samples)", result[name]
                )
            )
    return result


def _pictures(demo, kind: str, captions: list[str], pixels: dict[str, np.ndarray], last: bool) -> None:
    sampling = demo.preset.sampling
    titles = [TITLES[column].format(steps=sampling.steps, guidance=sampling.guidance) for column in COLUMNS]
    cells = [[pixels[column][row] for column in COLUMNS] for row in range(min(ROWS, len(captions)))]
    comparison(demo.out / ("compare.png" if last else f"compare-{kind}.png"), titles, captions[:ROWS], cells)
    if last:
        sample_video(demo.out / "sample.mp4", pixels["apt_1"][:16], demo.preset.data.fps)
