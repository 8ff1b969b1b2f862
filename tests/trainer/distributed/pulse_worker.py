"""One process of a small run that test_pulse kills, stops or keeps busy: pulse_worker.py FOLDER [UPDATES]
[BUSY]."""

import os
import re
import sys
import time
from pathlib import Path

import torch

from trainer.__main__ import app
from trainer.machines.distributed import connect
from trainer.machines.pulse import limit
from trainer.run.state import Keep, Run


class Count:
    """The least that can be saved."""

    def __init__(self):
        self.steps, self.value = 0, torch.zeros(1)

    def tensors(self):
        return {"value": self.value}

    def loaded(self, steps):
        self.steps = steps


def hold(seconds: float) -> None:
    """One call that computes and never lets go of Python's lock."""
    length, took = 16, 0.0
    while took < seconds:
        started = time.perf_counter()
        re.match("(a+)+$", "a" * length + "b")  # twice as long with each letter
        took = time.perf_counter() - started
        length += 1


@app.command()
def work(folder: Path, updates: int = 10_000, busy: float = 0) -> None:
    """busy: so many times the limit in one step of process 1."""
    with connect("cpu") as world:
        part, name = Count(), f"{world.rank}.pid"
        with Run(Keep(folder, every=2), world, {}, {"count": part}) as run:
            (folder.parent / name).write_text(str(os.getpid()))
            while run.update < updates:
                run.stop()
                if busy and world.rank == 1 and run.update == 3:
                    hold(busy * limit())
                part.value += world.sum(torch.ones(1))
                part.steps += 1
                run.rows.append({})
                run.finish_update()
                time.sleep(0.02)
        if world.main:
            print("sum", part.value.item())


def main(arguments: list[str], output: Path | None = None) -> None:
    """output: a file for what is said."""
    if output:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
    app(["work", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
