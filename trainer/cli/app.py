"""What all commands share: how they end, what the library logs, and the options that several have."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from apt_core.errors import AptError
from trainer.machines.ending import CODE, Terminated, ended_by_sigterm, say_stopped


class ToStderr(logging.Handler):
    """Prints what is logged, as it is, to the stderr of the moment, if that takes it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(record.getMessage(), file=sys.stderr)
        except (OSError, ValueError):
            pass


@contextmanager
def library_on_stderr() -> Iterator[None]:
    """Shows what apt_core logs on stderr, once: what handlers other libraries have put on the root logger do
    not get it too.
    """
    log, handler = logging.getLogger("apt_core"), ToStderr()
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


class Commands(typer.core.TyperGroup):
    """A user's mistake is one sentence on stderr and exit code 2; Ctrl-C and SIGTERM say what is kept and
    exit with 130 and 143.
    """

    def invoke(self, ctx):
        try:
            with ended_by_sigterm(), library_on_stderr():
                return super().invoke(ctx)
        except AptError as error:
            rank = int(os.environ.get("RANK", 0))
            print(f"error: {error}" if rank == 0 else f"error in process {rank}: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except (KeyboardInterrupt, Terminated) as stop:
            say_stopped()
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else CODE) from None


# a letter that the terminal does not know is shown as an escape, and ends nothing
for stream in (
    sys.stdout,
    sys.stderr,
):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train, sample and measure APT models.",
)
RUNS = Path("runs")
MAX_SEED = 2**32 - 1

# Panels of the list of commands, and of each command's options.
TRAIN, USE, INSIDE, PROOF = "Train", "Use a model", "Look inside", "The miniature: proof and files"
SIZE, FILES, BASE, ENGINE, PLANNING = "Size", "Files of the model", "Base models only", "Engine", "Dry run"


def option(help: str, *names: str, panel: str | None = None, **more):
    """A typer option that stands in this panel of `--help`."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


# Options and arguments that several commands have.
Out = Annotated[Path, option("Folder for everything that the run makes.")]
Preset = Annotated[
    str, typer.Argument(help="A preset's name (mini, wan2.1-1.3b-480p, ...), or a .toml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings to change, for example updates=100 base=PATH; the command settings lists them all.",
    ),
]
Recipe = Annotated[
    str | None,
    option("One of the preset's recipes (paper, stable, budget, weekend, ...); by default its first."),
]
Run = Annotated[
    Path | None,
    option("The run's folder, the same for all its stages; by default runs/ and the preset's name.", "--out"),
]
Seed = Annotated[int, option("Seed of all random numbers of the run.", min=0, max=MAX_SEED)]
Shards = Annotated[Path | None, option("Folder of precompute's shards; by default the one in --out.")]
Phase = Annotated[str, option("Which phase: image or video.")]
SkipBad = Annotated[bool, option("Leave out files that cannot be used, and list them.", "--skip-bad")]
TruncateCaptions = Annotated[
    bool, option("Cut captions that are too long for the text encoder.", "--truncate-captions")
]
DryRun = Annotated[
    bool,
    option(
        "Only print what the stage needs: parameters, FLOPs, memory, hours. Reads no weights.",
        "--dry-run",
        panel=PLANNING,
    ),
]
Gpus = Annotated[int | None, option("Count for this many GPUs instead of for this machine.", panel=PLANNING)]
Memory = Annotated[float, option("With --gpus: memory of each GPU, in GiB.", panel=PLANNING)]
Tflops = Annotated[
    float, option("With --gpus: peak speed of each GPU in matrix products, in TFLOP/s.", panel=PLANNING)
]
File = Annotated[
    str,
    option("A diffusers folder or a .safetensors file; mini takes the miniature's.", panel=FILES),
]
Tokenizer = Annotated[
    str,
    option(
        "The folder with spiece.model, or that file; only needed if the text encoder's file has none in it.",
        panel=FILES,
    ),
]
Base = Annotated[
    str,
    option(
        "For a LoRA or a training state: the transformer beneath it; mini takes the miniature's.",
        panel=FILES,
    ),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint or LoRA file, a diffusers folder, a training state, a run's folder, or mini."
    ),
]
Ema = Annotated[
    float | None,
    option("For a training state: which average to use, by its decay; 0 takes the raw weights.", panel=FILES),
]
Prompts = Annotated[Path | None, option("Text file with one prompt per line.")]
Height = Annotated[int | None, option("Height in pixels; by default the checkpoint's own.", panel=SIZE)]
Width = Annotated[int | None, option("Width in pixels; by default the checkpoint's own.", panel=SIZE)]
Frames = Annotated[
    int | None,
    option("Frames of each sample; by default the checkpoint's own, and 1 makes pictures.", panel=SIZE),
]
Fps = Annotated[float | None, option("Frames per second; by default the checkpoint's own.", panel=SIZE)]
Guidance = Annotated[float, option("Scale of classifier-free guidance.", panel=BASE)]
Shift = Annotated[float, option("Shift of the sampling times.", panel=BASE)]
Negative = Annotated[str, option("Negative prompt.", panel=BASE)]
Device = Annotated[str, option("Where to compute: auto, cpu, cuda, cuda:1, ...", panel=ENGINE)]
Noise = Annotated[int, option("Seed of the noise.", min=0, max=2**64 - 1)]
Pictures = Annotated[Path | None, option("Folder for the pictures; by default the run's.")]
Json = Annotated[Path | None, option("Also write the figures to this JSON file.")]
