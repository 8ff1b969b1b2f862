"""What the commands probe, walk and attention share: opening a pipeline, prompts, and drawing frames."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.request import Request
from apt_core.errors import AptError
from apt_core.loading.sources import MINI
from trainer.checkpoints.generate import find_source
from trainer.checkpoints.starting_models import with_defaults
from trainer.data.shards import ShardDataset
from trainer.mini.clips import scene
from trainer.run.folders import earlier_note
from trainer.run.progress import say

PROMPT_SEED = 60_000  # for drawn captions; no other command uses it


def open_pipeline(
    checkpoint: Path,
    base: str = "",
    vae: str = "",
    text_encoder: str = "",
    tokenizer: str = "",
    ema: float | None = None,
    device="auto",
    cache: Path | None = None,
    images: bool = False,
) -> OneStepPipeline:
    """Open a pipeline from anything that `generate` takes, and from the same files. Raises AptError as
    `generate` does.

    images: whether images are asked for; else it is said where a run's folder has nothing but them yet.
    """
    if note := earlier_note(checkpoint, images):
        say(note)
    files = with_defaults(checkpoint, base, vae, text_encoder, tokenizer)
    source = find_source(checkpoint, files.base, ema)
    return OneStepPipeline.from_checkpoint(
        source, files.vae, files.text_encoder, files.tokenizer, files.base, device=device, cache=cache
    )


def find_captions(
    pipe: OneStepPipeline,
    count: int,
    moving: bool,
    given: Sequence[str] = (),
    shards: Path | None = None,
    advice: str = "give --data SHARDS or --prompts FILE",
) -> list[str]:
    """Find `count` captions: the given ones, those of shards or, for the miniature, drawn ones.

    If there are too few, they are repeated. Raises AptError, with `advice`, when there are none.
    """
    if shards:
        kind = "video" if moving else "image"
        given = [sample.caption for sample in ShardDataset(shards, kind).samples]
        if not given:
            raise AptError(
                f"{shards} holds no {kind}s: give shards with captions of {kind}s, or --prompts FILE."
            )
    elif not given and pipe.sources.transformer.metadata.get("base") == MINI:
        given = [scene(PROMPT_SEED, index, moving).caption for index in range(count)]
    if not given:
        raise AptError(f"{pipe.sources.transformer.name} needs captions to sample: {advice}.")
    return [given[number % len(given)] for number in range(count)]


def embed_all(pipe: OneStepPipeline, request: Request) -> list[Tensor]:
    """One embedding `[1, L, d]` per prompt. Equal prompts are encoded once."""
    unique = list(dict.fromkeys(request.prompts))
    text = pipe.embed(Request(unique, request.height, request.width, request.frames, request.fps))
    place = {prompt: number for number, prompt in enumerate(unique)}
    return [text[place[prompt]][None] for prompt in request.prompts]


def frames_of(pipe: OneStepPipeline, latents: Tensor) -> np.ndarray:
    """Decode latents `[1, C, f, h, w]` to pixels, uint8 `[F, H, W, 3]`."""
    return np.concatenate(list(pipe.frames(latents)))


def show_frame(axes, frame: np.ndarray, title: str = "", label: str = "") -> None:
    """Draw a frame without ticks, with a title above it and a label to its left."""
    axes.imshow(frame, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", wrap=False)
