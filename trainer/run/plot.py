"""Training curves of a run as pictures: the discriminator's accuracy, the losses, the gradient that reaches
the generator, and how much its clips move.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from apt_core.errors import AptError
from apt_core.files.atomic import replacing

# Okabe and Ito's colours, which colour-blind people can tell apart; each also has its own line style.
BLUE, ORANGE, GREEN, RED, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#000000"
FEW = 20  # points, which show as points: a single one has no line


@dataclass(frozen=True)
class Line:
    """One column of history.csv in a panel."""

    column: str
    label: str
    color: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One plot. lines: drawn if the history has their columns. level: height and label of a horizontal
    line.
    """

    title: str
    lines: tuple[Line, ...]
    level: tuple[float, str] | None = None
    log: bool = False


JUDGED = Panel("judged, the lower the better", (Line("judged", "average, at each state", RED),))
ADVERSARIAL = (
    Panel(
        "right side of the discriminator (0.5 is chance)",
        (
            Line("right_pairs", "pairs, in training", BLUE),
            Line("held_right_pairs", "pairs, held out", BLACK, "--"),
            Line("right_real", "real", GREEN, "-."),
            Line("right_fake", "generated", ORANGE, ":"),
        ),
        (0.5, "chance"),
    ),
    Panel(
        "logits",
        (Line("logit_real", "real", GREEN), Line("logit_fake", "generated", ORANGE, "--")),
        (0.0, ""),
    ),
    Panel(
        "losses",
        (
            Line("d_adversarial", "discriminator, adversarial", BLUE),
            Line("r1_loss", "penalty, lambda aR1", RED, "--"),
            Line("r2_loss", "penalty, lambda aR2", BLACK, "-."),
            Line("g_loss", "generator", ORANGE, ":"),
        ),
        (2 * math.log(2), "2 ln 2: equal logits"),
    ),
    Panel("gradient at the generated sample", (Line("g_grad_norm", "norm", BLUE),), log=True),
    Panel(
        "motion of one-step clips",
        (
            Line("motion_of_real", "latents, of real clips'", BLUE),
            Line("motion_of_start", "latents, of the start's", ORANGE, "--"),
            Line("travel_of_real", "travel, of real clips'", BLACK, "-."),
            Line("travel_of_start", "travel, of the start's", GREEN, ":"),
            Line("judged_motion", "latents of the average, of real clips'", RED, ":"),
        ),
        (1.0, "as much"),
    ),
    JUDGED,
)
DISTILL = (
    Panel(
        "consistency loss",
        (Line("cd_loss_image", "images", BLUE), Line("cd_loss_video", "videos", ORANGE, "--")),
        log=True,
    ),
    Panel(
        "of it at t = 1",
        (Line("cd_loss_final_image", "images", BLUE), Line("cd_loss_final_video", "videos", ORANGE, "--")),
        log=True,
    ),
    Panel(
        "loss of the fake score",
        (Line("fake_loss_image", "images", BLUE), Line("fake_loss_video", "videos", ORANGE, "--")),
        log=True,
    ),
    Panel(
        "between the clean predictions of real and fake score",
        (Line("dmd_gap_image", "images", BLUE), Line("dmd_gap_video", "videos", ORANGE, "--")),
        log=True,
    ),
    Panel(
        "from the sample to the real score's prediction",
        (
            Line("dmd_real_distance_image", "images", BLUE),
            Line("dmd_real_distance_video", "videos", ORANGE, "--"),
        ),
    ),
    Panel(
        "distance to the base's own samples",
        (
            Line("dmd_regression_loss_image", "images", BLUE),
            Line("dmd_regression_loss_video", "videos", ORANGE, "--"),
        ),
        log=True,
    ),
    Panel(
        "motion of one-step clips",
        (Line("judged_motion", "latents of the average, of real clips'", RED),),
        (1.0, "as much"),
    ),
    JUDGED,
)
PANELS = {"distill": DISTILL, "image": ADVERSARIAL, "video": ADVERSARIAL}
TITLES = {"distill": "Stage 1: distillation", "image": "Stage 2: images", "video": "Stage 2: video"}


def plot_run(run: Path, out: Path | None = None) -> list[Path]:
    """Write curves-STAGE.png for each stage that has a history in `run`/log, to `out` (by default the run's
    folder). Returns the paths. Raises AptError if there is no history, or one is damaged.
    """
    histories = {stage: run / "log" / stage / "history.csv" for stage in PANELS}
    found = {stage: path for stage, path in histories.items() if path.is_file()}
    if not found:
        raise AptError(
            f"{run} has no training log (log/STAGE/history.csv): give the folder that was --out in training."
        )
    return [
        plot(read_history(path), stage, (out or run) / f"curves-{stage}.png") for stage, path in found.items()
    ]


def read_history(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """For each column, the updates at which it has a value, and the values."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name != "update" and value:
                        updates, values = columns.setdefault(name, ([], []))
                        updates.append(int(row["update"]))
                        values.append(float(value))
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        raise AptError(
            f"{path} is damaged, a row cannot be read as numbers: remove it, or give another run."
        ) from None
    return columns


def plot(history: dict[str, tuple[list[int], list[float]]], stage: str, path: Path) -> Path:
    """Draw the panels of a stage to `path` and return it."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS[stage] if any(line.column in history for line in panel.lines)]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(11, 3.6 * rows), layout="constrained")
    figure.suptitle(TITLES[stage], fontsize=14)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 2, number)
        drawn = [line for line in panel.lines if line.column in history]
        for line in drawn:
            axes.plot(
                *history[line.column],
                color=line.color,
                linestyle=line.style,
                label=line.label,
                linewidth=1.6,
                marker="." if len(history[line.column][0]) <= FEW else "",
            )
        if panel.level:
            axes.axhline(panel.level[0], color="0.6", linewidth=1, zorder=0, label=panel.level[1] or None)
        if panel.log and any(value > 0 for line in drawn for value in history[line.column][1]):
            axes.set_yscale("log")
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel("update")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=9)
    return save_figure(figure, path)


def save_figure(figure, path: Path) -> Path:
    """Write a matplotlib figure as a PNG, whole or not at all. Raises AptError if `path` cannot be
    written.
    """
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    return path
