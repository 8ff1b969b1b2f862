"""The command line: `python -m trainer COMMAND`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from apt_core.errors import AptError


class Commands(typer.core.TyperGroup):
    """A user's mistake is one sentence on stderr and exit code 2; Ctrl-C says what is kept and exits with 130."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except AptError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("stopped; what is finished is kept, and the same command goes on from there.", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Train, sample and measure APT models.")
Out = Annotated[Path, typer.Option(help="Folder for everything that the run makes.")]
MAX_SEED = 2**32 - 1


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    data: Annotated[Path | None, typer.Option(help="Folder of captioned clips and pictures; without it, clips are drawn.")] = None,
    preset: Annotated[str, typer.Option(help="Stage 2 as in the paper, or with what its authors changed since: paper or stable.")] = "paper",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Every random number of the run derives from it.")] = 0,
    samples: Annotated[int, typer.Option(min=2, help="Samples per column of the report.")] = 128,
    recipe: Annotated[str, typer.Option(help="Preset with the numbers: a name, or a .toml file.")] = "mini",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out clips that cannot be used, and list them.")] = False,
    truncate_captions: Annotated[bool, typer.Option("--truncate-captions", help="Cut captions that are too long for the text encoder.")] = False,
) -> None:
    """The whole method in miniature: clips in, one-step video and a weights file for ComfyUI out. About 8 minutes on two cores."""
    from trainer.config import load_preset
    from trainer.demo import Demo

    Demo(out, load_preset(recipe), preset, data, seed, samples, skip_bad, truncate_captions).run()


@app.command()
def measure(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished demo runs.")],
    samples: Annotated[int, typer.Option(min=2, help="Samples per column and run.")] = 1024,
    out: Annotated[Path | None, typer.Option(help="Write the figures here as JSON too.")] = None,
) -> None:
    """Judge finished runs on many fresh samples and print one table: means over the runs."""
    from trainer.mini.measure import measure_runs

    measure_runs(runs, samples, out)


@app.command("pretrain-mini")
def pretrain_mini(
    part: Annotated[str, typer.Argument(help="What to train: all, vae, text, features or base, in that order.")] = "all",
    out: Out = Path("runs/pretrain-mini"),
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Every random number of the run derives from it.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="Train the VAE in bf16 autocast, where the processor is fast at it.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks (needs a C++ compiler on a CPU).")] = False,
) -> None:
    """Rebuild the miniature's shipped files. Hours on a CPU; finished parts are kept, and the base goes on where it was stopped."""
    from trainer.mini.pretrain import pretrain

    pretrain(part, out, seed=seed, device=device, amp=amp, compiled=compiled)


if __name__ == "__main__":
    app()
