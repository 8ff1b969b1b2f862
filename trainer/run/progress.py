"""Progress bars with losses, and tables, in the terminal (rich)."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trainer.aside import Aside


class _Screen:
    """stdout. If it fails (a full disk, a closed pipe), that is said once on stderr and work continues."""

    def __init__(self) -> None:
        self._aside = Aside("what is shown")

    def write(self, text: str) -> int:
        self._aside(sys.stdout.write, text)
        return len(text)

    def flush(self) -> None:
        self._aside(sys.stdout.flush)

    def isatty(self) -> bool:
        return not self._aside.off and sys.stdout.isatty()

    def fileno(self) -> int:
        return sys.stdout.fileno()

    @property
    def encoding(self) -> str:
        return sys.stdout.encoding


console = Console(file=_Screen())


def say(line: str) -> None:
    """Print a line as it is, without markup or wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def say_there(there: int, of: int, what: str, folder: Path) -> None:
    """Say how many of the files to make (`what`: "clips") an earlier run has made, if it has."""
    if there:
        say(f"{there} of {of} {what} are in {folder} already.")


SHOWN = {
    "cd_loss_image": "cd_loss_image",
    "cd_loss_video": "cd_loss_video",
    "fake_loss_image": "fake_loss_image",
    "fake_loss_video": "fake_loss_video",
    "dmd_gap_image": "gap_image",
    "dmd_gap_video": "gap_video",
    "d_loss": "d_loss",
    "g_loss": "g_loss",
    "logit_real": "real",
    "logit_fake": "fake",
    "right_pairs": "right",
    "held_right_pairs": "right (held out)",
    "motion_of_real": "motion",
    "travel_of_real": "travel",
    "r1_loss": "\u03bbr1",
    "r1": "r1",
    "r2": "r2",
    "r1_gamma": "\u03bb\u03c3\u00b2",
    "r1_gamma_time": "\u03bb\u03c3\u00b2 in time",
    "g_grad_norm": "grad at sample",
    "judged": "judged",
    "judged_motion": "its motion",
    "samples_per_second": "samples/s",
    "mfu": "MFU",
    "memory_gib": "GiB",
}
"""The metrics below the bar: name in the history -> name on screen."""
LINE_SECONDS = 30.0


class _Bar(Progress):
    """A bar with the metrics on a line below, where they may take the whole width."""

    def get_renderables(self):
        yield from super().get_renderables()
        yield from (
            Text(task.fields["metrics"], style="dim") for task in self.tasks if task.fields["metrics"]
        )


@contextmanager
def stage_bar(title: str) -> Iterator[Callable[[int, int, dict], None]]:
    """A progress bar for one stage: yields a function to call with (done, total, metrics). Without a
    terminal, as in a batch system's log, it prints a line twice a minute instead.
    """
    if not console.is_terminal:
        yield _Lines(title)
        return
    columns = (
        TextColumn("[bold]{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _Bar(*columns, console=console, expand=True) as progress:
        task = progress.add_task(escape(title), total=None, metrics="")  # a folder's name may have brackets

        def report(done: int, total: int, metrics: dict | None = None) -> None:
            progress.update(task, completed=done, total=total, metrics=_words(metrics))

        yield report


class _Lines:
    """Prints the first report, the last one, and one every LINE_SECONDS in between."""

    def __init__(self, title: str) -> None:
        self.title, self.started, self.next = title, time.monotonic(), 0.0

    def __call__(self, done: int, total: int, metrics: dict | None = None) -> None:
        elapsed = time.monotonic() - self.started
        if elapsed < self.next and done < total:
            return
        self.next = elapsed + LINE_SECONDS
        line = f"{self.title} {done}/{total}, {timedelta(seconds=round(elapsed))}  {_words(metrics)}"
        say(line.rstrip())


def _words(metrics: dict | None) -> str:
    return (
        "  ".join(f"{word} {metrics[name]:.3g}" for name, word in SHOWN.items() if name in metrics)
        if metrics
        else ""
    )


def columns_table(title: str, columns: dict[str, dict]) -> Table:
    """The report's columns as rows of a terminal table."""
    # 80 columns hold it
    table = Table(
        title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    # samples stand in the title
    names = (
        "fd",
        "patch_fd",
        "sharpness",
        "structure",
        "alignment",
        "diversity",
        "motion",
        "calls",
    )
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for column, row in columns.items():
        table.add_row(column, *(_cell(row.get(name)) for name in names))
    return table


def criteria_table(rows: list[dict]) -> Table:
    """The criteria of a measurement, and in how many runs each one holds; see trainer.proof.criteria."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("asked", "ratio by run", "holds in"):
        table.add_column(name, justify="left")
    for row in rows:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        table.add_row(f"{row['name']}\n  {row['asked']}", ratios, f"{row['holds']} of {row['runs']}")
    return table


def _cell(value) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value < 100 else f"{value:.0f}"
