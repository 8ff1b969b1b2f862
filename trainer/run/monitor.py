"""What a run says while it trains: CSV, TensorBoard, Weights & Biases, speed, memory, and warnings when the
discriminator has won or tells nothing, or the clips no longer move.
"""

import csv
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from apt_core.files.atomic import replacing
from trainer.aside import Aside, warn
from trainer.run.progress import console

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB = 2**30
WON = 0.1  # of the loss that cannot tell real from fake
EQUAL = {False: 2 * math.log(2), True: math.log(2)}  # d_adversarial of equal logits, by relativistic
CHANCE = 0.55  # of pairs told apart: below it the discriminator is as good as guessing
PATIENCE = 50  # updates at chance before it is said
STILL = 0.7  # of the motion of real clips, or of the start's: below it is said
FLOOR = 0.1  # of the penalty: more than this from rounding alone is said


@dataclass(frozen=True)
class Work:
    """The work of one update, to compute speed: its samples, its FLOPs, and the peak FLOP/s of matrix
    products of all GPUs together (0 if not known).
    """

    samples: int
    flops: float = 0.0
    peak: float = 0.0


class Monitor(AbstractContextManager):
    """The `report` argument of distill and adversarial: the main process calls it with (done, total, row)
    after each update. Use it in a `with` statement. A resumed run replaces the rows that it computes again.

    folder: where history.csv and TensorBoard's files are written.
    work: see Work; None if updates differ in their work.
    relativistic: whether the objective is, for the warning about a discriminator that has won.
    wandb: name of a Weights & Biases project, used if the package is installed.
    forward: called with the same arguments, a progress bar for example.
    """

    def __init__(
        self,
        folder: Path,
        work: Work | None = None,
        *,
        device: torch.device = torch.device("cpu"),
        relativistic: bool = False,
        wandb: str | None = None,
        settings: dict | None = None,
        forward: Callable[[int, int, dict], None] = lambda done, total, row: None,
    ) -> None:
        self.path, self.work, self.device, self.forward = folder / "history.csv", work, device, forward
        self.warnings = (
            CollapseWarning(EQUAL[relativistic]),
            ChanceWarning(),
            FloorWarning(),
            MotionWarning(),
        )
        self._csv, self._tensorboard, self._online = (
            Aside(f"the log {self.path}"),
            Aside("TensorBoard's log"),
            Aside("Weights & Biases"),
        )
        self._screen = Aside("the display")
        self._rows = _read(self.path)
        self._columns: list[str] = []
        self._clock: float | None = None
        self._board = self._tensorboard(_board, folder)
        self._wandb = self._online(_wandb, wandb, folder, settings)

    def __call__(self, done: int, total: int, row: dict[str, float]) -> None:
        row = row | self._speed()
        self._csv(self._write, done, row)
        if self._board:
            for name, value in row.items():
                self._tensorboard(self._board.add_scalar, name, value, done)
        if self._wandb:
            self._online(self._wandb.log, row, step=done)
        for message in filter(None, (warning.see(done, row) for warning in self.warnings)):
            self._screen(console.print, f"[bold yellow]{message}[/]", soft_wrap=True)
        self._screen(self.forward, done, total, row)

    def __exit__(self, *_) -> None:
        if self._board:
            self._tensorboard(self._board.close)
        if self._wandb:
            self._online(self._wandb.finish)

    def _speed(self) -> dict[str, float]:
        now, before = time.perf_counter(), self._clock
        self._clock = now
        if self.device.type == "cuda":
            out = {"memory_gib": torch.cuda.max_memory_allocated(self.device) / GIB}
        else:
            out = (
                {}
                if resource is None
                else {
                    "memory_gib": (
                        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                        * (1 if sys.platform == "darwin" else 1024)
                        / GIB
                    )
                }
            )
        if before is None:  # the first update also loads, allocates and compiles
            return out
        out["seconds"] = now - before
        if self.work:
            out["samples_per_second"] = self.work.samples / out["seconds"]
            if self.work.flops and self.work.peak:
                out["mfu"] = self.work.flops / out["seconds"] / self.work.peak
        return out

    def _write(self, done: int, row: dict[str, float]) -> None:
        row = {"update": done, **row}
        fresh = [name for name in row if name not in self._columns]
        again = bool(self._rows) and int(self._rows[-1]["update"]) >= done
        self._rows = [old for old in self._rows if int(old["update"]) < done] + [row]
        if not fresh and not again:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
            return
        self._columns = list(dict.fromkeys([*self._columns, *(name for old in self._rows for name in old)]))
        with replacing(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


class CollapseWarning:
    """Warns when the discriminator's adversarial loss, smoothed over about ten updates, approaches zero. Then
    the generator gets no gradient and its samples become coloured plates (section 5.1). It warns once, and
    again if the loss has recovered in between.
    """

    def __init__(self, equal: float) -> None:
        self.equal, self._smooth, self._warned = equal, equal, False

    def see(self, done: int, row: dict[str, float]) -> str | None:
        """The warning, if this row calls for it."""
        if "d_adversarial" not in row:
            return None
        self._smooth += 0.1 * (row["d_adversarial"] - self._smooth)
        if self._smooth > 2 * WON * self.equal:
            self._warned = False
        if self._warned or self._smooth > WON * self.equal:
            return None
        self._warned = True
        gap = row["logit_real"] - row["logit_fake"]
        return (
            f"update {done}: the discriminator's loss heads for zero ({self._smooth:.3f}, "
            f"{self.equal:.2f} is a draw; logits {gap:.1f} apart): "
            "the generator is about to lose its gradient. Raise r1_weight, or lower lr_discriminator."
        )


class ChanceWarning:
    """Warns when the discriminator no longer tells real from fake, by the share of pairs that it orders
    correctly (on held-out samples, if the row has them). A discriminator that guesses gives the generator
    only noise, which RMSProp scales up to full steps, and the pictures do not show it. It warns after
    PATIENCE updates at chance, and again every PATIENCE updates.
    """

    def __init__(self) -> None:
        self._smooth, self._since = None, 0

    def see(self, done: int, row: dict[str, float]) -> str | None:
        """The warning, if this row calls for it."""
        share = row.get("held_right_pairs", row.get("right_pairs"))
        if share is None:
            return None
        self._smooth = share if self._smooth is None else self._smooth + 0.1 * (share - self._smooth)
        if self._smooth > CHANCE:
            self._since = done
        if done - self._since < PATIENCE:
            return None
        since, self._since = self._since, done
        in_time = f" and in time {row['r1_gamma_time']:.3g}" if "r1_gamma_time" in row else ""
        strength = (
            f"lambda sigma^2 is {row['r1_gamma']:.3g}{in_time}, the paper's is 0.01 "
            "for images and 1 for videos"
            if "r1_gamma" in row
            else "it has no penalty"
        )
        return (
            f"update {done}: the discriminator has been at chance since update {since + 1} (it is right on "
            f"{self._smooth:.0%} of pairs, logits "
            f"{row['logit_real'] - row['logit_fake']:.2g} apart; {strength}): "
            "the generator learns from noise. Lower r1_sigma or r1_weight, "
            "change lr_discriminator, or give it a warmup."
        )


class FloorWarning:
    """Warns once if a large part of aR1 is rounding (objectives.penalty_floor)."""

    def see(self, done: int, row: dict[str, float]) -> str | None:
        """The warning, if this row calls for it."""
        if not row.get("r1_floor", 0.0) > FLOOR * row.get("r1", math.inf):
            return None
        return (
            f"update {done}: {row['r1_floor'] / row['r1']:.0%} of the penalty is rounding, "
            f"not the discriminator's slope (r1 {row['r1']:.2g}, "
            f"at a hundredth of sigma {row['r1_floor']:.2g}): raise r1_sigma, or give compute=fp32."
        )


class MotionWarning:
    """Warns when one-step clips move too little, compared with real clips or with those of the run's first
    weights (see trainer.stages.watch; in stage 1 the judge measures the first). Clips lose motion in
    distillation, or slowly afterwards, while every single frame looks good. It warns once, and again if the
    motion has recovered in between.
    """

    def __init__(self) -> None:
        self._warned = False

    def see(self, done: int, row: dict[str, float]) -> str | None:
        """The warning, if this row calls for it."""
        share, of_start = row.get("motion_of_real", row.get("judged_motion")), row.get("motion_of_start", 1.0)
        if share is None:
            return None
        low = min(share, of_start)
        if low > (1 + STILL) / 2:
            self._warned = False
        if self._warned or low >= STILL:
            return None
        self._warned = True
        found = f"update {done}: clips of one step have {share:.0%} of the motion of real ones"
        if of_start < STILL:
            return (
                f"{found}, and {of_start:.0%} of what they had before this phase: "
                "keep the best state (motion counts in it), "
                "or train again with a lower lr_generator or more clips that move."
            )
        start = f", and had {share / of_start:.0%} before this phase" if "motion_of_start" in row else ""
        return (
            f"{found}{start}: start the video phase from weights that move more (--start-from), "
            "or train on more clips that move."
        )


def _read(path: Path) -> list[dict]:
    """The rows of an existing history. A damaged file is renamed, with a warning, and a new one is
    started.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [{name: value for name, value in row.items() if value != ""} for row in reader]
        for row in rows:
            [float(value) for value in row.values()]
        if "update" not in (reader.fieldnames or ("update",)) or [
            int(row["update"]) for row in rows
        ] != sorted({int(row["update"]) for row in rows}):
            raise ValueError
        return rows
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        kept = path.with_name(f"{path.stem}-damaged{path.suffix}")
        warn(f"{path} is damaged: it is kept as {kept.name}, and a new one is started.")
        Aside(f"{path}")(path.replace, kept)
        return []


def _board(folder: Path):
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(project: str | None, folder: Path, settings: dict | None):
    if project is None or find_spec("wandb") is None:
        return None
    import wandb

    return wandb.init(project=project, dir=str(folder), config=settings, resume="allow")
