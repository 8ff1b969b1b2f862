"""What all commands share: how they end, what the library has to say, and the options that several of them have."""

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
    str | None,
    typer.Option(help="paper, stable, budget or weekend, whichever the preset has; by default its first."),
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
File = Annotated[
    str, typer.Option(help="A diffusers folder or a .safetensors file; the miniature's own is called mini.")
]
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
Json = Annotated[Path | None, typer.Option(help="Write the figures here as JSON too.")]
