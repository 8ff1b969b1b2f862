"""The commands that measure speed and memory on this machine."""

from typing import Annotated

import typer

from trainer.cli.app import USE, Device, Json, Overrides, Phase, Preset, Recipe, app

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory on this machine, with random weights of the true shapes.",
)
app.add_typer(bench, name="bench", rich_help_panel=USE)


@bench.command("inference")
def bench_inference(
    model: Annotated[
        str, typer.Option(help="mini, wan2.2-5b, wan2.1-1.3b, wan2.1-14b or seaweed-8b.")
    ] = "mini",
    json: Json = None,
    device: Device = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="How often each part runs; the median counts.")] = 5,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the engine's transformer and decoder; by default on a GPU.",
        ),
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Compute the engine's transformer in 8 bits.")] = False,
) -> None:
    """Time each part of a sample, beside the least time this hardware allows, stock diffusers and the paper.

    The parts are the text encoder, the transformer and the decoder.

    Also estimates the times on several GPUs.
    """
    from trainer.bench.inference import run
    from trainer.machines.machine import pick_device

    run(model, pick_device(device), repeats, compiled, fp8, json)


@bench.command("train")
def bench_train(
    preset: Preset = "mini",
    overrides: Overrides = None,
    recipe: Recipe = None,
    json: Json = None,
    phase: Phase = "video",
    updates: Annotated[
        int, typer.Option(min=2, help="Updates to time in each mode; the first does not count.")
    ] = 3,
) -> None:
    """Time an update of stage 2, with all weights and as a LoRA.

    Shows which share of the peak speed it reaches, and its memory beside what --dry-run counts.
    """
    from trainer.bench.train import run
    from trainer.config import load_recipe

    loaded, recipe = load_recipe(preset, recipe, overrides or (), ("train", "data", "model"), phase)
    given = {override.partition("=")[0].rpartition(".")[2] for override in overrides or ()}
    run(loaded, recipe, phase, updates, json, batch_given="batch" in given)
