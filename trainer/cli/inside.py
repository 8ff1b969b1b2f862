"""The commands that look inside the generator and the discriminator: probe, walk, attention."""

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.app import (
    INSIDE,
    Base,
    Checkpoint,
    Device,
    Ema,
    File,
    Frames,
    Height,
    Noise,
    Pictures,
    Prompts,
    Tokenizer,
    Width,
    app,
)


@app.command(rich_help_panel=INSIDE)
def probe(
    checkpoint: Checkpoint = Path("mini"),
    out: Annotated[Path, typer.Option(help="Folder for probe.png and probe.json.")] = Path("inside"),
    samples: Annotated[int, typer.Option(min=1, help="Samples that the probes are fitted on.")] = 512,
    held_out: Annotated[int, typer.Option(min=2, help="Other samples, to judge the probes on.")] = 128,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of shards with captions to sample; without it, the miniature makes up its own."
        ),
    ] = None,
    prompts: Prompts = None,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: Tokenizer = "",
    base: Base = "",
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    ema: Ema = None,
    device: Device = "auto",
    seed: Noise = 0,
) -> None:
    """Show how much of the final sample each generator block holds, by a linear probe (the paper's fig. 10).

    Writes a picture and the errors.
    """
    from apt_core.files.prompts import read_prompts
    from trainer.inside.opening import open_pipeline
    from trainer.inside.probe import run_probe

    pipe = open_pipeline(checkpoint, base, vae, text_encoder, tokenizer, ema, device, images=frames == 1)
    texts = read_prompts(prompts) if prompts else ()
    run_probe(
        pipe,
        out,
        samples=samples,
        held_out=held_out,
        prompts=texts,
        shards=data,
        seed=seed,
        height=height,
        width=width,
        frames=frames,
    )
    print(out / "probe.png")


@app.command(rich_help_panel=INSIDE)
def walk(
    checkpoint: Checkpoint = Path("mini"),
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; the miniature has one of its own.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="The seeds to walk through, separated by commas.")] = "0,1,2",
    frames: Annotated[
        int,
        typer.Option(
            min=2, help="Samples from one seed to the next, with the first seed's and without the next one's."
        ),
    ] = 12,
    out: Annotated[Path, typer.Option(help="Folder for walk.mp4, walk.png and walk.json.")] = Path("inside"),
    closed: Annotated[
        bool, typer.Option("--closed", help="Walk on from the last seed to the first.")
    ] = False,
    noise: Annotated[
        str, typer.Option(help="Whose noise a seed stands for: apt, as in generate, or comfyui.")
    ] = "apt",
    length: Annotated[
        int | None,
        typer.Option(help="Frames of each sample; by default what the checkpoint was trained for."),
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=240, help="Samples per second of the video.")] = 12,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: Tokenizer = "",
    base: Base = "",
    height: Height = None,
    width: Width = None,
    ema: Ema = None,
    device: Device = "auto",
) -> None:
    """Move the noise from seed to seed with one prompt (the paper's fig. 11).

    Writes a video, a sheet of samples, and the change from sample to sample.
    """
    from trainer.inside.opening import open_pipeline
    from trainer.inside.walk import read_seeds, run_walk

    pipe = open_pipeline(checkpoint, base, vae, text_encoder, tokenizer, ema, device, images=length == 1)
    for path in run_walk(
        pipe,
        prompt,
        read_seeds(seeds),
        frames,
        out,
        closed=closed,
        noise=noise,
        rate=fps,
        frames=length,
        height=height,
        width=width,
    ):
        print(path)


@app.command(rich_help_panel=INSIDE)
def attention(
    state: Annotated[
        Path, typer.Argument(help="A training state of stage 2 (states/video/step-...), or a run's folder.")
    ],
    out: Pictures = None,
    phase: Annotated[
        str | None,
        typer.Option(help="For a run's folder: image or video; by default video if it has one."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            min=1, help="How many real samples to show, with as many generated from their captions."
        ),
    ] = 3,
    data: Annotated[
        Path | None, typer.Option(help="Folder of shards with the real samples; by default the run's own.")
    ] = None,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: Tokenizer = "",
    base: Base = "",
    ema: Ema = None,
    device: Device = "auto",
    seed: Noise = 0,
) -> None:
    """Show where the discriminator looks: its heads' attention over real and generated samples, by depth."""
    from trainer.inside.attention import find_state, run_attention
    from trainer.inside.opening import open_pipeline

    path = find_state(state, phase)
    pipe = open_pipeline(path, base, vae, text_encoder, tokenizer, ema, device)
    for picture in run_attention(path, pipe, out, samples=samples, shards=data, seed=seed, base=base):
        print(picture)
