"""`bench inference`: time each part, beside its floor, stock diffusers in the same run, and the paper."""

import gc
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich.table import Table

from apt_core.engine.decoder import Decoder
from apt_core.engine.pipeline import OneStepPipeline, on_the_cpu
from apt_core.engine.request import Request
from apt_core.files.jsonfile import write_json
from apt_core.method.noise import draw
from trainer.bench.floors import count_work
from trainer.bench.many import model_of_many
from trainer.bench.rates import measure_rates, median_seconds, once, peak_memory
from trainer.bench.shapes import Shapes, find_shapes
from trainer.bench.stock import measure_stock
from trainer.machines.machine import versions
from trainer.run.progress import console, say

# table 7: the 8B at 1280x720, 2 s at 24 fps, one H100
PAPER = {
    "text": 0.28,
    "dit": 2.65,
    "vae": 3.10,
    "total": 6.03,
}
NAMES = {"text": "text", "dit": "transformer", "vae": "decode", "total": "total"}
MIB = 2**20


def run(name: str, device: str, repeats: int, compiled: bool | None, fp8: bool, out: Path | None) -> dict:
    """Measure, print the result, write it as JSON to `out` if given, and return it.

    Raises AptError for an unknown model, and for fp8 on a device that cannot do it.
    """
    place = torch.device(device)
    result = measure(
        find_shapes(name), place, repeats, place.type == "cuda" if compiled is None else compiled, fp8
    )
    if out:
        write_json(out, result)
    show(result)
    return result


@torch.no_grad()
def measure(shapes: Shapes, device: torch.device, repeats: int, compiled: bool, fp8: bool) -> dict:
    """All figures, in seconds, bytes and FLOPs."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rates = measure_rates(device, dtype, fp8)
    with tempfile.TemporaryDirectory() as folder:
        pipe = OneStepPipeline(
            shapes.sources(), device=device, compile=compiled, fp8=fp8, cache=folder, memory=None
        )
        prompt = _long_prompt(pipe)
        request = pipe.request(prompt)
        text = pipe.embed(request)
        latents = torch.randn(
            1, *request.latents(pipe.sources), generator=torch.Generator().manual_seed(0)
        ).to(device)
        noise = draw(request.noise, request.seed, 0, request.latents(pipe.sources))[None].to(device)
        work = count_work(shapes, dtype.itemsize, sum(bool(row.any()) for row in text[0]))
        # Stock's memory is free again before the engine is measured.
        stock = measure_stock(shapes, device, dtype, repeats, noise, latents, text)
        engine = _measure_engine(pipe, prompt, request, text, latents, repeats)
        del pipe
        gc.collect()
    ours, made = engine.seconds, engine.latents
    theirs = stock.seconds | {"text": ours["text"]}  # both use the same encoder
    if "both" in theirs:
        theirs["total"] = ours["text"] + theirs.pop("both")
    floors = {
        part: rates.floor(need.flops, need.moved, eight=fp8 and part == "dit") for part, need in work.items()
    }
    floors["total"] = sum(floors.values())
    height, width, frames = shapes.size
    return {
        "model": shapes.name,
        "date": date.today().isoformat(),
        "device": _device_name(device),
        "versions": versions(),
        "size": f"{width}x{height}, {frames} frames",
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": compiled,
        "fp8": fp8,
        "repeats": repeats,
        "rates": {"matrix": rates.matrix, "matrix_fp8": rates.matrix_fp8, "copy": rates.copy},
        "work": {part: {"flops": need.flops, "bytes": need.moved} for part, need in work.items()},
        "seconds": ours,
        "first_seconds": engine.first,
        "floor": floors,
        "stock": theirs,
        "paper": PAPER,
        "uncompiled_decode_seconds": _uncompiled_decode(shapes, device, dtype, repeats, latents)
        if compiled and device.type != "cpu"
        else None,
        "velocity_error": ((made - stock.latents).norm() / (stock.latents - noise.cpu()).norm()).item(),
        "decode_psnr": {"engine": stock.engine_psnr, "stock": stock.stock_psnr},
        "decode_peak_bytes": {"engine": engine.decode_peak, "stock": stock.decode_peak},
        "steps_taken": engine.steps_taken,
        "modelled_seconds_on_gpus": model_of_many(shapes, ours),
    }


@dataclass
class _Engine:
    """What the engine took: seconds of each part and of its first call, and bytes at the decode's peak.

    Also the latents that it made, and what it gave up to save memory.
    """

    seconds: dict[str, float]
    first: dict[str, float]
    decode_peak: int
    latents: torch.Tensor
    steps_taken: list[str]


def _measure_engine(
    pipe: OneStepPipeline,
    prompt: str,
    request: Request,
    text: torch.Tensor,
    latents: torch.Tensor,
    repeats: int,
) -> _Engine:
    device = pipe.device
    numbers = iter(range(10**6))  # a new prompt each time, so that none is cached
    works = {
        "text": lambda: pipe.embed(pipe.request(f"{next(numbers)} {prompt}")),
        "dit": lambda: pipe.latents(request, 0, text),
        "vae": lambda: list(pipe.frames(latents)),
        "total": lambda: list(pipe.stream(f"{next(numbers)} {prompt}", seed=next(numbers))),
    }
    first = {part: once(works[part], device) for part in ("dit", "vae")}
    seconds = {part: median_seconds(work, device, repeats) for part, work in works.items()}
    with peak_memory(device) as peak:
        works["vae"]()
    made = pipe.latents(request, 0, text).cpu()
    return _Engine(seconds, first, peak.bytes, made, pipe.steps_taken)


def _uncompiled_decode(
    shapes: Shapes, device: torch.device, dtype: torch.dtype, repeats: int, latents: torch.Tensor
) -> float:
    """Seconds of the decode with this project's own kernels instead of torch.compile."""
    decoder = Decoder(shapes.vae(device, dtype).eval())
    return median_seconds(lambda: list(on_the_cpu(decoder.stream(latents, uint8=True))), device, repeats)


def _long_prompt(pipe: OneStepPipeline) -> str:
    """A prompt of nearly as many tokens as the transformer takes; hardly any prompt takes longer."""
    length = pipe.sources.transformer.text_length
    encoder = pipe.sources.text.load(length, torch.device("meta"))  # only its tokenizer is needed
    words = "a red circle moving left on a green background".split() * length
    count = next(
        n for n in range(len(words), 0, -1) if len(encoder.tokenize([" ".join(words[:n])])[0]) <= length - 8
    )
    return " ".join(words[:count])


def show(result: dict) -> None:
    """Print the result as a table."""
    ours, floors, stock, memory = (
        result["seconds"],
        result["floor"],
        result["stock"],
        result["decode_peak_bytes"],
    )
    table = Table(
        title=f"{result['model']}, {result['size']}, {result['dtype']}, {result['device']}: seconds",
        title_justify="left",
        box=None,
    )
    for column in ("", "engine", "floor", "/ floor", "stock", "/ engine", "paper"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for part, name in NAMES.items():
        other = stock.get(part)
        table.add_row(
            name,
            _seconds(ours[part]),
            _seconds(floors[part]),
            f"{ours[part] / floors[part]:.1f}",
            _seconds(other) if other else "-",
            f"{other / ours[part]:.2f}" if other else "-",
            f"{PAPER[part]:.2f}",
        )
    console.print(table)
    rates = result["rates"]
    lines = [
        "stock: diffusers' WanPipeline, one step, in the same run; paper: "
        "table 7, its 8B model at 1280x720 on one H100."
    ]
    lines += [
        f"Measured here: {rates['matrix'] / 1e12:.3g} TFLOP/s in matrix products, "
        f"{rates['copy'] / 1e9:.3g} GB/s in copies; floors follow from these."
    ]
    if result["fp8"]:
        lines[-1] += f" In fp8 {rates['matrix_fp8'] / 1e12:.3g} TFLOP/s, which the transformer's floor takes."
    first, quality = result["first_seconds"], result["decode_psnr"]
    lines.append(
        f"First calls, with making the weights{' and compiling' * result['compiled']}: "
        f"transformer {first['dit']:.2f}, decode {first['vae']:.2f}."
    )
    if result["uncompiled_decode_seconds"]:
        lines.append(
            "Decode without torch.compile, by this project's kernels: "
            f"{_seconds(result['uncompiled_decode_seconds'])}."
        )
    lines.append(
        f"Velocity in {'fp8' if result['fp8'] else result['dtype']}: "
        f"{result['velocity_error']:.1e} from {_plain(result)}, relative (random weights)."
    )
    lines.append(
        f"Decode against diffusers' in float32: engine {quality['engine']:.1f} dB, "
        f"diffusers in {result['dtype']} {quality['stock']:.1f} dB."
    )
    lines.append(
        f"Peak memory of the decode beside weights: engine {memory['engine'] / MIB:.0f} MiB, "
        f"diffusers {memory['stock'] / MIB:.0f} MiB."
    )
    lines += result["steps_taken"]
    for line in lines:
        say(line)
    many = Table(
        title="A MODEL of several such GPUs over NVLink (450 GB/s each way), not a measurement: seconds",
        title_justify="left",
        box=None,
    )
    for column in ("GPUs", *NAMES.values()):
        many.add_column(column, justify="right", no_wrap=True)
    for gpus, parts in result["modelled_seconds_on_gpus"].items():
        many.add_row(str(gpus), *(_seconds(parts[part]) for part in NAMES))
    console.print(many)


def _plain(result: dict) -> str:
    return f"{'diffusers' if 'dit' in result['stock'] else 'the plain backbone'} in {result['dtype']}"


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
