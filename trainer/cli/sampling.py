"""What is done with a model: generate, evaluate, preference, export, inspect."""

from pathlib import Path
from typing import Annotated

import typer

from apt_core.errors import AptError
from trainer.cli.app import MAX_SEED, Ema, File, Noise, app


@app.command()
def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint or LoRA file, a diffusers folder, a training state, or a run's folder."
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the samples.")] = Path("samples"),
    vae: File = "",
    text_encoder: File = "",
    tokenizer: File = "",
    base: File = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    count: Annotated[int, typer.Option(help="Samples of each prompt.")] = 1,
    steps: Annotated[
        int, typer.Option(help="Calls of the network: by re-noising; of a base model, Euler steps.")
    ] = 1,
    guidance: Annotated[float, typer.Option(help="Of base models: the scale of CFG.")] = 1.0,
    shift: Annotated[float, typer.Option(help="Of base models: of the times.")] = 5.0,
    negative: Annotated[str, typer.Option(help="Of base models: the negative prompt.")] = "",
    ema: Ema = None,
    context_parallel: Annotated[
        int, typer.Option(min=1, help="Under torchrun: so many processes make each sample together.")
    ] = 1,
    backend: Annotated[
        str | None,
        typer.Option(help="Attention backend, diffusers' name; by default the best one installed."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile transformer and decoder; what is compiled is kept for the next start."
        ),
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="Weights and products of the transformer's blocks in 8 bits, where the card has them.",
        ),
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB of the device to keep within; by default what is free.")
    ] = None,
    tiny_decoder: Annotated[
        str,
        typer.Option(
            help="taew2_1 or taew2_2 (.safetensors) in the VAE's place: fast, and only near its pictures."
        ),
    ] = "",
    device: str = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="Of the noise: sample n's derives from seed and n.")
    ] = 0,
    noise: Annotated[
        str,
        typer.Option(
            help="apt: every sample's own, the default; comfyui: sample n has ComfyUI's noise of seed + n."
        ),
    ] = "apt",
) -> None:
    """Prompts to videos (.mp4) or pictures (.png). Under torchrun the prompts are shared out, and the samples
    stay the same.

    By default no two samples share noise, whatever the seeds, the batch and the processes. --noise comfyui
    makes what the same seed makes in ComfyUI.
    """
    from apt_core.engine.request import Request
    from trainer.checkpoints.generate import generate, read_prompts
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


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="What generate takes, one or more: files, folders, states, mini."
        ),
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt a line; by default the captions of --data.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Real clips: a folder of media, or the shards that precompute made.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Some of them, with commas between; by default all that can be had.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Of fd: a TOML file that names networks, see docs/evaluate.md.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures, page and clips.")] = Path("evaluation"),
    seed: Noise = 0,
    count: Annotated[int, typer.Option(min=1, help="Samples of each prompt; 2 or more show diversity.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Calls of APT and distilled models.")] = 1,
    base_steps: Annotated[int, typer.Option(min=1, help="Of base models: Euler steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Of base models: the scale of CFG.")] = 7.5,
    shift: Annotated[float, typer.Option(help="Of base models: of the times.")] = 5.0,
    negative: Annotated[str, typer.Option(help="Of base models: the negative prompt.")] = "",
    ema: Annotated[
        list[float] | None,
        typer.Option(
            help="Of training states: a decay to take, 0 for the raw weights; several times for more."
        ),
    ] = None,
    reals: Annotated[
        int | None,
        typer.Option(min=1, help="Real clips to take; by default as many as there are samples of one model."),
    ] = None,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: File = "",
    base: File = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    device: str = "auto",
) -> None:
    """Several models at the same prompts and seeds: figures as JSON and CSV, and a page that plays them side
    by side.

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
            files=Files(base=base, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer),
            world=world,
        )


@app.command()
def preference(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="A B | VOTES...", help="Two folders of samples; with --votes raters' files."),
    ],
    votes: Annotated[bool, typer.Option("--votes", help="Count votes instead of making a page.")] = False,
    out: Annotated[Path | None, typer.Option(help="The page, or a file for the figures.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the pairs' order and sides.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Samples beside the page, not in it.")] = False,
    key: Annotated[Path | None, typer.Option(help="With --votes: the page's .key.json.")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="With --votes: partial ones too.")] = False,
) -> None:
    """The paper's user study: a blind page that compares two models' samples, and the votes' scores."""
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


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint or LoRA file, a diffusers folder, a training state, or a run's folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors), or for diffusers the folder.")],
    form: Annotated[str, typer.Option(help="file, lora or diffusers.")] = "file",
    dtype: Annotated[str, typer.Option(help="fp32, fp16, bf16, or fp8 for ComfyUI.")] = "bf16",
    base: Annotated[
        str | None,
        typer.Option(help="Of a LoRA file: the transformer that it belongs to (mini for the miniature's)."),
    ] = None,
    ema: Ema = None,
) -> None:
    """A trained generator for other programs: one file that ComfyUI opens, a LoRA, or a diffusers folder."""
    from trainer.checkpoints.export import export

    print(export(source, out, form, dtype, base, ema))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A file or folder of weights, shards or training states.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every weight too, to find NaN.")] = False,
    base: Annotated[str | None, typer.Option(help="Of a LoRA: the transformer to compare it with.")] = None,
) -> None:
    """What is in a checkpoint, and whether it would load."""
    from trainer.checkpoints.inspect import inspect

    for name, value in inspect(path, deep, base).items():
        print(f"{name:<16} {value}")
