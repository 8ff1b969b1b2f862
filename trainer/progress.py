"""Progress bars with the losses beside them, and tables, in the terminal (rich)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

console = Console()
SHOWN = ("cd_loss_image", "cd_loss_video", "d_loss", "g_loss", "logit_real", "logit_fake", "r1")


@contextmanager
def stage_bar(title: str) -> Iterator[Callable[[int, int, dict], None]]:
    """A bar for one stage: call what it yields with (done, total, metrics)."""
    columns = (
        TextColumn("[bold]{task.description:<20}"), BarColumn(bar_width=12), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True, ratio=1)),  # takes the width that is left
    )  # fmt: skip
    title = escape(title)  # a folder's name may have brackets
    with Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task(title, total=None, losses="")

        def report(done: int, total: int, metrics: dict | None = None) -> None:
            losses = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics) if metrics else ""
            progress.update(task, completed=done, total=total, losses=losses)

        yield report


def columns_table(title: str, columns: dict[str, dict]) -> Table:
    """The report's columns as rows of a terminal table."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False, collapse_padding=True)  # 80 columns hold it
    names = ("fd", "patch_fd", "sharpness", "structure", "alignment", "diversity", "calls", "samples")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for column, row in columns.items():
        table.add_row(column, *(_cell(row[name]) for name in names))
    return table


def _cell(value) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value < 100 else f"{value:.0f}"
