"""The real clips to compare with: a folder of media, or shards written by precompute."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.engine.request import Request
from apt_core.errors import AptError
from trainer.data.captions import METADATA, SUFFIXES, find_items
from trainer.data.media import read_image, read_video
from trainer.data.shards import INDEX, ShardDataset


@dataclass(frozen=True)
class Real:
    """names, captions: of each clip (None for a clip without a caption).
    what: what the page calls the clips.
    shards, rows: if the clips come from shards, the shards and the clips' positions in them.
    """

    folder: Path
    what: str
    names: tuple[str, ...]
    captions: tuple[str | None, ...]
    shards: ShardDataset | None = None
    rows: tuple[int, ...] = ()

    def prompts(self) -> list[str]:
        """The captions, without duplicates."""
        return list(dict.fromkeys(caption for caption in self.captions if caption))

    def clips(self, request: Request, pipe: OneStepPipeline, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """The clips with these numbers, one after another, uint8 `[F, H, W, 3]`, in the samples' size. pipe:
        its VAE decodes clips from shards. Raises AptError for a file that cannot be read or is too short.
        """
        for number in numbers:
            name = self.names[number]
            if self.shards is not None:
                latent = self.shards.get(self.rows[number])[0]
                yield np.concatenate(list(pipe.frames(latent[None])))
            elif request.frames == 1:
                yield read_image(self.folder / name, request.height, request.width)
            else:
                yield read_video(
                    self.folder / name, request.frames, request.fps, request.height, request.width
                )


def find_real(data: Path, request: Request, latents: tuple[int, ...], limit: int) -> Real:
    """The first `limit` clips in `data` (pictures, if a sample has one frame), in the order of their names
    or, for shards, of the index.

    latents: shape of one sample `[C, F, h, w]`; only clips of this shape are taken from shards.

    Raises AptError if the folder is missing or has no such clip, and for shards of another size or frame
    rate.
    """
    kind, word = ("image", "picture") if request.frames == 1 else ("video", "video")
    folder = next((f for f in (data, data / "latents") if (f / INDEX).is_file()), None)
    if folder is not None:
        return _from_shards(folder, kind, request, latents, limit)
    if not data.is_dir():
        raise AptError(f"--data {data} is not a folder: give a folder of {word}s, or of precompute's shards.")
    files = sorted(
        path
        for path in data.rglob("*")
        if path.suffix.lower() in SUFFIXES[kind]
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(data).parts)
    )[:limit]
    if not files:
        raise AptError(
            f"--data {data} has no {word} in it: give a folder of {word}s, or of precompute's shards."
        )
    captioned = any((data / name).is_file() for name in METADATA) or any(
        file.with_suffix(".txt").is_file() for file in files
    )
    captions = {i.path: i.caption for i in find_items(data, (kind,), skip_bad=True)[0]} if captioned else {}
    names = tuple(file.relative_to(data).as_posix() for file in files)
    return Real(data, f"real {word}s", names, tuple(captions.get(file) for file in files))


def _from_shards(folder: Path, kind: str, request: Request, latents: tuple[int, ...], limit: int) -> Real:
    shards = ShardDataset(folder, kind)
    rows = tuple(shards.buckets.get(tuple(latents), ()))[:limit]
    if not rows:
        there = ", ".join(str(list(shape)) for shape in sorted(shards.buckets)) or f"no {kind}"
        raise AptError(
            f"--data {folder} has latents of {there}, but the samples' latents are {list(latents)}: give "
            "shards of that size."
        )
    if kind == "video" and float(shards.fps) != request.fps:
        raise AptError(
            f"--data {folder} is at {shards.fps:g} fps and the samples are at {request.fps:g}: give --fps "
            f"{shards.fps:g}."
        )
    found = [shards.samples[row] for row in rows]
    return Real(
        folder,
        f"real {'picture' if kind == 'image' else kind}s, through the VAE",
        tuple(sample.id for sample in found),
        tuple(sample.caption for sample in found),
        shards,
        rows,
    )
