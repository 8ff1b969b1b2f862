"""Progress bars with the losses beside them, and tables, in the terminal (rich)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console()
SHOWN = ("cd_loss_image", "cd_loss_video", "d_loss", "g_loss", "logit_real", "logit_fake", "r1")


@contextmanager
def stage_bar(title: str) -> Iterator[Callable[[int, int, dict], None]]:
    """A bar for one stage: call what it yields with (done, total, metrics)."""
    columns = (
        TextColumn("[bold]{task.description:<22}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, losses="")

        def report(done: int, total: int, metrics: dict | None = None) -> None:
            losses = "  ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN if name in metrics) if metrics else ""
            progress.update(task, completed=done, total=total, losses=losses)

        yield report


def columns_table(title: str, columns: dict[str, dict]) -> Table:
    """The report's columns as rows of a terminal table."""
    table = Table(title=title, title_justify="left")
    names = ("fd", "patch_fd", "sharpness", "structure", "alignment", "diversity", "calls", "samples")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for column, row in columns.items():
        table.add_row(column, *(_cell(row[name]) for name in names))
    return table


def _cell(value) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"
