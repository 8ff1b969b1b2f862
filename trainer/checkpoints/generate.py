"""`generate`: make videos or pictures from prompts, with any checkpoint or base model."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.request import Request
from apt_core.files.atomic import make_folder
from apt_core.files.folders import half_note
from apt_core.loading.backbones import load_backbone
from apt_core.loading.sources import TransformerSource
from apt_core.models.lora import fold
from apt_core.models.precision import cast
from trainer.checkpoints.starting_models import read_about
from trainer.checkpoints.trained_models import ROLE, average_of, base_of, open_generator
from trainer.config import Files
from trainer.machines.distributed import World
from trainer.run.folders import FACTS, earlier_note, is_state, resolve
from trainer.run.progress import say, say_there, stage_bar


def generate(
    checkpoint: Path,
    request: Request,
    out: Path,
    files: Files,
    world: World = World(),
    ema: float | None = None,
    **options,
) -> list[Path]:
    """Write one file per sample into `out`, and return the paths that this process wrote.

    Files are called `NNNN-words-of-the-prompt-seedS-XXXXXX.mp4` (or .png). XXXXXX is a hash of everything the
    sample depends on (files, prompt, sizes, steps, ...), so another request never overwrites a file, and
    samples that are there already are not made again.
    files: the VAE, the text encoder and, for a LoRA, its base; options: for OneStepPipeline.
    Sample number n is the same for any number of processes: `cp` processes make one sample together, and each
    such group makes every dp-th sample.
    Raises AptError for files that do not fit the checkpoint, and for sizes that the model cannot make.
    """
    if (note := earlier_note(checkpoint, request.frames == 1)) and world.main:
        say(note)
    source = find_source(checkpoint, files.base, ema)
    pipe = OneStepPipeline.from_checkpoint(
        source,
        files.vae,
        files.text_encoder,
        files.tokenizer,
        files.base,
        device=world.device,
        group=world.cp_group if world.cp > 1 else None,
        **options,
    )
    request = request.fitted(pipe.sources)
    if world.main:
        # The other processes then find the embeddings in the cache, and only one text encoder is loaded.
        pipe.embed(request)
    world.barrier()
    text = pipe.embed(request)
    mine = range(world.dp_rank, request.samples, world.dp)
    make_folder(out)
    common = _common(checkpoint, files, ema, options)
    paths = [out / _name(common, request, number) for number in range(request.samples)]
    # The first process decides which files exist, because processes that share a sample must agree.
    there = world.gather({number for number, path in enumerate(paths) if path.exists()})[0]
    if world.main:
        say_there(len(there), len(paths), "samples", out)
    if pipe.approximate and world.main:
        say(
            f"{pipe.sources.vae.name} stands in for the VAE: "
            "these pictures are near the VAE's own, not equal to them.",
        )
    written = []
    with stage_bar("Sampling") as report:
        for done, number in enumerate(mine):
            path, writes = paths[number], world.cp_rank == 0
            if number not in there:
                pipe.write_sample(request, number, text, path if writes else None)
            written += [path] if writes else []
            report(done + 1, len(mine))
    if world.main:
        where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} samples go to {out}"
        say(where)
    return written


def find_source(checkpoint: Path, base: str = "", ema: float | None = None) -> TransformerSource | Path:
    """What a pipeline loads: the path itself or, for a training state, a TransformerSource that opens it.

    Raises AptError as `open_generator` does.
    """
    path = resolve(checkpoint)
    if not is_state(path):
        if ema is not None:
            open_generator(path, base or None, ema)  # raises the error that says why not
        return path
    average_of(path, ema)  # raises now, not after sampling, if this EMA was not kept
    about = read_about(path.parent)
    below = base_of(path, about, base)
    shape = load_backbone(below, device="meta")

    def load(dtype: torch.dtype, device: torch.device):
        found = open_generator(path, base or None, ema)
        return cast(found.model if found.base is None else fold(found.base, ROLE), dtype).to(device)

    metadata, count = about["metadata"] | {"kind": "generator"}, sum(p.numel() for p in shape.parameters())
    return TransformerSource(str(path), dict(shape.config), metadata, count, load, half_note(below))


def _common(checkpoint: Path, files: Files, ema: float | None, options: Mapping) -> list:
    """Everything that all samples of a call depend on, ready for JSON."""

    def file(given: str | Path) -> list:
        path = Path(given)
        path = path / FACTS if is_state(path) else path
        return (
            [str(path), path.stat().st_size, path.stat().st_mtime_ns]
            if given and path.exists()
            else [str(given)]
        )

    looks = {name: str(value) for name, value in options.items() if name in ("fp8", "dtype", "tiny_decoder")}
    return [
        file(resolve(checkpoint)),
        *(file(getattr(files, part)) for part in ("base", "vae", "text_encoder", "tokenizer")),
        ema,
        looks,
    ]


def _name(common: list, request: Request, number: int) -> str:
    """The file name of a sample."""
    wishes = asdict(request) | {"prompts": request.prompt(number), "count": 1, "number": number}
    mark = hashlib.blake2b(json.dumps([*common, wishes]).encode(), digest_size=3).hexdigest()
    ending = "png" if request.frames == 1 else "mp4"
    return f"{number:04d}-{_words(request.prompt(number))}-seed{request.seed}-{mark}.{ending}"


def _words(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt).strip("-")[:40].strip("-") or "sample"
