"""Turn captioned files into shards: find them, check them all, decode, encode and write."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from apt_core.errors import AptError, NotFinite
from apt_core.files.atomic import make_folder
from apt_core.files.jsonfile import write_json
from apt_core.models.latents import stride
from apt_core.models.text import check_tokens
from apt_core.models.vae import encode
from trainer.data.captions import Bad, Item, find_items, item_id, refuse_bad
from trainer.data.cuts import Clip, Cut
from trainer.data.prompts import write_prompts
from trainer.data.shards import Sample, ShardWriter, indexed_names
from trainer.machines.distributed import World

SKIPPED = "skipped.json"
PART = "#"  # in a sample's id, between the file and the clip's number; a file's first clip has neither
PROBE = "A red circle, moving left: 3 \u00e9toiles \u5728\u5929\u7a7a."  # tells tokenizers apart


@dataclass(frozen=True)
class Report:
    """What a precompute run did.

    samples: how many samples of each kind are in the index now.
    encoded: how many of them this run encoded; the others were already there.
    skipped: the files that were left out, and why.
    seconds: decoding and encoding time; clips_per_second: encoded clips and images per second of it.
    converted: colour conversions and the like, by the file's name in the index.
    dropped: how many samples of the previous index are no longer in it.
    """

    samples: dict[str, int]
    encoded: int
    skipped: list[Bad]
    seconds: float
    clips_per_second: float
    converted: dict[str, list[str]] = field(default_factory=dict)
    dropped: int = 0


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
    prompts: Sequence[str] = (),
    world: World = World(),
    **cut_options,
) -> Report:
    """Encode the captioned videos and images of `folder` into shards and an index in `out`.

    trainer.data.shards.ShardDataset reads them.

    folder: a folder, or a list of files (.jsonl, .csv); see `find_items`.
    vae: any VAE that apt_core.models.vae.encode takes; text_encoder: an apt_core.models.text.TextEncoder.
    height, width (pixels), frames, fps: of every sample; a video is read from its start.
    cut_options: `aspects`, `shorter`, `clips_per_file`, `image_height` and `image_width` of
    trainer.data.cuts.Cut, for samples of several sizes and lengths.
    kinds: which files to use; skip_bad: leave bad files out; truncate_captions: cut off captions that are
    too long.
    batch: samples encoded together; dtype: of the stored latents and embeddings.
    progress: called as progress(done, total).
    prompts: texts without pictures that training needs too (trainer.data.prompts).
    world: every process calls this function with the same arguments and encodes its share of the files.

    All files, sizes and captions are checked before anything is encoded. The first problem is raised, with
    the number of the others; with `skip_bad` these files are left out and listed in the report and in
    skipped.json. A run that was stopped continues from its finished shards, and a repeated run encodes only
    new and changed files. Finished shards are never modified, and the old index stays until the new one is
    complete.
    Raises AptError for anything the user can fix (see `find_items`, `check_size`, `ShardWriter`), and
    NotFinite if a latent or an embedding is not finite.
    """
    folder, out = Path(folder), Path(out)
    if batch < 1:
        raise AptError(f"{batch} samples cannot be encoded together: batch must be above 0.")
    cut = Cut(
        height, width, frames, fps, tuple(kinds), image_frames=image_frames, stride=stride(vae), **cut_options
    )
    settings = {
        "vae": fingerprint(vae),
        "text encoder": fingerprint(text_encoder),
        "text_length": text_encoder.text_length,
        "truncate_captions": truncate_captions,
        **{name: value for name, value in asdict(cut).items() if name not in ("kinds", "stride")},
    }
    check_tokens(prompts, text_encoder.tokenize(prompts), text_encoder.text_length)
    with ShardWriter(out, settings, dtype=dtype, rank=world.rank) as writer:
        items, bad = find_items(folder, kinds, skip_bad=True)
        root = folder if folder.is_dir() else folder.parent
        mine, wrong = _check_captions(items[world.rank :: world.size], text_encoder, truncate_captions)
        clips, unreadable = _plan(root, mine, cut, writer.done)
        bad = (bad if world.main else []) + wrong + unreadable
        everybodys_bad = sum(world.gather(bad), [])
        if not skip_bad:
            refuse_bad(everybodys_bad)
        _refuse_nothing(folder, sum(world.gather(len(clips))), everybodys_bad, kinds)

        make_folder(out)
        todo = [clip for clip, sample in clips.items() if sample.key not in writer.done]
        started, done = time.perf_counter(), len(clips) - len(todo)
        _tell(progress, done, len(clips))
        failed, said = [], {}
        for part, pixels in _decoded(todo, cut, batch, failed, said):
            if not skip_bad:
                refuse_bad(failed)
            _encode([clips[clip] for clip in part], pixels, vae, text_encoder, truncate_captions, writer)
            done += len(part)
            _tell(progress, done, len(clips))
        if not skip_bad:
            refuse_bad(failed)
        writer.flush()
        seconds = time.perf_counter() - started

        encoded = len(todo) - len(failed)
        present = [
            (item_id(root, clip.item.path), clip.number, sample)
            for clip, sample in clips.items()
            if sample.key in writer.done
        ]
        converted = {item_id(root, path): sorted(words) for path, words in said.items()}
        everyone = world.gather((present, bad + failed, encoded, seconds, converted))

    placed = sorted((entry for part in everyone for entry in part[0]), key=lambda entry: entry[:2])
    present = [sample for _, _, sample in placed]
    bad = [entry for part in everyone for entry in part[1]]
    _refuse_nothing(folder, len(present), bad, kinds)
    dropped = 0
    if world.main:
        dropped = len(indexed_names(out) - {sample.id for sample in present})
        writer = ShardWriter(out, settings, dtype=dtype) if world.size > 1 else writer
        facts = {
            "vae": {"stride": list(stride(vae)), "channels": writer.done[present[0].key].bucket[0]},
            "text": {"dim": text_encoder.dim, "length": text_encoder.text_length},
            "fps": fps,
        }
        write_prompts(out, text_encoder, prompts)
        writer.finish([sample.key for sample in present], facts)
        write_json(
            out / SKIPPED, [{"file": item_id(root, entry.path), "reason": entry.reason} for entry in bad]
        )
    world.barrier()
    counts = {kind: sum(sample.kind == kind for sample in present) for kind in ("image", "video")}
    encoded, seconds = sum(part[2] for part in everyone), max(part[3] for part in everyone)
    converted = dict(sorted(entry for part in everyone for entry in part[4].items()))
    speed = encoded / seconds if seconds > 0 else 0.0
    return Report(counts, encoded, bad, seconds, speed, converted, dropped)


def fingerprint(model) -> str:
    """A hash of a network's weights, or of a text encoder's weights and tokenizer: 32 hexadecimal digits.

    It reads at most some thousand values of each tensor, so it is quick for models of any size. Training a
    model changes enough values to change the hash.
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


def _sample(root: Path, clip: Clip) -> Sample:
    stat = clip.item.path.stat()
    name = item_id(root, clip.item.path) + (f"{PART}{clip.number}" if clip.number else "")
    return Sample(name, clip.item.kind, clip.item.caption, f"{stat.st_size}-{stat.st_mtime_ns}")


def _check_captions(items: list[Item], text_encoder, truncate: bool) -> tuple[list[Item], list[Bad]]:
    if truncate:
        return items, []
    right, bad, most = [], [], text_encoder.text_length
    for item, tokens in zip(items, text_encoder.tokenize([item.caption for item in items])):
        if len(tokens) <= most:
            right.append(item)
        else:
            reason = (
                f"{item.path}: its caption has {len(tokens)} tokens, but at most {most} fit: "
                "shorten it, or give --truncate-captions."
            )
            bad.append(Bad(item.path, reason))
    return right, bad


def _plan(root: Path, items: list[Item], cut: Cut, done: dict) -> tuple[dict[Clip, Sample], list[Bad]]:
    """The samples to make from these files, and the files that cannot be used."""

    def clips(item: Item) -> list[Clip] | Bad:
        alone = Clip(item, 0, 0, 0)
        if cut.clips_per_file == 1 and _sample(root, alone).key in done:
            return [alone]  # already encoded: no need to open the file
        try:
            return cut.plan(item)
        except AptError as error:
            return Bad(item.path, str(error))

    with ThreadPoolExecutor(_workers()) as pool:
        plans = list(pool.map(clips, items))
    good = {clip: _sample(root, clip) for plan in plans if not isinstance(plan, Bad) for clip in plan}
    return good, [plan for plan in plans if isinstance(plan, Bad)]


def _decoded(
    clips: list[Clip], cut: Cut, batch: int, failed: list[Bad], said: dict[Path, set[str]]
) -> Iterator[tuple[list[Clip], np.ndarray]]:
    """Batches of clips from one bucket with their pixels, uint8 `[B, F, H, W, 3]`; threads read ahead.

    Unreadable files are added to `failed`, conversions to `said`.
    """
    buckets: dict[tuple, list[Clip]] = {}
    for clip in clips:
        buckets.setdefault(clip.bucket, []).append(clip)
    parts = [same[i : i + batch] for _, same in sorted(buckets.items()) for i in range(0, len(same), batch)]
    pool = ThreadPoolExecutor(_workers())

    def read(clip: Clip) -> np.ndarray:
        return cut.read(clip, lambda what: said.setdefault(clip.item.path, set()).add(what))

    try:
        ahead = [[pool.submit(read, clip) for clip in part] for part in parts[:2]]
        for number, part in enumerate(parts):
            good, pixels = [], []
            for clip, future in zip(part, ahead.pop(0)):
                try:
                    pixels.append(future.result())
                    good.append(clip)
                except AptError as error:
                    failed.append(Bad(clip.item.path, str(error)))
            if number + 2 < len(parts):
                ahead.append([pool.submit(read, clip) for clip in parts[number + 2]])
            if good:
                yield good, np.stack(pixels)
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def _encode(
    samples: list[Sample], pixels: np.ndarray, vae, text_encoder, truncate: bool, writer: ShardWriter
) -> None:
    video = torch.from_numpy(pixels).to(getattr(vae, "device", "cpu")).permute(0, 4, 1, 2, 3)
    latents = encode(vae, video.float() / 127.5 - 1)
    texts = text_encoder.encode(
        [sample.caption for sample in samples], **({"truncate": True} if truncate else {})
    )
    for sample, latent, text in zip(samples, latents, texts):
        if not (torch.isfinite(latent).all() and torch.isfinite(text).all()):
            raise NotFinite(
                f"{sample.id} is encoded to values that are not finite: "
                "load the VAE and the text encoder in fp32."
            )
    for sample, latent, text in zip(samples, latents, texts):
        writer.add(sample, latent, text)


def _refuse_nothing(folder: Path, left: int, bad: list[Bad], kinds: Sequence[str]) -> None:
    if left:
        return
    why = f" ({len(bad)} cannot be used, the first: {bad[0].reason.rstrip('.')})" if bad else ""
    raise AptError(f"{folder} holds no captioned {' or '.join(kinds)} that can be used{why}: add some.")


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)
