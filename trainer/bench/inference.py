"""`bench inference`: what each part takes, beside what it must take, stock diffusers in the same run, and the paper."""

import tempfile
from datetime import date
from pathlib import Path

import torch
from rich.table import Table

from apt_core.pipeline import OneStepPipeline
from apt_core.text import TextEncoder
from trainer.bench.floors import count_work
from trainer.bench.many import model_of_many
from trainer.bench.rates import measure_rates, median_seconds, peak_memory
from trainer.bench.shapes import Shapes, find_shapes
from trainer.bench.stock import Stock
from trainer.demo import versions
from trainer.files import write_json
from trainer.progress import console

PAPER = {"text": 0.28, "dit": 2.65, "vae": 3.10, "total": 6.03}  # table 7: the 8B at 1280x720, 2 s at 24 fps, one H100
NAMES = {"text": "text", "dit": "transformer", "vae": "decode", "total": "total"}
MIB = 2**20


def run(name: str, device: str, repeats: int, compiled: bool | None, fp8: bool, out: Path | None) -> dict:
    """Measure, print, and write JSON to `out` if given; returns it. Raises AptError for a model that is not known, or no fp8."""
    place = torch.device(device)
    result = measure(find_shapes(name), place, repeats, place.type == "cuda" if compiled is None else compiled, fp8)
    if out:
        write_json(out, result)
    show(result)
    return result


@torch.no_grad()
def measure(shapes: Shapes, device: torch.device, repeats: int, compiled: bool, fp8: bool) -> dict:
    """All figures, in seconds, bytes and FLOPs."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rates = measure_rates(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        pipe = OneStepPipeline(shapes.sources(), device=device, compile=compiled, fp8=fp8, cache=folder, memory=None)
        prompt = _long_prompt(pipe)
        request = pipe.request(prompt)
        text = pipe.embed(request)
        latents = torch.randn(1, *request.latents(pipe.sources), generator=torch.Generator().manual_seed(0)).to(device)
        work = count_work(shapes, dtype.itemsize, sum(bool(row.any()) for row in text[0]))
        stock, memory = _stock(shapes, device, dtype, repeats, latents, text)
        numbers = iter(range(10**6))  # a prompt that was not there before each time

        def embed():
            return pipe.embed(pipe.request(f"{next(numbers)} {prompt}"))

        ours = {
            "text": median_seconds(embed, device, repeats),
            "dit": median_seconds(lambda: pipe.latents(request, 0, text), device, repeats),
            "vae": median_seconds(lambda: list(pipe.frames(latents)), device, repeats),
            "total": median_seconds(lambda: list(pipe.frames(pipe.latents(request, 0, embed()))), device, repeats),
        }
        with peak_memory(device) as peak:
            list(pipe.frames(latents))
        memory["engine"] = peak.bytes
        steps_taken = pipe.steps_taken
    stock["text"] = ours["text"]  # the same encoder
    if stock.get("latents") is not None:
        stock["total"] = ours["text"] + stock.pop("whole")
        stock["dit"] = stock.pop("latents")
    floors = {part: rates.floor(need.flops, need.moved) for part, need in work.items()}
    floors["total"] = sum(floors.values())
    height, width, frames = shapes.size
    return {
        "model": shapes.name, "date": date.today().isoformat(), "device": _device_name(device), "versions": versions(),
        "size": f"{width}x{height}, {frames} frames", "dtype": str(dtype).removeprefix("torch."), "compiled": compiled, "fp8": fp8, "repeats": repeats,
        "rates": {"matrix": rates.matrix, "copy": rates.copy},
        "work": {part: {"flops": need.flops, "bytes": need.moved} for part, need in work.items()},
        "seconds": ours, "floor": floors, "stock": stock, "paper": PAPER, "decode_peak_bytes": memory, "steps_taken": steps_taken,
        "modelled_seconds_on_gpus": model_of_many(shapes, ours),
    }  # fmt: skip


def _stock(shapes: Shapes, device: torch.device, dtype: torch.dtype, repeats: int, latents: torch.Tensor, text: torch.Tensor) -> tuple[dict, dict]:
    """Seconds and decode memory of diffusers; it is gone again when the engine is measured."""
    stock = Stock(shapes, device, dtype)
    with peak_memory(device) as peak:  # first of all: what a decode leaves behind in the allocator would hide the next one's need
        stock.decode(latents)
    seconds = {"vae": median_seconds(lambda: stock.decode(latents), device, repeats)}
    if stock.pipe:
        text = text.to(device)
        seconds["latents"] = median_seconds(lambda: stock.generate(latents, text, pixels=False), device, repeats)
        seconds["whole"] = median_seconds(lambda: stock.generate(latents, text, pixels=True), device, repeats)
    del stock
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds, {"stock": peak.bytes}


def _long_prompt(pipe: OneStepPipeline) -> str:
    """Nearly as many tokens as the transformer takes: no text takes longer."""
    length = pipe.sources.transformer.text_length
    encoder: TextEncoder = pipe._residence.run("text encoder", lambda device: pipe.sources.text.load(length, device), lambda encoder: encoder)
    words = "a red circle moving left on a green background".split() * length
    count = next(n for n in range(len(words), 0, -1) if len(encoder.tokenize([" ".join(words[:n])])[0]) <= length - 8)
    return " ".join(words[:count])


def show(result: dict) -> None:
    """The table."""
    ours, floors, stock, memory = result["seconds"], result["floor"], result["stock"], result["decode_peak_bytes"]
    table = Table(title=f"{result['model']}, {result['size']}, {result['dtype']}, {result['device']}: seconds", title_justify="left", box=None)
    for column in ("", "engine", "floor", "/ floor", "stock", "/ engine", "paper"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for part, name in NAMES.items():
        other = stock.get(part)
        table.add_row(
            name, _seconds(ours[part]), _seconds(floors[part]), f"{ours[part] / floors[part]:.1f}", _seconds(other) if other else "-",
            f"{other / ours[part]:.2f}" if other else "-", f"{PAPER[part]:.2f}",
        )  # fmt: skip
    console.print(table)
    rates = result["rates"]
    say = ["stock: diffusers' WanPipeline, one step, in the same run; paper: table 7, its 8B model at 1280x720 on one H100."]
    say += [f"Measured here: {rates['matrix'] / 1e12:.3g} TFLOP/s in matrix products, {rates['copy'] / 1e9:.3g} GB/s in copies; floors follow from these."]
    say.append(f"Peak memory of the decode beside weights: engine {memory['engine'] / MIB:.0f} MiB, diffusers {memory['stock'] / MIB:.0f} MiB.")
    say += result["steps_taken"]
    for line in say:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    many = Table(title="A MODEL of several such GPUs over NVLink (450 GB/s each way), not a measurement: seconds", title_justify="left", box=None)
    for column in ("GPUs", *NAMES.values()):
        many.add_column(column, justify="right", no_wrap=True)
    for gpus, parts in result["modelled_seconds_on_gpus"].items():
        many.add_row(str(gpus), *(_seconds(parts[part]) for part in NAMES))
    console.print(many)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
