"""What is done with a model: generate, evaluate, preference, export, inspect."""

from pathlib import Path
from typing import Annotated

import typer

from apt_core.errors import AptError
from trainer.cli.app import (
    BASE,
    ENGINE,
    FILES,
    MAX_SEED,
    USE,
    Base,
    Checkpoint,
    Device,
    Ema,
    File,
    Fps,
    Frames,
    Guidance,
    Height,
    Negative,
    Noise,
    Prompts,
    Shift,
    Tokenizer,
    Width,
    app,
    option,
)


@app.command(rich_help_panel=USE)
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts.")] = None,
    prompts: Prompts = None,
    out: Annotated[Path, option("Folder for the samples.")] = Path("samples"),
    vae: File = "",
    text_encoder: File = "",
    tokenizer: Tokenizer = "",
    base: Base = "",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Fps = None,
    count: Annotated[int, option("Samples per prompt.")] = 1,
    steps: Annotated[int, option("Network calls per sample; for a base model, Euler steps.")] = 1,
    guidance: Guidance = 1.0,
    shift: Shift = 5.0,
    negative: Negative = "",
    ema: Ema = None,
    context_parallel: Annotated[
        int, option("Under torchrun: how many processes make each sample together.", panel=ENGINE, min=1)
    ] = 1,
    backend: Annotated[
        str | None,
        option("Attention backend by diffusers' name; by default the best that is installed.", panel=ENGINE),
    ] = None,
    compiled: Annotated[
        bool,
        option(
            "Compile transformer and decoder. The result is kept for the next start.",
            "--compile",
            panel=ENGINE,
        ),
    ] = False,
    fp8: Annotated[
        bool,
        option("Compute the transformer's blocks in 8 bits, if the GPU can.", "--fp8", panel=ENGINE),
    ] = False,
    memory: Annotated[
        float | None,
        option("Use at most this many GiB of the device; by default all that is free.", panel=ENGINE),
    ] = None,
    tiny_decoder: Annotated[
        str,
        option("taew2_1 or taew2_2 (.safetensors) instead of the VAE: faster, less exact.", panel=FILES),
    ] = "",
    device: Device = "auto",
    seed: Annotated[
        int, option("Seed of the noise; sample n depends on the seed and n.", min=0, max=2**64 - 1)
    ] = 0,
    noise: Annotated[
        str,
        option("apt: no two samples share noise; comfyui: sample n has ComfyUI's noise of seed + n."),
    ] = "apt",
) -> None:
    """Make videos (.mp4) or pictures (.png) from prompts. Under torchrun the prompts are divided over the
    processes; the samples stay the same.

    By default no two samples share noise, whatever the seeds and the number of processes. --noise comfyui
    makes what ComfyUI makes of the same seed.
    """
    from apt_core.engine.request import Request
    from apt_core.files.prompts import read_prompts
    from trainer.checkpoints.generate import generate
    from trainer.checkpoints.starting_models import with_defaults
    from trainer.machines.distributed import connect
    from trainer.machines.machine import pick_device

    texts = [*(prompt or ()), *(read_prompts(prompts) if prompts else ())]
    request = Request(texts, height, width, frames, fps, count, seed, steps, guidance, shift, negative, noise)
    with connect(pick_device(device), context_parallel=context_parallel) as world:
        files = with_defaults(checkpoint, base, vae, text_encoder, tokenizer)
        fast = {
            "backend": backend,
            "compile": compiled,
            "fp8": fp8,
            "memory": memory,
            "tiny_decoder": tiny_decoder,
        }
        generate(checkpoint, request, out, files, world, ema, **fast)


@app.command(rich_help_panel=USE)
def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT", help="One or more checkpoints, in any form that generate takes."
        ),
    ],
    prompts: Annotated[
        Path | None, option("Text file with one prompt per line; by default the captions of --data.")
    ] = None,
    data: Annotated[Path | None, option("Real clips: a folder of media, or precompute's shards.")] = None,
    metrics: Annotated[
        str | None, option("Names of metrics, separated by commas; by default all that are possible.")
    ] = None,
    features: Annotated[
        Path | None,
        option("For distances and clip_score: a TOML file that names the networks, see docs/evaluate.md."),
    ] = None,
    out: Annotated[Path, option("Folder for figures, page and clips.")] = Path("evaluation"),
    protocol: Annotated[
        str | None,
        option(
            "Evaluate as the paper does: apt-images or apt-video. "
            "Takes its size and metrics, and shows its figures too."
        ),
    ] = None,
    vbench: Annotated[
        Path | None,
        option("Folder for copies of the samples under the names that VBench wants; its command is printed."),
    ] = None,
    seed: Noise = 0,
    count: Annotated[int, option("Samples per prompt; diversity needs 2 or more.", min=1)] = 1,
    steps: Annotated[int, option("Network calls of APT and distilled models.", min=1)] = 1,
    base_steps: Annotated[int, option("Euler steps.", panel=BASE, min=1)] = 25,
    guidance: Guidance = 7.5,
    shift: Shift = 5.0,
    negative: Negative = "",
    ema: Annotated[
        list[float] | None,
        option(
            "For training states: which average to use, by its decay; 0 takes the raw weights. "
            "Can be given several times.",
            panel=FILES,
        ),
    ] = None,
    reals: Annotated[
        int | None,
        option("How many real clips to use; by default as many as each model has samples.", min=1),
    ] = None,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: Tokenizer = "",
    base: Base = "",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Fps = None,
    device: Device = "auto",
) -> None:
    """Compare models at the same prompts and seeds: figures as JSON and CSV, and a page that plays the clips
    side by side.

    Under torchrun the samples are shared out. The same command goes on with one that was stopped.
    """
    from trainer.config import Files
    from trainer.evaluate.compare import evaluate
    from trainer.evaluate.models import Wishes
    from trainer.machines.distributed import connect
    from trainer.machines.machine import pick_device

    wishes = Wishes(count, seed, steps, base_steps, guidance, shift, negative, height, width, frames, fps)
    with connect(pick_device(device)) as world:
        evaluate(
            checkpoints,
            out,
            wishes,
            prompts=prompts,
            data=data,
            metrics=metrics,
            features=features,
            emas=ema or (),
            reals=reals,
            vbench=vbench,
            protocol=protocol,
            files=Files(base=base, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer),
            world=world,
        )


@app.command(rich_help_panel=USE)
def preference(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B | VOTES", help="Two folders of samples; with --votes, the raters' files."
        ),
    ],
    votes: Annotated[bool, option("Count votes instead of making a page.", "--votes")] = False,
    out: Annotated[Path | None, option("The page to write; with --votes, a file for the figures.")] = None,
    seed: Annotated[
        int, option("Seed that shuffles the order and the sides of the pairs.", min=0, max=MAX_SEED)
    ] = 0,
    link: Annotated[bool, option("Keep the samples beside the page instead of in it.", "--link")] = False,
    key: Annotated[
        Path | None, option("With --votes: the page's .key.json; by default the one beside the votes.")
    ] = None,
    unfinished: Annotated[bool, option("With --votes: count unfinished files too.", "--unfinished")] = False,
) -> None:
    """The paper's user study: make a blind page that compares two models' samples, or score the votes."""
    from trainer.preference.page import make_page
    from trainer.preference.votes import show_votes

    if votes:
        if link:
            raise AptError("--link is for making a page: leave it out with --votes.")
        show_votes(paths, key, unfinished, out)
        return
    if key is not None or unfinished:
        option = "--unfinished" if key is None else "--key"
        raise AptError(f"{option} is for counting votes: add --votes, or leave it out.")
    if len(paths) != 2:
        given = "1 path was" if len(paths) == 1 else f"{len(paths)} paths were"
        raise AptError(f"{given} given: a page needs two folders of samples, and votes need --votes.")
    make_page(*paths, out or Path("preference.html"), seed, link)


@app.command(rich_help_panel=USE)
def export(
    source: Checkpoint,
    out: Annotated[Path, option("The .safetensors file to write; for diffusers, the folder.")],
    form: Annotated[str, option("file (the whole model in one), lora, or diffusers (a folder).")] = "file",
    dtype: Annotated[str, option("fp32, fp16, bf16, or fp8 for ComfyUI.")] = "bf16",
    base: Annotated[
        str | None,
        option("For a LoRA file: the transformer it belongs to (mini for the miniature's)."),
    ] = None,
    ema: Ema = None,
) -> None:
    """Write a trained generator for other programs: one file for ComfyUI, a LoRA, or a diffusers folder."""
    from trainer.checkpoints.export import export

    print(export(source, out, form, dtype, base, ema))


@app.command(rich_help_panel=USE)
def inspect(
    path: Annotated[Path, typer.Argument(help="A file or folder of weights, shards or training states.")],
    deep: Annotated[bool, option("Also read every weight, to find NaN.", "--deep")] = False,
    base: Annotated[str | None, option("For a LoRA: the transformer to compare it with.")] = None,
) -> None:
    """Show what is in a checkpoint or training state, and whether it can be loaded."""
    from trainer.checkpoints.inspect import inspect

    for name, value in inspect(path, deep, base).items():
        first, *rest = value.split("\n")
        print("\n".join([f"{name:<16} {first}", *(f"{'':<16} {line}" for line in rest)]))
