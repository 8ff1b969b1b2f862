"""What every training reads: normalised latents and text embeddings in safetensors shards, with one index of
all samples.

A shard holds samples of one kind and one latent shape: `latents` [N, C, F, h, w], `text` [sum of L, d] (each
embedding at its true length, one after the other) and `offsets` [N + 1] into its rows. Its metadata repeats
what the index says of its samples, so that a run which was stopped before its index was written can go on
from its shards, and has the format's version and a digest of all of it, which is compared before the first of
its rows is used.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.errors import AptError
from apt_core.files.contract import metadata_json
from apt_core.files.jsonfile import read_object
from apt_core.files.tensorfile import Header, read_header, write_tensors
from trainer.files import write_json

FORMAT, VERSION = "apt-shards", 1
INDEX = "index.json"
TENSORS = ("latents", "offsets", "text")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
SHARD = re.compile(r"shard-[\d-]+\.safetensors")
SHARD_SAMPLES, SHARD_BYTES = 512, 64 * 2**20
AGAIN = "run precompute again"


@dataclass(frozen=True)
class Sample:
    """One line of the index. id: path below the data folder; source: fingerprint of the file. What the writer
    fills in: bucket, the latent's shape (C, F, h, w); tokens, the rows of the text embedding; shard and row,
    where it lies.
    """

    id: str
    kind: str
    caption: str
    source: str
    bucket: tuple[int, ...] = ()
    tokens: int = 0
    shard: str = ""
    row: int = 0

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it was made from: a changed file or caption is another sample."""
        return self.id, self.kind, self.source, self.caption


class ShardWriter:
    """Adds samples to a folder of shards; use it in a `with` statement, which also on an error keeps what was
    added.

    settings: everything that latents and embeddings depend on (JSON; models by fingerprint). `done` holds the
    samples of finished shards by `Sample.key`. rank: of this process among several that write to the folder
    at once. Files appear whole or not at all, and the index last. Raises AptError when the folder's shards
    have other settings.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping, *, dtype: torch.dtype = torch.float32, rank: int = 0
    ):
        self.folder, self.dtype, self.rank = Path(folder), dtype, rank
        self.settings = json.loads(json.dumps({**settings, "dtype": str(dtype).removeprefix("torch.")}))
        self.done: dict[tuple, Sample] = {}
        self._taken: set[str] = set()
        self._open: dict[tuple, list[tuple[Sample, Tensor, Tensor]]] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise AptError(f"{self.folder} is a file: give a folder for the shards.")
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._resume(path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_) -> None:
        self.flush()

    def add(self, sample: Sample, latent: Tensor, text: Tensor) -> None:
        """Take one more sample: latent `[C, F, h, w]`, text `[L, d]`. Full shards are written out, see also
        `flush`.
        """
        key = (sample.kind, *latent.shape)
        batch = self._open.setdefault(key, [])
        batch.append((sample, latent.detach().to("cpu", self.dtype), text.detach().to("cpu", self.dtype)))
        if len(batch) >= SHARD_SAMPLES or sum(a.nbytes + b.nbytes for _, a, b in batch) >= SHARD_BYTES:
            self._write(key)

    def flush(self) -> None:
        """Write every sample that is still held."""
        for key in list(self._open):
            self._write(key)

    def finish(self, keys: Iterable[tuple], facts: Mapping) -> Path:
        """Flush, then write the index of the samples with these keys, in their order; returns its path.
        facts: vae, text, fps, ...
        """
        self.flush()
        samples = [self.done[key] for key in keys]
        index = {
            "format": FORMAT,
            "version": VERSION,
            **facts,
            "settings": self.settings,
            "fingerprint": fingerprint_of(self.settings, samples),
        }
        path = self.folder / INDEX
        write_json(path, index | {"samples": [asdict(sample) for sample in samples]})
        return path

    def _resume(self, path: Path) -> None:
        try:
            header = read_header(path)
            metadata = header.metadata
            version = int(metadata.get("version", 1))  # those of version 1 did not say so at first
        except (AptError, ValueError, OSError):
            return  # damaged: its samples are encoded again, into a shard of this name
        if version != VERSION:
            raise AptError(
                f"{self.folder} holds shards of {FORMAT} version {version}, and this program writes version {VERSION}: "
                "give another folder, or delete it to start over."
            )
        try:
            settings, described = (
                metadata_json(path, metadata, "settings"),
                metadata_json(path, metadata, "samples"),
            )
            samples = [read_sample(entry) for entry in described["list"]]
            if not _is_whole(path, header):
                return
        except (AptError, KeyError, TypeError, OSError):
            return  # damaged too
        if changed := sorted(
            k for k in settings.keys() | self.settings.keys() if settings.get(k) != self.settings.get(k)
        ):
            names = ", ".join(
                f"{k} {_short(settings.get(k))} instead of {_short(self.settings.get(k))}" for k in changed
            )
            raise AptError(
                f"{self.folder} holds shards made with {names}: give another folder, or delete it to start over."
            )
        self._taken.add(path.name)
        self.done.update((sample.key, sample) for sample in samples)

    def _write(self, key: tuple) -> None:
        if not (batch := self._open.pop(key, None)):
            return
        number, of = len(self._taken), f"{self.rank:03d}-" if self.rank else ""
        while (name := f"shard-{of}{number:05d}.safetensors") in self._taken:
            number += 1
        samples = [
            replace(sample, bucket=tuple(latent.shape), tokens=len(text), shard=name, row=row)
            for row, (sample, latent, text) in enumerate(batch)
        ]
        lengths = torch.tensor([0] + [len(text) for _, _, text in batch])
        tensors = {
            "latents": torch.stack([latent for _, latent, _ in batch]),
            "text": torch.cat([text for _, _, text in batch]),
            "offsets": lengths.cumsum(0),
        }
        strings = {
            "version": str(VERSION),
            "settings": json.dumps(self.settings),
            "samples": json.dumps({"list": [asdict(sample) for sample in samples]}),
        }
        digest = _digest(
            strings, (tensors[key].contiguous().view(-1).view(torch.uint8).numpy() for key in TENSORS)
        )
        write_tensors(self.folder / name, tensors, strings | {"digest": digest})
        self._taken.add(name)
        self.done.update((sample.key, sample) for sample in samples)


class ShardDataset:
    """The samples of one kind ("image" or "video"), read from disk as they are asked for.

    `samples` is the index in order; `vae`, `text_dim`, `text_length`, `fps`, `settings` and `fingerprint` (of
    all sources and settings) are what the index says. Raises AptError when the index or a shard is missing,
    damaged or of another format.
    """

    def __init__(self, folder: str | Path, kind: str):
        self.folder, path = Path(folder), Path(folder) / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AptError(
                f"{path} does not exist: run precompute on a folder of captioned clips first."
            ) from None
        except (OSError, ValueError, RecursionError):
            raise AptError(f"{path} is damaged: {AGAIN}.") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise AptError(
                f"{path} is not an index of {FORMAT} version {VERSION}: {AGAIN} into another folder."
            )
        if (version := index.get("version")) != VERSION:
            raise AptError(
                f"{path} is of {FORMAT} version {version}, and this program reads version {VERSION}: {AGAIN} into another folder."
            )
        try:
            self.vae, self.fps, self.settings = index["vae"], index["fps"], index["settings"]
            self.text_dim, self.text_length, self.fingerprint = (
                index["text"]["dim"],
                index["text"]["length"],
                index["fingerprint"],
            )
            everything = [read_sample(entry) for entry in index["samples"]]
            if self.fingerprint != fingerprint_of(self.settings, everything) or not all(
                map(_sound, everything)
            ):
                raise KeyError
            self.samples = [sample for sample in everything if sample.kind == kind]
        except (KeyError, TypeError, ValueError):
            raise AptError(f"{path} is damaged: {AGAIN}.") from None
        self._shards: dict[str, tuple[Header, list[int]]] = {}
        self._listed: dict[str, list[Sample]] = {}
        for sample in self.samples:
            self._listed.setdefault(sample.shard, []).append(sample)
        self._check()

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def buckets(self) -> dict[tuple[int, int, int, int], list[int]]:
        """Positions of the samples by latent shape (C, F, h, w): a batch is drawn from one of them."""
        buckets = {}
        for i, sample in enumerate(self.samples):
            buckets.setdefault(sample.bucket, []).append(i)
        return buckets

    def get(self, i: int) -> tuple[Tensor, Tensor, str]:
        """Latent `[C, F, h, w]`, text embedding `[L, d]` at its true length, both fp32, and the caption."""
        latent, embedding = self._stored(i)
        return (
            latent.to(torch.float32, copy=True),
            embedding.to(torch.float32, copy=True),
            self.samples[i].caption,
        )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Latents `[B, C, F, h, w]`, text `[B, text_length, d]` with zeros after each caption, both fp32, and
        the captions.

        Copies by numpy: a thread that reads ahead and calls torch would start a second team of torch's
        threads beside the training's.
        Raises AptError when the samples are of different shapes.
        """
        shapes = {self.samples[i].bucket for i in indices}
        if len(shapes) > 1:
            raise AptError(
                f"{self.folder}: samples of different shapes {sorted(shapes)} cannot be one batch: draw them from one bucket."
            )
        latents = np.empty((len(indices), *self.samples[indices[0]].bucket), np.float32)
        text = np.zeros((len(indices), self.text_length, self.text_dim), np.float32)
        for x, padded, i in zip(latents, text, indices):
            latent, embedding = self._stored(i)
            _copy(latent, x)
            _copy(embedding, padded[: len(embedding)])
        return torch.from_numpy(latents), torch.from_numpy(text), [self.samples[i].caption for i in indices]

    def _stored(self, i: int) -> tuple[Tensor, Tensor]:
        """Latent and text embedding as they are stored. They are read, not mapped: a page of a mapped file
        that is gone ends the process.
        """
        sample = self.samples[i]
        header, offsets = self._shard(sample.shard)
        path = self.folder / sample.shard
        try:
            with path.open("rb", buffering=0) as file:
                return _rows(file, header, "latents", sample.row, sample.row + 1)[0], _rows(
                    file, header, "text", *offsets[sample.row : sample.row + 2]
                )
        except (OSError, EOFError) as error:
            raise AptError(f"{path} cannot be read ({error}): {AGAIN}.") from None

    def _check(self) -> None:
        for name, samples in self._listed.items():
            path = self.folder / name
            try:
                header = read_header(path)
            except AptError as error:
                raise AptError(f"{str(error).rpartition(': ')[0]}: {AGAIN}.") from None
            shapes = header.shapes
            if header.dtypes.keys() != set(TENSORS) or not set(header.dtypes.values()) <= DTYPES.keys():
                raise AptError(f"{path} is not a shard of latents: {AGAIN}.")
            latents, text = shapes.get("latents", ()), shapes.get("text", ())
            fits = all(
                latents[1:] == s.bucket and 0 <= s.row < latents[0] and s.tokens <= self.text_length
                for s in samples
            )
            if not fits or text[1:] != (self.text_dim,) or shapes.get("offsets") != (latents[0] + 1,):
                raise AptError(f"{path} does not hold what {INDEX} says: {AGAIN}.")

    def _shard(self, name: str) -> tuple[Header, list[int]]:
        """Where a shard's rows are. All of it is read the first time, to compare its digest; a shard from
        before digests has none.
        """
        if name not in self._shards:
            path = self.folder / name
            try:
                header = read_header(path)
                if not _is_whole(path, header):
                    raise AptError(f"{path} is not what was written there, so it is damaged: {AGAIN}.")
                with path.open("rb") as file:
                    offsets = _rows(file, header, "offsets", 0, header.shapes["offsets"][0]).tolist()
            except (OSError, EOFError) as error:
                raise AptError(f"{path} cannot be read ({error}): {AGAIN}.") from None
            if (
                any(offsets[s.row + 1] - offsets[s.row] != s.tokens for s in self._listed[name])
                or offsets[-1] != header.shapes["text"][0]
            ):
                raise AptError(f"{path} does not hold what {INDEX} says: {AGAIN}.")
            self._shards[name] = header, offsets
        return self._shards[name]


def _rows(file, header: Header, key: str, first: int, last: int) -> Tensor:
    """Rows first to last - 1 of a tensor in an open file. Raises EOFError where they are not there."""
    begin, end = header.places[key]
    count, *shape = header.shapes[key]
    size = (end - begin) // max(count, 1)
    raw = bytearray((last - first) * size)
    file.seek(begin + first * size)
    view = memoryview(raw)
    while view:
        if not (read := file.readinto(view)):
            raise EOFError("it ends too soon")
        view = view[read:]
    dtype = DTYPES[header.dtypes[key]]
    return (
        torch.frombuffer(raw, dtype=dtype).view(last - first, *shape)
        if raw
        else torch.empty((last - first, *shape), dtype=dtype)
    )


def _is_whole(path: Path, header: Header) -> bool:
    """Whether a shard has the digest that it was written with, or none. Raises OSError."""
    if "digest" not in header.metadata:
        return True

    def parts() -> Iterator[bytes]:
        with path.open("rb") as file:
            for key in TENSORS:
                begin, end = header.places[key]
                file.seek(begin)
                while begin < end and (part := file.read(min(end - begin, 1 << 20))):
                    begin += len(part)
                    yield part

    return _digest(header.metadata, parts()) == header.metadata["digest"]


def _digest(strings: Mapping[str, str], parts: Iterable) -> str:
    """Of a shard: what it says of its samples, then the bytes of its tensors in the order of their names."""
    digest = hashlib.blake2b(json.dumps([strings["settings"], strings["samples"]]).encode(), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def indexed_names(folder: Path) -> set[str]:
    """The names of the samples in a folder's index; none if there is no index, or it cannot be read."""
    try:
        return {entry["id"] for entry in read_object(folder / INDEX, AGAIN)["samples"]}
    except (AptError, KeyError, TypeError):
        return set()


def fingerprint_of(settings: Mapping, samples: Sequence[Sample]) -> str:
    """What an index is known by: the settings, and what each sample was made from."""
    return hashlib.blake2b(
        json.dumps([settings, [sample.key for sample in samples]]).encode(), digest_size=16
    ).hexdigest()


def _sound(sample: Sample) -> bool:
    """Whether its place can be one: a shard of this folder, and numbers."""
    numbers = (*sample.bucket, sample.tokens, sample.row)
    return (
        isinstance(sample.shard, str)
        and SHARD.fullmatch(sample.shard) is not None
        and all(type(n) is int and n >= 0 for n in numbers)
    )


def _copy(stored: Tensor, out: np.ndarray) -> None:
    """A stored tensor into fp32 memory of its shape."""
    if stored.dtype == torch.bfloat16:  # unknown to numpy: the upper half of an fp32 number
        np.left_shift(stored.view(torch.uint16).numpy(), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, stored.numpy(), casting="same_kind")


def read_sample(entry: Mapping) -> Sample:
    """A line of an index, or of a shard's metadata."""
    return Sample(**{**entry, "bucket": tuple(entry["bucket"])})


def _short(value) -> str:
    return value[:8] if isinstance(value, str) else str(value)
