"""Captioned files to shards: find, check everything, decode, encode, write (trainer.shards)."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from apt_core.errors import AptError
from apt_core.vae import check_size, encode, stride
from trainer.captions import Bad, Item, find_items, item_id, refuse_bad
from trainer.files import make_folder, write_json
from trainer.media import check_image, check_video, read_image, read_video
from trainer.shards import Sample, ShardWriter

SKIPPED = "skipped.json"
PROBE = "A red circle, moving left: 3 \u00e9toiles \u5728\u5929\u7a7a."  # its tokens tell one tokenizer from another


@dataclass(frozen=True)
class Report:
    """What a run did. samples: in the index, by kind; encoded: by this run, the others were there; skipped: what was left out
    and why; seconds: of encoding alone; clips_per_second: clips and images encoded in a second."""

    samples: dict[str, int]
    encoded: int
    skipped: list[Bad]
    seconds: float
    clips_per_second: float


@dataclass(frozen=True)
class Cut:
    """What files are cut to. Pixels, frames, frames a second; an image is shown for `image_frames` frames."""

    height: int
    width: int
    frames: int
    fps: float
    image_frames: int = 1

    def check(self, item: Item) -> None:
        """Raises AptError when the file cannot be read or is too short, without decoding all of it."""
        if item.kind == "video":
            check_video(item.path, self.frames, self.fps)
        else:
            check_image(item.path)

    def read(self, item: Item) -> np.ndarray:
        """uint8 `[F, H, W, 3]`. Raises AptError for a damaged file."""
        if item.kind == "video":
            return read_video(item.path, self.frames, self.fps, self.height, self.width)
        return read_image(item.path, self.height, self.width).repeat(self.image_frames, axis=0)


def precompute(
    folder: str | Path,
    out: str | Path,
    vae,
    text_encoder,
    *,
    height: int,
    width: int,
    frames: int,
    fps: float,
    kinds: Sequence[str] = ("image", "video"),
    skip_bad: bool = False,
    truncate_captions: bool = False,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
    image_frames: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Encode the captioned videos and images of `folder` into shards and an index in `out`, for `trainer.shards.ShardDataset`.

    vae: for apt_core.vae.encode; text_encoder: an apt_core.text.TextEncoder; height, width, frames: pixels and frames of every
    sample (videos from their start, at `fps`); kinds: which files to take; batch: samples that are encoded together; dtype: of what is
    stored; progress(done, total) is called as samples get done.

    All files, sizes and captions are checked before anything is encoded, and the first problem is raised with the number of the
    others; with `skip_bad` such files are left out, named in the report and in skipped.json. A stopped run goes on from its
    finished shards, a repeated one encodes only what is new or changed. Whole shards in `out` are
    never changed, and the old index stands until the new one is complete.
    Raises AptError for what the user can mend: see `find_items`, `check_size`, `ShardWriter`.
    """
    folder, out = Path(folder), Path(out)
    cut = Cut(height, width, frames, fps, image_frames)
    if fps <= 0 or frames < 1 or batch < 1:
        raise AptError(f"{frames} frames at {fps:g} fps in batches of {batch} cannot be read: all three must be above 0.")
    for kind, count in (("video", frames), ("image", image_frames)):
        if kind in kinds:
            check_size(height, width, count, stride(vae), what=f"precompute: {'a video' if kind == 'video' else 'an image'}")

    settings = {
        "vae": fingerprint(vae),
        "text encoder": fingerprint(text_encoder),
        "height": height, "width": width, "frames": frames, "fps": fps, "image_frames": image_frames,
        "text_length": text_encoder.text_length, "truncate_captions": truncate_captions,
    }  # fmt: skip
    with ShardWriter(out, settings, dtype=dtype) as writer:
        items, bad = find_items(folder, kinds, skip_bad=True)
        items, wrong = _check_captions(items, text_encoder, truncate_captions)
        samples = {item: _sample(folder, item) for item in items}
        unreadable = _check_files([item for item, sample in samples.items() if sample.key not in writer.done], cut)
        samples = {item: sample for item, sample in samples.items() if item not in unreadable}
        todo = [item for item, sample in samples.items() if sample.key not in writer.done]
        bad += wrong + list(unreadable.values())
        if not skip_bad:
            refuse_bad(bad)
        _refuse_nothing(folder, samples, bad, kinds)

        make_folder(out)
        started, done = time.perf_counter(), len(samples) - len(todo)
        _tell(progress, done, len(samples))
        failed = []
        for part, pixels in _decoded(todo, cut, batch, failed):
            if not skip_bad:
                refuse_bad(failed)
            _encode([samples[item] for item in part], pixels, vae, text_encoder, truncate_captions, writer)
            done += len(part)
            _tell(progress, done, len(samples))
        if not skip_bad:
            refuse_bad(failed)
        writer.flush()
        seconds = time.perf_counter() - started

        bad += failed
        present = [sample.key for sample in samples.values() if sample.key in writer.done]
        _refuse_nothing(folder, present, bad, kinds)
        facts = {
            "vae": {"stride": list(stride(vae)), "channels": writer.done[present[0]].bucket[0]},
            "text": {"dim": text_encoder.dim, "length": text_encoder.text_length},
            "fps": fps,
        }
        writer.finish(present, facts)
    skipped = [{"file": item_id(folder, entry.path), "reason": entry.reason} for entry in bad]
    write_json(out / SKIPPED, skipped)
    encoded = len(todo) - len(failed)
    counts = {kind: sum(writer.done[key].kind == kind for key in present) for kind in ("image", "video")}
    return Report(counts, encoded, bad, seconds, encoded / seconds if seconds > 0 else 0.0)


def fingerprint(model) -> str:
    """A short name for the weights of a network or of a text encoder, its tokenizer included: 32 hexadecimal digits.

    Of each tensor some thousand values are read, so this is quick for a model of any size; any training changes them.
    """
    network = model if hasattr(model, "state_dict") else model.model
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 4096)].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + some.tobytes())
    for statistic in ("latents_mean", "latents_std"):
        digest.update(str(list(getattr(getattr(network, "config", None), statistic, ()))).encode())
    if hasattr(model, "tokenize"):
        digest.update(str(model.tokenize([PROBE])).encode())
    return digest.hexdigest()


def _sample(folder: Path, item: Item) -> Sample:
    stat = item.path.stat()
    return Sample(item_id(folder, item.path), item.kind, item.caption, f"{stat.st_size}-{stat.st_mtime_ns}")


def _check_captions(items: list[Item], text_encoder, truncate: bool) -> tuple[list[Item], list[Bad]]:
    if truncate:
        return items, []
    right, bad, most = [], [], text_encoder.text_length
    for item, tokens in zip(items, text_encoder.tokenize([item.caption for item in items])):
        if len(tokens) <= most:
            right.append(item)
        else:
            reason = f"{item.path}: its caption has {len(tokens)} tokens, but at most {most} fit: shorten it, or give --truncate-captions."
            bad.append(Bad(item.path, reason))
    return right, bad


def _check_files(items: list[Item], cut: Cut) -> dict[Item, Bad]:
    def problem(item: Item) -> Bad | None:
        try:
            cut.check(item)
        except AptError as error:
            return Bad(item.path, str(error))

    with ThreadPoolExecutor(_workers()) as pool:
        return {item: found for item, found in zip(items, pool.map(problem, items)) if found}


def _decoded(items: list[Item], cut: Cut, batch: int, failed: list[Bad]) -> Iterator[tuple[list[Item], np.ndarray]]:
    """Batches of one kind with their pixels uint8 `[B, F, H, W, 3]`, read ahead in threads; unreadable files go to `failed`."""
    parts = []
    for kind in ("image", "video"):
        of_kind = [item for item in items if item.kind == kind]
        parts += [of_kind[i : i + batch] for i in range(0, len(of_kind), batch)]
    pool = ThreadPoolExecutor(_workers())
    try:
        ahead = [[pool.submit(cut.read, item) for item in part] for part in parts[:2]]
        for number, part in enumerate(parts):
            good, pixels = [], []
            for item, future in zip(part, ahead.pop(0)):
                try:
                    pixels.append(future.result())
                    good.append(item)
                except AptError as error:
                    failed.append(Bad(item.path, str(error)))
            if number + 2 < len(parts):
                ahead.append([pool.submit(cut.read, item) for item in parts[number + 2]])
            if good:
                yield good, np.stack(pixels)
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def _encode(samples: list[Sample], pixels: np.ndarray, vae, text_encoder, truncate: bool, writer: ShardWriter) -> None:
    video = torch.from_numpy(pixels).to(getattr(vae, "device", "cpu")).permute(0, 4, 1, 2, 3)
    latents = encode(vae, video.float() / 127.5 - 1)
    texts = text_encoder.encode([sample.caption for sample in samples], **({"truncate": True} if truncate else {}))
    for sample, latent, text in zip(samples, latents, texts):
        if not (torch.isfinite(latent).all() and torch.isfinite(text).all()):
            raise AptError(f"{sample.id} is encoded to values that are not finite: load the VAE and the text encoder in fp32.")
    for sample, latent, text in zip(samples, latents, texts):
        writer.add(sample, latent, text)


def _refuse_nothing(folder: Path, left: Sized, bad: list[Bad], kinds: Sequence[str]) -> None:
    if left:
        return
    why = f" ({len(bad)} cannot be used, the first: {bad[0].reason.rstrip('.')})" if bad else ""
    raise AptError(f"{folder} holds no captioned {' or '.join(kinds)} that can be used{why}: add some.")


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)
