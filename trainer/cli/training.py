"""Precompute and the two stages of training."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from apt_core.errors import AptError
from trainer.cli.app import (
    RUNS,
    TRAIN,
    DryRun,
    Gpus,
    Memory,
    Overrides,
    Phase,
    Preset,
    Recipe,
    Run,
    Seed,
    Shards,
    SkipBad,
    Tflops,
    TruncateCaptions,
    app,
    option,
)


@app.command("precompute", rich_help_panel=TRAIN)
def precompute_command(
    preset: Preset,
    overrides: Overrides = None,
    out: Run = None,
    recipe: Recipe = None,
    data: Annotated[
        Path | None,
        option(
            "Folder of captioned videos and images, or a list of them (.jsonl, .csv). "
            "Without it, mini draws its own."
        ),
    ] = None,
    kinds: Annotated[str, option("What to encode: image, video, or both: image,video.")] = "image,video",
    skip_bad: SkipBad = False,
    truncate_captions: TruncateCaptions = False,
    seed: Seed = 0,
) -> None:
    """Encode captioned videos and images into shards of latents and text embeddings. Can be resumed; under
    torchrun the work is divided over the processes.
    """
    from trainer.config import load_recipe
    from trainer.jobs.training import run_precompute

    chosen = tuple(dict.fromkeys(kinds.split(",")))
    if not set(chosen) <= {"image", "video"}:
        raise AptError(f"--kinds {kinds} is not known: use image, video, or image,video.")
    sections = ("data", "files", "train", "sampling", "model")
    loaded, _ = load_recipe(preset, recipe, overrides or (), sections)
    run_precompute(
        loaded,
        data,
        out or RUNS / loaded.name,
        kinds=chosen,
        skip_bad=skip_bad,
        truncate_captions=truncate_captions,
        seed=seed,
    )


@app.command("settings", rich_help_panel=TRAIN)
def settings_command(
    preset: Annotated[
        str | None, typer.Argument(help="Print this preset's values instead of the defaults.")
    ] = None,
    recipe: Recipe = None,
) -> None:
    """List every setting that KEY=VALUE can change, with its meaning and its default."""
    from trainer.config import load_recipe
    from trainer.settings_list import settings_list

    if recipe and not preset:
        raise AptError(f"--recipe {recipe} is one of a preset's: name the preset, or leave it out.")
    chosen = load_recipe(preset, recipe) if preset else (None, None)
    width = max(72, shutil.get_terminal_size((100, 24)).columns)
    print("\n".join(settings_list(*chosen, width=width)))


@app.command("distill", rich_help_panel=TRAIN)
def distill_command(
    preset: Preset,
    overrides: Overrides = None,
    out: Run = None,
    recipe: Recipe = None,
    seed: Seed = 0,
    shards: Shards = None,
    dry_run: DryRun = False,
    gpus: Gpus = None,
    gpu_memory: Memory = 80,
    gpu_tflops: Tflops = 800,
) -> None:
    """Stage 1: distil the base model into one step, by consistency or distribution matching (method=dmd)."""
    from trainer.config import load_recipe

    sections = ("distill", "train", "files", "data", "sampling", "model")
    loaded, _ = load_recipe(preset, recipe, overrides or (), sections)
    out = out or RUNS / loaded.name
    if dry_run:
        _show(loaded, "distill", out, gpus, gpu_memory, gpu_tflops)
        return
    from trainer.jobs.training import run_distill

    run_distill(loaded, out, seed=seed, shards=shards)


@app.command("adversarial", rich_help_panel=TRAIN)
def adversarial_command(
    preset: Preset,
    overrides: Overrides = None,
    phase: Phase = ...,
    out: Run = None,
    recipe: Recipe = None,
    start: Annotated[
        Path | None,
        option(
            "The generator's first weights; by default the result of the previous stage in --out. Under "
            "torchrun only the long name works.",
            "--start-from",
            "--start",
        ),
    ] = None,
    seed: Seed = 0,
    shards: Shards = None,
    dry_run: DryRun = False,
    gpus: Gpus = None,
    gpu_memory: Memory = 80,
    gpu_tflops: Tflops = 800,
) -> None:
    """Stage 2: one phase of adversarial post-training. The same command continues a run that was stopped."""
    from trainer.config import load_recipe

    sections = ("train", "files", "data", "sampling", "model")
    loaded, recipe = load_recipe(preset, recipe, overrides or (), sections, phase)
    out = out or RUNS / loaded.name
    if dry_run:
        _show(loaded, phase, out, gpus, gpu_memory, gpu_tflops, recipe=recipe, start=start)
        return
    from trainer.jobs.training import run_adversarial

    run_adversarial(loaded, phase, out, recipe=recipe, start=start, seed=seed, shards=shards)


def _show(
    preset,
    stage: str,
    out: Path,
    gpus: int | None,
    memory: float,
    tflops: float,
    **options,
) -> None:
    """Print the plan of a stage on this machine or, with `gpus`, on one that is described. options: as for
    `make_plan`.
    """
    from trainer.jobs.plan import make_plan
    from trainer.jobs.tell import show_plan
    from trainer.machines.machine import imagined

    machine = None if gpus is None else imagined(gpus, memory, tflops)
    show_plan(make_plan(preset, stage, out, dry_run=True, machine=machine, **options))
