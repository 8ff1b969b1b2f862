"""The command line: `python -m trainer COMMAND`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from apt_core.errors import AptError
from trainer.machines.ending import CODE, Terminated, ended_by_sigterm, say_stopped


class Commands(typer.core.TyperGroup):
    """A user's mistake is one sentence on stderr and exit code 2; Ctrl-C and SIGTERM say what is kept and
    exit with 130 and 143.
    """

    def invoke(self, ctx):
        try:
            with ended_by_sigterm():
                return super().invoke(ctx)
        except AptError as error:
            rank = int(os.environ.get("RANK", 0))
            print(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except (KeyboardInterrupt, Terminated) as stop:
            say_stopped()
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else CODE) from None


for stream in (
    sys.stdout,
    sys.stderr,
):  # a letter that the terminal does not know is shown as an escape, and ends nothing
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train, sample and measure APT models.",
)
Out = Annotated[Path, typer.Option(help="Folder for everything that the run makes.")]
MAX_SEED = 2**32 - 1
RUNS = Path("runs")
Preset = Annotated[
    str, typer.Argument(help="A preset's name (mini, wan2.1-1.3b-480p, ...), or a .toml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, for example updates=100 base=PATH."),
]
Recipe = Annotated[
    str | None, typer.Option(help="paper, stable or budget, whichever the preset has; by default its first.")
]
Run = Annotated[
    Path | None,
    typer.Option(
        "--out", help="The run's folder, which all its stages share; by default runs/NAME of the preset."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Every random number of the run derives from it.")
]
Shards = Annotated[
    Path | None, typer.Option(help="Folder of shards; by default the one that precompute made in --out.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only print what it needs: parameters, FLOPs, memory, hours. No weight is touched."
    ),
]
Gpus = Annotated[int | None, typer.Option(help="With --dry-run: for so many GPUs instead of this machine's.")]
Memory = Annotated[float, typer.Option(help="With --dry-run --gpus: GiB of each.")]
Tflops = Annotated[float, typer.Option(help="With --dry-run --gpus: the matrix peak of each.")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    data: Annotated[
        Path | None, typer.Option(help="Folder of captioned clips and pictures; without it, clips are drawn.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Which recipe of the preset: demo, proof (hours), paper (no warm-up, equal rates) or stable (what its authors changed since)."
        ),
    ] = "demo",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Every random number of the run derives from it.")
    ] = 0,
    samples: Annotated[int, typer.Option(min=2, help="Samples per column of the report.")] = 128,
    recipe: Annotated[str, typer.Option(help="Preset with the numbers: a name, or a .toml file.")] = "mini",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out clips that cannot be used, and list them.")
    ] = False,
    truncate_captions: Annotated[
        bool, typer.Option("--truncate-captions", help="Cut captions that are too long for the text encoder.")
    ] = False,
) -> None:
    """The whole method in miniature: clips in, one-step video and a weights file for ComfyUI out. About 8
    minutes on two cores.
    """
    from trainer.config import load_preset
    from trainer.proof.demo import Demo

    Demo(
        out, load_preset(recipe).with_recipe(preset), preset, data, seed, samples, skip_bad, truncate_captions
    ).run()


@app.command()
def measure(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished demo runs.")],
    samples: Annotated[int, typer.Option(min=2, help="Samples per column and run.")] = 1024,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON too.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="With the APT model's blocks in 8 bits.")] = False,
) -> None:
    """Judge finished runs on many fresh samples and print one table: means over the runs."""
    from trainer.proof.measure import measure_runs

    measure_runs(runs, samples, out, fp8)


@app.command()
def ablate(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="These variants (or groups: sigma, updates, steps, batch) and what they are compared with; commas or several times. By default all."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many; intervals and verdicts need two or more.")] = 3,
    out: Out = Path("runs/ablations"),
    run: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            "--with-run",
            help="Folder of a finished demo whose data and stage 1 are used for its seed; several times. For other seeds they are made.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Samples that each row is judged on, for each seed.")
    ] = 1024,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe of the reference row; by default the runs', or the preset's first."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Preset with the numbers: a name, or a .toml file; by default the runs', or mini."),
    ] = None,
    phase: Annotated[str, typer.Option(help="image or video.")] = "image",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "cpu",
) -> None:
    """The paper's ablations on the miniature: every variant over several seeds, with the paper's claim and
    whether it holds here.

    It takes hours, and goes on where it was stopped: a file for each finished variant and seed, training
    states for the one at hand.
    Leaves ablations.html, ablations.png and ablations.json.
    """
    import shlex

    from trainer.machines.machine import pick_device
    from trainer.proof.ablate import ablation

    names = [name.strip() for part in only or () for name in part.split(",")]
    table = ablation(out, preset, recipe, phase, samples, run or (), pick_device(device))
    table.run(seeds, names, shlex.join(["python", "-m", "trainer", *sys.argv[1:]]))


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="A run's folder, of the demo or of the trainer.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; by default the run's own.")
    ] = None,
) -> None:
    """Training curves as PNGs: the discriminator's accuracy, held-out samples included, logits, losses,
    penalties, gradient at the sample.
    """
    from trainer.run.plot import plot_run

    for path in plot_run(run, out):
        print(path)


@app.command("precompute")
def precompute_command(
    preset: Preset,
    overrides: Overrides = None,
    out: Run = None,
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
    from trainer.cli.commands import run_precompute
    from trainer.config import load_preset

    chosen = tuple(dict.fromkeys(kinds.split(",")))
    if not set(chosen) <= {"image", "video"}:
        raise AptError(f"--kinds {kinds} is not known: use image, video, or image,video.")
    loaded = load_preset(preset, overrides or (), ("data", "files", "train", "sampling", "model"))
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
    """Stage 1: consistency distillation of the base into one step."""
    from trainer.config import load_preset

    loaded = load_preset(preset, overrides or (), ("distill", "train", "files", "data", "sampling", "model"))
    loaded = loaded.with_recipe(recipe or loaded.variant)
    if dry_run:
        _show(loaded, "distill", None, gpus, gpu_memory, gpu_tflops)
        return
    from trainer.cli.commands import run_distill

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
    loaded = load_preset(
        preset, overrides or (), (f"stage2.{variant}.{phase}", "train", "files", "data", "sampling", "model")
    ).with_recipe(variant)
    if dry_run:
        _show(loaded, phase, variant, gpus, gpu_memory, gpu_tflops)
        return
    from trainer.cli.commands import run_adversarial

    run_adversarial(
        loaded, phase, out or RUNS / loaded.name, variant=variant, start=start, seed=seed, shards=shards
    )


def _show(preset, stage: str, variant: str | None, gpus: int | None, memory: float, tflops: float) -> None:
    from apt_core.models.attention import check_name
    from trainer.cli.dry_run import show_account
    from trainer.machines.machine import imagined, pick_device, this_machine
    from trainer.machines.parallel import attention_of

    if gpus is not None:
        check_name(preset.train.attention)  # what is installed there is not known here
        show_account(preset, stage, variant, imagined(gpus, memory, tflops))
        return
    device = pick_device(preset.train.device)
    attention = attention_of(preset, device)
    show_account(preset, stage, variant, this_machine(device, preset.train.compute), str(attention))


File = Annotated[
    str, typer.Option(help="A diffusers folder or a .safetensors file; the miniature's own is called mini.")
]


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
    ema: Annotated[
        float | None,
        typer.Option(help="Of a training state: the decay of the average to take; 0 for the raw weights."),
    ] = None,
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


Seen = Annotated[
    Path,
    typer.Argument(
        help="What generate takes: a checkpoint or LoRA file, a diffusers folder, a training state, a run's folder, or mini."
    ),
]
Ema = Annotated[
    float | None,
    typer.Option(help="Of a training state: the decay of the average to take; 0 for the raw weights."),
]
Noise = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the noise.")]


@app.command()
def probe(
    checkpoint: Seen = Path("mini"),
    out: Annotated[Path, typer.Option(help="Folder for probe.png and probe.json.")] = Path("inside"),
    samples: Annotated[int, typer.Option(min=1, help="Samples that the probes are fitted on.")] = 512,
    held_out: Annotated[int, typer.Option(min=2, help="Other samples, which they are judged on.")] = 128,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of shards, whose captions are sampled; the miniature draws its own."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line instead.")] = None,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: File = "",
    base: File = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    ema: Ema = None,
    device: str = "auto",
    seed: Noise = 0,
) -> None:
    """What each block of the generator holds of the final sample, by a linear probe (the paper's fig. 10): a
    picture, and the errors.
    """
    from trainer.checkpoints.generate import read_prompts
    from trainer.checkpoints.starting_models import with_defaults
    from trainer.inside.opening import open_pipeline
    from trainer.inside.probe import run_probe

    pipe = open_pipeline(
        checkpoint, with_defaults(checkpoint, base, vae, text_encoder, tokenizer), ema, device
    )
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


@app.command()
def walk(
    checkpoint: Seen = Path("mini"),
    prompt: Annotated[
        str | None, typer.Argument(help="One prompt; the miniature has one of its own.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="The seeds to walk through, with commas in between.")] = "0,1,2",
    frames: Annotated[
        int, typer.Option(min=2, help="Samples on the way from one seed to the next, its own counted once.")
    ] = 12,
    out: Annotated[Path, typer.Option(help="Folder for walk.mp4, walk.png and walk.json.")] = Path("inside"),
    closed: Annotated[
        bool, typer.Option("--closed", help="Walk on from the last seed to the first.")
    ] = False,
    noise: Annotated[str, typer.Option(help="What a seed means: apt, as in generate, or comfyui.")] = "apt",
    length: Annotated[
        int | None,
        typer.Option(help="Frames of each sample; by default what the checkpoint was trained for."),
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=240, help="Of the video: samples a second.")] = 12,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: File = "",
    base: File = "",
    height: int | None = None,
    width: int | None = None,
    ema: Ema = None,
    device: str = "auto",
) -> None:
    """One prompt, and noise that goes from seed to seed (the paper's fig. 11): a video, a sheet, and the
    change from sample to sample.
    """
    from trainer.checkpoints.starting_models import with_defaults
    from trainer.inside.opening import open_pipeline
    from trainer.inside.walk import read_seeds, run_walk

    pipe = open_pipeline(
        checkpoint, with_defaults(checkpoint, base, vae, text_encoder, tokenizer), ema, device
    )
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


@app.command()
def attention(
    state: Annotated[
        Path, typer.Argument(help="A training state of stage 2 (states/video/step-...), or a run's folder.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; by default the run's own.")
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(help="Of a run's folder: image or video; by default video where there is one."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Real samples, and as many generated ones of their captions.")
    ] = 3,
    data: Annotated[
        Path | None, typer.Option(help="Folder of shards with the real samples; by default the run's own.")
    ] = None,
    vae: File = "",
    text_encoder: File = "",
    tokenizer: File = "",
    base: File = "",
    ema: Ema = None,
    device: str = "auto",
    seed: Noise = 0,
) -> None:
    """Where the discriminator looks: its heads' attention over real and generated samples, at its three
    depths.
    """
    from trainer.checkpoints.starting_models import with_defaults
    from trainer.inside.attention import find_state, run_attention
    from trainer.inside.opening import open_pipeline

    path = find_state(state, phase)
    pipe = open_pipeline(path, with_defaults(path, base, vae, text_encoder, tokenizer), ema, device)
    for picture in run_attention(path, pipe, out, samples=samples, shards=data, seed=seed, base=base):
        print(picture)


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


bench = typer.Typer(
    no_args_is_help=True, help="Speed and memory on this machine, with random weights of the true shapes."
)
app.add_typer(bench, name="bench")
Json = Annotated[Path | None, typer.Option(help="Write the figures here as JSON too.")]


@bench.command("inference")
def bench_inference(
    model: Annotated[
        str, typer.Option(help="mini, wan2.2-5b, wan2.1-1.3b, wan2.1-14b or seaweed-8b.")
    ] = "mini",
    json: Json = None,
    device: str = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each part; their median counts.")] = 5,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the engine's transformer and decoder; by default on a GPU.",
        ),
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="The engine's transformer in 8 bits.")] = False,
) -> None:
    """Text, transformer, decode and total, beside their floors, stock diffusers and the paper; and a model of
    many GPUs.
    """
    from trainer.bench.inference import run
    from trainer.machines.machine import pick_device

    run(model, pick_device(device), repeats, compiled, fp8, json)


@bench.command("train")
def bench_train(
    preset: Preset = "mini",
    overrides: Overrides = None,
    json: Json = None,
    phase: Annotated[str, typer.Option(help="image or video.")] = "video",
    updates: Annotated[int, typer.Option(min=2, help="Updates of each mode; the first does not count.")] = 3,
) -> None:
    """Seconds per update of stage 2, whole and as a LoRA: its share of the matrix peak, and its memory beside
    the account.
    """
    from trainer.bench.train import run
    from trainer.config import load_preset

    variant = load_preset(preset).variant
    loaded = load_preset(preset, overrides or (), (f"stage2.{variant}.{phase}", "train", "data", "model"))
    run(
        loaded,
        phase,
        updates,
        json,
        batch_given=any(o.partition("=")[0].endswith("batch") for o in overrides or ()),
    )


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
    ema: Annotated[
        float | None,
        typer.Option(help="Of a training state: the decay of the average to take; 0 for the raw weights."),
    ] = None,
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


@app.command("pretrain-mini")
def pretrain_mini(
    part: Annotated[
        str,
        typer.Argument(
            help="What to train: all, or one of vae, sharpen, text, features, teacher, base, in that order."
        ),
    ] = "all",
    out: Out = Path("runs/pretrain-mini"),
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Every random number of the run derives from it.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    amp: Annotated[
        bool,
        typer.Option(
            "--amp", help="Train VAE, teacher and base in bf16 autocast, where the processor is fast at it."
        ),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the transformer's blocks (needs a C++ compiler on a CPU)."),
    ] = False,
) -> None:
    """Rebuild the miniature's shipped files. Hours on a CPU; finished parts are kept, and the base goes on
    where it was stopped.
    """
    from trainer.mini.pretrain import pretrain

    pretrain(part, out, seed=seed, device=device, amp=amp, compiled=compiled)


def main() -> None:
    """What `comfyui-apt` and `python -m trainer` run."""
    app(prog_name=None if sys.argv[0].endswith("__main__.py") else "comfyui-apt")


if __name__ == "__main__":
    app()
