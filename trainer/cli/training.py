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
            "Folder of captioned videos and images, or a list of them (.jsonl, .csv). Without it, mini draws its own."
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


@app.command("settings", rich_help_panel=TRAIN)
def settings_command(
    preset: Annotated[
        str | None, typer.Argument(help="Print this preset's values instead of the defaults.")
    ] = None,
) -> None:
    """List every setting that KEY=VALUE can change, with its meaning and its default."""
    from trainer.config import load_preset
    from trainer.settings_list import settings_list

    width = max(72, shutil.get_terminal_size((100, 24)).columns)
    print("\n".join(settings_list(load_preset(preset) if preset else None, width)))


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
    loaded = _load(preset, recipe, overrides, ("distill", "train", "files", "data", "sampling", "model"))
    if dry_run:
        _show(loaded, "distill", None, gpus, gpu_memory, gpu_tflops)
        return
    from trainer.jobs.training import run_distill

    run_distill(loaded, out or RUNS / loaded.name, seed=seed, shards=shards)


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
    from trainer.config import load_preset

    if phase not in ("image", "video"):
        raise AptError(f"--phase {phase} is not known: it is image or video.")
    recipe = recipe or load_preset(preset).recipe
    load_preset(preset).phases(recipe)
    sections = (f"stage2.{recipe}.{phase}", "train", "files", "data", "sampling", "model")
    loaded = _load(preset, recipe, overrides, sections)
    if dry_run:
        _show(loaded, phase, recipe, gpus, gpu_memory, gpu_tflops, start)
        return
    from trainer.jobs.training import run_adversarial

    run_adversarial(
        loaded, phase, out or RUNS / loaded.name, recipe=recipe, start=start, seed=seed, shards=shards
    )


def _load(name: str, recipe: str | None, overrides: list[str] | None, sections: tuple[str, ...]):
    """The preset as a recipe changes it, by default its first, and then the command line."""
    from trainer.config import load_preset

    loaded = load_preset(name, overrides or (), sections)
    return loaded.with_recipe(recipe or loaded.recipe, overrides or (), sections)


def _show(
    preset,
    stage: str,
    recipe: str | None,
    gpus: int | None,
    memory: float,
    tflops: float,
    start: Path | None = None,
) -> None:
    from apt_core.models.attention import check_name
    from trainer.checkpoints.starting_models import RANDOM, find_base
    from trainer.jobs.dry_run import show_account
    from trainer.jobs.starts import open_start
    from trainer.jobs.tell import say
    from trainer.machines.machine import imagined, pick_device, this_machine
    from trainer.machines.parallel import attention_of

    given = preset.files.base not in ("", RANDOM)
    if gpus is not None:
        check_name(preset.train.attention)  # what is installed there is not known here
        machine, attention = imagined(gpus, memory, tflops), ""
    else:
        device = pick_device(preset.train.device)
        attention = str(attention_of(preset, device))
        if given:  # an account needs no base, but one that is given must be right
            find_base(preset)
        machine = this_machine(device, preset.train.compute)
    begin = open_start(start, preset, find_base(preset) if given else None) if start else None
    if begin and begin.note:
        say(begin.note)
    show_account(preset, stage, recipe, machine, attention, begin.frozen if begin else 0)
