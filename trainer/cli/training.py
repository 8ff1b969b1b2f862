"""Precompute and the two stages of training."""

from pathlib import Path
from typing import Annotated

import typer

from apt_core.errors import AptError
from trainer.cli.app import (
    RUNS,
    DryRun,
    Gpus,
    Memory,
    Overrides,
    Preset,
    Recipe,
    Run,
    Seed,
    Shards,
    Tflops,
    app,
)


@app.command("precompute")
def precompute_command(
    preset: Preset,
    overrides: Overrides = None,
    out: Run = None,
    recipe: Recipe = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of captioned videos and images, or a list of them (.jsonl, .csv). mini draws its own without."
        ),
    ] = None,
    kinds: Annotated[str, typer.Option(help="image, video, or both: image,video.")] = "image,video",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files that cannot be used, and list them.")
    ] = False,
    truncate_captions: Annotated[
        bool, typer.Option("--truncate-captions", help="Cut captions that are too long for the text encoder.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Videos and images with captions to shards of latents and text embeddings. Resumable; under torchrun
    each process takes its share.
    """
    from trainer.jobs.training import run_precompute

    chosen = tuple(dict.fromkeys(kinds.split(",")))
    if not set(chosen) <= {"image", "video"}:
        raise AptError(f"--kinds {kinds} is not known: use image, video, or image,video.")
    loaded = _load(preset, recipe, overrides, ("data", "files", "train", "sampling", "model"))
    run_precompute(
        loaded,
        data,
        out or RUNS / loaded.name,
        kinds=chosen,
        skip_bad=skip_bad,
        truncate_captions=truncate_captions,
        seed=seed,
    )


@app.command("distill")
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
    """Stage 1: distillation of the base into one step, by consistency or by distribution matching
    (method=dmd).
    """
    loaded = _load(preset, recipe, overrides, ("distill", "train", "files", "data", "sampling", "model"))
    if dry_run:
        _show(loaded, "distill", None, gpus, gpu_memory, gpu_tflops)
        return
    from trainer.jobs.training import run_distill

    run_distill(loaded, out or RUNS / loaded.name, seed=seed, shards=shards)


@app.command("adversarial")
def adversarial_command(
    preset: Preset,
    overrides: Overrides = None,
    phase: Annotated[str, typer.Option(help="image or video.")] = ...,
    out: Run = None,
    recipe: Recipe = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--start-from",
            "--start",
            help="The generator's first weights; by default what the stage before left in --out. (torchrun takes --start for its own.)",
        ),
    ] = None,
    seed: Seed = 0,
    shards: Shards = None,
    dry_run: DryRun = False,
    gpus: Gpus = None,
    gpu_memory: Memory = 80,
    gpu_tflops: Tflops = 800,
) -> None:
    """Stage 2: one phase of adversarial post-training. The same command goes on where it was stopped."""
    from trainer.config import load_preset

    if phase not in ("image", "video"):
        raise AptError(f"--phase {phase} is not known: it is image or video.")
    variant = recipe or load_preset(preset).variant
    load_preset(preset).phases(variant)
    sections = (f"stage2.{variant}.{phase}", "train", "files", "data", "sampling", "model")
    loaded = _load(preset, variant, overrides, sections)
    if dry_run:
        _show(loaded, phase, variant, gpus, gpu_memory, gpu_tflops)
        return
    from trainer.jobs.training import run_adversarial

    run_adversarial(
        loaded, phase, out or RUNS / loaded.name, variant=variant, start=start, seed=seed, shards=shards
    )


def _load(name: str, recipe: str | None, overrides: list[str] | None, sections: tuple[str, ...]):
    """The preset as a recipe changes it, by default its first, and then the command line."""
    from trainer.config import load_preset

    loaded = load_preset(name, overrides or (), sections)
    return loaded.with_recipe(recipe or loaded.variant, overrides or (), sections)


def _show(preset, stage: str, variant: str | None, gpus: int | None, memory: float, tflops: float) -> None:
    from apt_core.models.attention import check_name
    from trainer.checkpoints.starting_models import RANDOM, find_base
    from trainer.jobs.dry_run import show_account
    from trainer.machines.machine import imagined, pick_device, this_machine
    from trainer.machines.parallel import attention_of

    if gpus is not None:
        check_name(preset.train.attention)  # what is installed there is not known here
        show_account(preset, stage, variant, imagined(gpus, memory, tflops))
        return
    device = pick_device(preset.train.device)
    attention = attention_of(preset, device)
    if preset.files.base not in ("", RANDOM):  # an account needs no base, but one that is given must be right
        find_base(preset)
    show_account(preset, stage, variant, this_machine(device, preset.train.compute), str(attention))
