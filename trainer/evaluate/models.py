"""The models of a comparison: checkpoints and training states, all sampled with the same request."""

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
from trainer.checkpoints.trained_models import State, average_of, base_of
from trainer.config import Files
from trainer.digest import file_digest, files_digest
from trainer.run.folders import is_state, resolve


@dataclass(frozen=True)
class Wishes:
    """What all models are asked to make.

    steps: sampling steps of APT and distilled models.
    base_steps, guidance, shift, negative: for base models, which are sampled with Euler steps.
    height, width, frames, fps: by default each checkpoint's own.
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
    """One column of the tables.

    label: its name there.
    ema: for a training state, the decay of the average that is used; 0 for the raw weights.
    base: the transformer that a LoRA or a training state needs.
    phase, updates: how far it was trained, as far as its file says.
    sources: headers and configs of its files, without weights.
    """

    label: str
    path: Path
    ema: float | None
    base: Path | None
    tokenizer: Path | None
    sources: Sources
    request: Request
    phase: str | None = None
    updates: int | None = None

    def open(self, device: torch.device) -> OneStepPipeline:
        """A pipeline for this model; it reads the weights when it samples."""
        return OneStepPipeline(self.sources, device=device)

    def files(self) -> dict[str, Path]:
        """The paths of its weights, by role."""
        places = {
            "checkpoint": self.path,
            "base": self.base,
            "vae": Path(self.sources.vae.name),
            "text_encoder": Path(self.sources.text.name),
            "tokenizer": self.tokenizer,
        }
        return {part: path for part, path in places.items() if path is not None}

    def facts(self, digests: dict[Path, str]) -> dict:
        """The SHA-256 of its files and its sampling settings, as JSON values. digests: SHA-256 by path, as
        far as known; new ones are added.
        """
        request, weights = self.request, {}
        for part, path in self.files().items():
            if path not in digests:
                digests[path] = digest(path)
            weights[part] = {"name": path.name, "sha256": digests[path]}
        steps = {"steps": request.steps}
        if not self.sources.transformer.few_step:
            steps |= {name: getattr(request, name) for name in ("guidance", "shift", "negative")}
        about = {"label": self.label, "ema": self.ema, "phase": self.phase, "updates": self.updates}
        return about | steps | {"weights": weights}


def open_models(
    checkpoints: Sequence[Path],
    emas: Sequence[float],
    files: Files,
    wishes: Wishes,
) -> list[Model]:
    """One model per checkpoint; for training states one per decay in `emas`. No weights are read.

    Raises AptError if files do not fit each other, a model cannot make its size, a model is given twice, or
    models make different sizes.
    """
    if not checkpoints:
        raise AptError("there is no checkpoint to evaluate: give one or more.")
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
            phase, updates = _progress(path, sources)
            models.append(Model(label, path, taken, below, tokenizer, sources, request, phase, updates))
    if emas and not any(is_state(model.path) for model in models):
        raise AptError(
            f"--ema {emas[0]:g} selects an average of a training state, but none is given: give "
            "states/PHASE/step-..., or leave it out."
        )
    _check_one_size(models)
    return _with_labels(models)


def with_prompts(models: Sequence[Model], prompts: Sequence[str]) -> list[Model]:
    """The same models, asked for these prompts. Raises AptError for a prompt that a model cannot take."""
    return [
        replace(model, request=replace(model.request, prompts=list(prompts)).fitted(model.sources))
        for model in models
    ]


def sample(pipe: OneStepPipeline, request: Request, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames of the samples with these numbers, one sample after another, uint8 `[F, H, W, 3]`, as the
    decoder returns them.
    """
    text = pipe.embed(request)
    for number in numbers:
        yield np.concatenate(list(pipe.frames(pipe.latents(request, number, text))))


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex. For a folder, the SHA-256 of what sha256sum prints for its files in the
    order of their names (lines "SHA-256  name").
    """
    if path.is_file():
        return file_digest(path)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return files_digest(path, names)


def stamp(path: Path) -> list:
    """The path of a file or folder with the sizes and ages of its files: a cheap test for being unchanged."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = [(file, file.stat()) for file in files]
    return [str(path.absolute()), [[f.name, about.st_size, about.st_mtime_ns] for f, about in facts]]


def _progress(path: Path, sources: Sources) -> tuple[str | None, int | None]:
    """The phase of a model and how many updates it has had in it; None where its file does not say."""
    if is_state(path):
        state = State(path, check=False)
        return state.identity["phase"], int(state.facts["update"])
    about = sources.transformer.metadata
    phase, updates = about.get("phase"), about.get("updates")
    return phase if type(phase) is str else None, updates if type(updates) is int else None


def series(models: Sequence[Model]) -> list[int]:
    """For each model the number of its series: models of one folder, phase and EMA share one."""
    keys = [(model.path.absolute().parent, model.phase, model.ema) for model in models]
    return [list(dict.fromkeys(keys)).index(key) for key in keys]


def _check_one_size(models: Sequence[Model]) -> None:
    def words(model: Model) -> str:
        request = model.request
        return f"{request.width}x{request.height}, {request.frames} frames at {request.fps:g} fps"

    first = models[0]
    for other in models[1:]:
        if words(other) != words(first):
            raise AptError(
                f"{first.path} makes {words(first)} and {other.path} {words(other)}, which cannot be "
                "compared: give --height, --width, --frames and --fps for all."
            )


def _name(path: Path, folders: int = 0) -> str:
    """The name of a file or folder, preceded by this many of its parent folders."""
    parts = path.absolute().parts
    return "/".join(parts[-1 - min(folders, len(parts) - 2) :]).removesuffix(".safetensors")


def _with_labels(models: Sequence[Model]) -> list[Model]:
    """Models with unique labels: equal labels get as many parent folders as it takes to tell them apart."""
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
