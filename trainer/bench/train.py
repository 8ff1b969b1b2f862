"""`bench train`: time an update of stage 2, with all weights trained and as a LoRA.

Weights and samples are random, with the shapes of a preset.
"""

import gc
from datetime import date
from pathlib import Path
from time import perf_counter

import torch
from rich.table import Table
from torch import nn

from apt_core.files.jsonfile import write_json
from trainer.bench.rates import peak_memory, synchronise
from trainer.bench.shapes import build_backbone
from trainer.config import Preset
from trainer.data.batches import Micro
from trainer.data.sampling import split
from trainer.machines.account import account
from trainer.machines.distributed import World, connect
from trainer.machines.machine import pick_device, this_machine, versions
from trainer.machines.parallel import attention_of, parallel_of
from trainer.run.progress import console, say
from trainer.stages.adversarial import adversarial
from trainer.stages.networks import lora_of
from trainer.stages.setup import Setup

MODES = ("full", "lora")
GIB = 2**30
NOWHERE = Path("random")


class _Enough(Exception):
    """Raised once all updates are timed, to end the training."""


class RandomBatches:
    """Takes the place of shards: every sample is the same noise, numbered as real samples would be."""

    fingerprint = "random"

    def __init__(self, preset: Preset, kind: str) -> None:
        (height, width), (t, down, across), model = preset.data.size(kind), preset.model.stride, preset.model
        frames = preset.data.frames if kind == "video" else 1
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(
            model.channels, (frames - 1) // t + 1, height // down, width // across, generator=generator
        )
        self.text = torch.randn(model.text_length, model.text_dim, generator=generator)

    def take(
        self, kind: str, stream: str, update: int, size: int, world: World, microbatch: int | None = None
    ) -> list[Micro]:
        parts, out = split(size, world.dp, world.dp_rank, microbatch), []
        for places in parts:
            x, text = (value.expand(len(places), *value.shape).clone() for value in (self.x, self.text))
            share = len(places) * world.dp / size
            out.append(
                Micro(
                    [update * size + place for place in places],
                    list(places),
                    x,
                    text,
                    ["random"] * len(places),
                    share,
                )
            )
        return out


def run(
    preset: Preset, recipe: str, phase: str, updates: int, out: Path | None, *, batch_given: bool
) -> dict:
    """Time `updates` updates in each mode; print the result, write it as JSON to `out`, and return it.

    preset: with its recipe applied (`load_recipe`). Unless the user gave a batch, one microbatch is timed,
    and the recipe's batch is extrapolated from it.
    """
    attention = attention_of(preset, pick_device(preset.train.device))
    machine = this_machine(pick_device(preset.train.device), preset.train.compute)
    with connect(
        pick_device(preset.train.device),
        context_parallel=preset.train.context_parallel,
        sharded=preset.train.compute != "fp32",
    ) as world:
        whole = preset.phase(phase, recipe).batch
        batch = whole if batch_given else world.dp * (preset.train.microbatch or 1)
        # the MMDiT cannot be trained as a LoRA
        modes = [mode for mode in MODES if preset.model.kind == "wan" or mode == "full"]
        result = {
            "preset": preset.name,
            "recipe": recipe,
            "phase": phase,
            "date": date.today().isoformat(),
            "device": machine.name,
            "processes": world.size,
            "peak_flops": machine.peak,
            "compute": preset.train.compute,
            "attention": attention.name,
            "batch": batch,
            "whole_batch": whole,
            "versions": versions(),
            "modes": {
                mode: _measure(
                    _changed(preset, recipe, phase, mode, batch), recipe, phase, updates, world, machine.peak
                )
                for mode in modes
            },
        }
        for figures in result["modes"].values():
            figures["seconds_of_whole_batch"] = figures["seconds"] * whole / batch
        if world.main:
            if out:
                write_json(out, result)
            show(result)
        return result


def _changed(preset: Preset, recipe: str, phase: str, mode: str, batch: int) -> Preset:
    phases = preset.phases(recipe)
    settings = getattr(phases, phase).model_copy(update={"batch": batch, "warmup": 0})
    stage2 = preset.stage2 | {recipe: phases.model_copy(update={phase: settings})}
    return preset.model_copy(
        update={"stage2": stage2, "train": preset.train.model_copy(update={"mode": mode})}
    )


def _measure(preset: Preset, recipe: str, phase: str, updates: int, world: World, peak_flops: float) -> dict:
    """Seconds per update, without the first, and a process's peak memory beside what its account says."""
    train, times = preset.train, []
    parallel, _ = parallel_of(preset, pick_device(train.device))

    def load(path, dtype: torch.dtype = torch.float32, device="cpu") -> nn.Module:
        return build_backbone(preset.model, device, dtype).requires_grad_(True)

    def report(done: int, total: int, row: dict) -> None:
        synchronise(world.device)
        times.append(perf_counter())
        if done == updates:
            raise _Enough  # before the stage writes anything

    needed = account(preset, phase, recipe, world.size)
    gc.collect()  # what the previous mode leaves behind has reference cycles
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    with peak_memory(world.device, interval=0.05) as peak:  # not too often, because this run is also timed
        settings = preset.phase(phase, recipe).model_copy(update={"updates": updates})
        try:
            adversarial(
                phase,
                NOWHERE,
                NOWHERE,
                settings,
                Setup(
                    batches=RandomBatches(preset, phase),
                    out=NOWHERE,
                    seed=0,
                    metadata={},
                    report=report,
                    world=world,
                    parallel=parallel,
                    lora=lora_of(train),
                    load=load,
                ),
                head_width=train.head_width,
            )
        except _Enough:
            pass
    seconds = (times[-1] - times[0]) / (updates - 1)
    speed = needed.flops / seconds / world.size
    return {
        "seconds": seconds,
        "flops": needed.flops,
        "flops_per_second": speed,
        "share_of_peak": speed / peak_flops,
        "peak_bytes": peak.bytes,
        "account_bytes": needed.bytes,
    }


def show(result: dict) -> None:
    """Print the result as a table."""
    title = (
        f"{result['preset']}/{result['recipe']}, {result['phase']}s, batch {result['batch']}, "
        f"{result['processes']} x {result['device']}, {result['compute']}, {result['attention']}"
    )
    table = Table(title=title, title_justify="left", box=None)
    for column in (
        "",
        "s / update",
        f"at batch {result['whole_batch']}",
        "TFLOP/s each",
        "of peak",
        "GiB",
        "account",
    ):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for mode, row in result["modes"].items():
        table.add_row(
            mode,
            f"{row['seconds']:.3g}",
            f"{row['seconds_of_whole_batch']:.3g}",
            f"{row['flops_per_second'] / 1e12:.3g}",
            f"{row['share_of_peak']:.1%}",
            f"{row['peak_bytes'] / GIB:.2f}",
            f"{row['account_bytes'] / GIB:.2f}",
        )
    console.print(table)
    say(
        f"Peak of matrix products, measured here: {result['peak_flops'] / 1e12:.3g} TFLOP/s in "
        f"{result['compute']}.",
    )
