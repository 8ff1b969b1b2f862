"""The miniature's commands: demo, measure, ablate, plot, pretrain-mini."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.app import PROOF, Device, Json, Out, Phase, Pictures, Seed, SkipBad, TruncateCaptions, app


@app.command(rich_help_panel=PROOF)
def demo(
    out: Out = Path("runs/demo"),
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of captioned clips and pictures; without it, the demo draws its own."),
    ] = None,
    preset: Annotated[str, typer.Option(help="A preset's name, or a .toml file.")] = "mini",
    recipe: Annotated[
        str,
        typer.Option(
            help=(
                "One of the preset's recipes. mini has demo, proof (longer), paper (no warm-up, "
                "equal rates), stable (with what its authors changed since) and dmd (stage 1 by "
                "distribution matching)."
            )
        ),
    ] = "demo",
    seed: Seed = 0,
    samples: Annotated[int, typer.Option(min=2, help="Samples per column of the report.")] = 128,
    skip_bad: SkipBad = False,
    truncate_captions: TruncateCaptions = False,
) -> None:
    """Run the whole method in miniature: from clips to one-step video and a weights file for ComfyUI.

    Takes about ten minutes on two cores.
    """
    from trainer.config import load_recipe
    from trainer.proof.demo import Demo

    preset, recipe = _spelled_anew(preset, recipe)
    loaded, _ = load_recipe(preset, recipe)
    Demo(out, loaded, recipe, data, seed, samples, skip_bad, truncate_captions).run()


def _spelled_anew(preset: str, recipe: str) -> tuple[str, str]:
    """(preset, recipe), also if they are given the other way round, as `demo` took them at first."""
    from trainer.config import PRESETS, load_preset

    def is_preset(name: str) -> bool:
        return name.endswith(".toml") or (PRESETS / f"{name}.toml").is_file()

    if not is_preset(recipe) and (is_preset(preset) or preset not in load_preset("mini").stage2):
        return preset, recipe
    old = (recipe if is_preset(recipe) else "mini"), (preset if not is_preset(preset) else "demo")
    print(
        f"deprecated: say --preset {old[0]} --recipe {old[1]}; the two have changed places.", file=sys.stderr
    )
    return old


@app.command(rich_help_panel=PROOF)
def measure(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished demo runs.")],
    samples: Annotated[int, typer.Option(min=2, help="Samples for each column and run.")] = 1024,
    out: Json = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Compute the APT model's blocks in 8 bits.")] = False,
) -> None:
    """Judge finished runs on many new samples, and print a table with the means over the runs."""
    from trainer.proof.measure import measure_runs

    measure_runs(runs, samples, out, fp8)


@app.command(rich_help_panel=PROOF)
def ablate(
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Variants to run, or groups of them (sigma, updates, steps, batch, stage1); what they are "
            "compared with runs too. Separate them by commas, or give the option several times. "
            "By default all."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Number of seeds; intervals and verdicts need two or more.")
    ] = 3,
    out: Out = Path("runs/ablations"),
    run: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            "--with-run",
            help=(
                "Folder of a finished demo, whose data and stage 1 are used for its seed; "
                "for other seeds they are made. Can be given several times."
            ),
        ),
    ] = None,
    table: Annotated[
        list[Path] | None,
        typer.Option(
            help=(
                "The ablations.json of an earlier ablation; its rows are not made again. "
                "Can be given several times."
            )
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, help="Samples that each row is judged by, for each seed.")
    ] = 1024,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe of the reference row; by default that of --run, or the preset's first."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A preset's name, or a .toml file; by default that of --run, or mini."),
    ] = None,
    phase: Phase = "image",
    device: Device = "cpu",
) -> None:
    """Run the paper's ablations on the miniature: every variant with several seeds, beside the paper's claim.

    It takes hours. If it is stopped, it continues from the finished variants and seeds, and from the training
    states of the current one. Writes ablations.html, ablations.png and ablations.json.
    """
    import shlex

    from trainer.machines.machine import pick_device
    from trainer.proof.ablate import ablation

    names = [name.strip() for part in only or () for name in part.split(",")]
    made = ablation(out, preset, recipe, phase, samples, run or (), pick_device(device), table or ())
    made.run(seeds, names, shlex.join(["python", "-m", "trainer", *sys.argv[1:]]))


@app.command(rich_help_panel=PROOF)
def plot(
    run: Annotated[Path, typer.Argument(help="A run's folder, of the demo or of the trainer.")],
    out: Pictures = None,
) -> None:
    """Plot training curves as PNGs.

    They show the discriminator's accuracy (also on held-out samples), logits, losses, penalties, and the
    gradient at the sample.
    """
    from trainer.run.plot import plot_run

    for path in plot_run(run, out):
        print(path)


@app.command("pretrain-mini", rich_help_panel=PROOF)
def pretrain_mini(
    part: Annotated[
        str,
        typer.Argument(
            help=(
                "What to train: all, or one part: vae, sharpen, text, features, teacher or base, "
                "made in this order."
            )
        ),
    ] = "all",
    out: Out = Path("runs/pretrain-mini"),
    seed: Seed = 0,
    device: Device = "cpu",
    amp: Annotated[
        bool,
        typer.Option(
            "--amp", help="Train VAE, teacher and base in bf16 autocast, if the processor is fast at it."
        ),
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the transformer's blocks (needs a C++ compiler on a CPU)."),
    ] = False,
) -> None:
    """Rebuild the miniature's shipped files, which takes hours on a CPU.

    Finished parts are kept, and the base continues from where it was stopped.
    """
    from trainer.mini.pretrain import pretrain

    pretrain(part, out, seed=seed, device=device, amp=amp, compiled=compiled)
