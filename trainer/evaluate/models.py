"""The models of a comparison: checkpoints, states and decays of their averages, all asked for the same."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.request import SIZES, Request
from apt_core.errors import AptError
from apt_core.loading.sources import Sources, locate, read_sources
from trainer.checkpoints.generate import find_source
from trainer.checkpoints.starting_models import read_about, with_defaults
from trainer.checkpoints.trained_models import average_of, base_of
from trainer.config import Files
from trainer.files import file_digest
from trainer.run.folders import is_state, resolve


@dataclass(frozen=True)
class Wishes:
    """What all models are asked for. steps is for APT and distilled models; base_steps, guidance, shift and
    negative are for base models, which are sampled by Euler steps. Sizes: by default the checkpoints' own.
    """

    count: int = 1
    seed: int = 0
    steps: int = 1
    base_steps: int = 25
    guidance: float = 7.5
    shift: float = 5.0
    negative: str = ""
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None

    def request(self, prompts: Sequence[str], few_step: bool) -> Request:
        sizes = {name: getattr(self, name) for name in SIZES}
        if few_step:
            return Request(list(prompts), **sizes, count=self.count, seed=self.seed, steps=self.steps)
        return Request(
            list(prompts),
            **sizes,
            count=self.count,
            seed=self.seed,
            steps=self.base_steps,
            guidance=self.guidance,
            shift=self.shift,
            negative=self.negative,
        )


@dataclass(frozen=True)
class Model:
    """One column. label: what the tables call it; ema: of a state, the average's decay, 0 for raw weights;
    base: the transformer that a LoRA or a state stands on; sources: headers and configs alone, no weight.
    """

    label: str
    path: Path
    ema: float | None
    base: Path | None
    tokenizer: Path | None
    sources: Sources
    request: Request

    def open(self, device: torch.device) -> OneStepPipeline:
        """A pipeline for it, which reads weights when it samples."""
        return OneStepPipeline(self.sources, device=device)

    def facts(self, digests: dict[Path, str]) -> dict:
        """Which weights, by their SHA-256, and how they are sampled, in JSON's terms. digests: what is known
        already by path, filled up here.
        """
        request, weights = self.request, {}
        places = {
            "checkpoint": self.path,
            "base": self.base,
            "vae": Path(self.sources.vae.name),
            "text_encoder": Path(self.sources.text.name),
            "tokenizer": self.tokenizer,
        }
        for part, path in places.items():
            if path is not None:
                if path not in digests:
                    digests[path] = digest(path)
                weights[part] = {"name": path.name, "sha256": digests[path]}
        steps = {"steps": request.steps}
        if not self.sources.transformer.few_step:
            steps |= {name: getattr(request, name) for name in ("guidance", "shift", "negative")}
        return {"label": self.label, "ema": self.ema, **steps, "weights": weights}


def open_models(
    checkpoints: Sequence[Path],
    emas: Sequence[float],
    files: Files,
    wishes: Wishes,
) -> list[Model]:
    """A model for each checkpoint, and for each training state and decay one. No weight is read.

    Raises AptError for files that do not fit one another, for sizes that a model cannot make, for the same
    model twice, and for models of different sizes.
    """
    if not checkpoints:
        raise AptError("no checkpoint is given: give one or more.")
    models, given = [], ("base", "vae", "text_encoder", "tokenizer")
    for checkpoint in checkpoints:
        path = resolve(checkpoint)
        own = with_defaults(checkpoint, *(getattr(files, name) for name in given))
        below = locate("base", files.base) if files.base else None
        if is_state(path):
            below = base_of(path, read_about(path.parent), own.base)
        tokenizer = Path(own.tokenizer) if own.tokenizer else None
        for ema in (emas or [None]) if is_state(path) else [None]:
            source = find_source(checkpoint, own.base, ema)
            sources = read_sources(source, own.vae, own.text_encoder, own.tokenizer, own.base)
            request = wishes.request(["-"], sources.transformer.few_step).fitted(sources)
            taken = average_of(path, ema) if is_state(path) else None
            label = _name(path) + ("" if taken is None else f" EMA {taken:g}" if taken else " raw")
            models.append(Model(label, path, taken, below, tokenizer, sources, request))
    if emas and not any(is_state(model.path) for model in models):
        raise AptError(
            f"--ema {emas[0]:g} is for training states, and none is given: give states/PHASE/step-..., or "
            "leave it out."
        )
    _check_one_size(models)
    return _with_labels(models)


def with_prompts(models: Sequence[Model], prompts: Sequence[str]) -> list[Model]:
    """The models with the prompts that they shall make. Raises AptError for ones that cannot be read."""
    return [
        replace(model, request=replace(model.request, prompts=list(prompts)).fitted(model.sources))
        for model in models
    ]


def sample(pipe: OneStepPipeline, request: Request) -> Iterator[np.ndarray]:
    """Every sample's frames in turn, uint8 `[F, H, W, 3]`, as they leave the decoder."""
    text = pipe.embed(request)
    for number in range(request.samples):
        yield np.concatenate(list(pipe.frames(pipe.latents(request, number, text))))


def digest(path: Path) -> str:
    """SHA-256 in hex of a file; of a folder, of the lines "SHA-256  name" of its files, as sha256sum prints
    them in the order of their names.
    """
    if path.is_file():
        return file_digest(path)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{file_digest(path / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_one_size(models: Sequence[Model]) -> None:
    def words(model: Model) -> str:
        request = model.request
        return f"{request.width}x{request.height}, {request.frames} frames at {request.fps:g} fps"

    first = models[0]
    for other in models[1:]:
        if words(other) != words(first):
            raise AptError(
                f"{first.path} makes {words(first)} and {other.path} {words(other)}, which cannot be "
                "compared: give "
                "--height, --width, --frames and --fps for all."
            )


def _name(path: Path, folders: int = 0) -> str:
    """Of a file or folder, with so many of the folders that it lies in."""
    parts = path.absolute().parts
    return "/".join(parts[-1 - min(folders, len(parts) - 2) :]).removesuffix(".safetensors")


def _with_labels(models: Sequence[Model]) -> list[Model]:
    """Where several have one name, as many of their folders are named as tell them apart."""
    first = [(model.path.absolute(), model.ema) for model in models]
    if double := next((model for n, model in enumerate(models) if first[n] in first[:n]), None):
        raise AptError(f"{double.path} ({double.label}) is given twice: give each model once.")
    labels, folders = [model.label for model in models], 0
    while len(set(labels)) < len(labels):
        folders += 1
        labels = [
            _name(model.path, folders) + model.label.removeprefix(_name(model.path))
            if labels.count(label) > 1
            else label
            for model, label in zip(models, labels)
        ]
    return [replace(model, label=label) for model, label in zip(models, labels)]
