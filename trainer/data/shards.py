"""The training data on disk: normalised latents and text embeddings in safetensors shards, and one index.

A shard holds samples of one kind and one latent shape: `latents` [N, C, F, h, w], `text` [sum of L, d] (the
embeddings one after another, without padding) and `offsets` [N + 1], where each embedding begins in `text`.
Its metadata holds the format's version, the samples' lines of the index, so that a run which was stopped
before the index was written can continue from its shards, and a digest of its contents, which is checked
before the shard is used.
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
from apt_core.files.jsonfile import read_object, write_json
from apt_core.files.tensorfile import Header, read_header, write_tensors

FORMAT, VERSION = "apt-shards", 1
INDEX = "index.json"
TENSORS = ("latents", "offsets", "text")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
SHARD = re.compile(r"shard-[\d-]+\.safetensors")
SHARD_SAMPLES, SHARD_BYTES = 512, 64 * 2**20
AGAIN = "run precompute again"


@dataclass(frozen=True)
class Sample:
    """One entry of the index.

    id: the file's path relative to the data folder, with the clip's number if it is not the file's first;
    kind: "image" or "video"; source: the file's size and modification time.
    ShardWriter fills in the rest. bucket: the latent's shape (C, F, h, w); tokens: how many rows its text
    embedding has; shard, row: where the sample is stored.
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
        """What the sample was made from. If the file or the caption changes, it is a different sample."""
        return self.id, self.kind, self.source, self.caption


class ShardWriter:
    """Adds samples to a folder of shards. Use it in a `with` statement, so that an error loses no sample.

    settings: everything that latents and embeddings depend on, as JSON, with models given by fingerprint.
    rank: this process's number, if several write to the folder at once.
    `done` holds the samples of finished shards by `Sample.key`. Each file is written atomically, the index
    last.
    Raises AptError when the folder holds shards made with other settings or of another version.
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
        """Add one sample: latent `[C, F, h, w]`, text `[L, d]`. A shard is written once it is full."""
        key = (sample.kind, *latent.shape)
        batch = self._open.setdefault(key, [])
        batch.append((sample, latent.detach().to("cpu", self.dtype), text.detach().to("cpu", self.dtype)))
        if len(batch) >= SHARD_SAMPLES or sum(a.nbytes + b.nbytes for _, a, b in batch) >= SHARD_BYTES:
            self._write(key)

    def flush(self) -> None:
        """Write all samples that are not in a file yet."""
        for key in list(self._open):
            self._write(key)

    def finish(self, keys: Iterable[tuple], facts: Mapping) -> Path:
        """Flush, then write the index: the samples with these keys, in this order. Returns its path.

        facts: what else the index says (vae, text, fps).
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
            version = int(metadata.get("version", 1))  # early shards of version 1 have no version
        except (AptError, ValueError, OSError):
            return  # damaged: its samples are encoded again, into a shard with the same name
        if version != VERSION:
            raise AptError(
                f"{self.folder} holds shards of {FORMAT} version {version}, "
                f"but this program writes version {VERSION}: "
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
                f"{self.folder} holds shards made with {names}: "
                "give another folder, or delete it to start over."
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
    """The samples of one kind ("image" or "video") in a folder of shards, read from disk when needed.

    `samples` lists them in the index's order. `vae`, `text_dim`, `text_length`, `fps`, `settings` and
    `fingerprint` come from the index; `fingerprint` changes with any source file, caption or setting.
    Raises AptError when the index or a shard is missing, damaged or of another format.
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
                f"{path} is of {FORMAT} version {version}, but this program reads version {VERSION}: "
                f"{AGAIN} into another folder."
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
        """Positions of the samples by latent shape (C, F, h, w). All samples of a batch share one shape."""
        buckets = {}
        for i, sample in enumerate(self.samples):
            buckets.setdefault(sample.bucket, []).append(i)
        return buckets

    def get(self, i: int) -> tuple[Tensor, Tensor, str]:
        """Latent `[C, F, h, w]`, text embedding `[L, d]` without padding, both fp32, and the caption."""
        latent, embedding = self._stored(i)
        return (
            latent.to(torch.float32, copy=True),
            embedding.to(torch.float32, copy=True),
            self.samples[i].caption,
        )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Latents `[B, C, F, h, w]`, text `[B, text_length, d]` padded with zeros (both fp32), and captions.

        It copies with numpy, because torch in the thread that reads ahead would start a second pool of
        threads beside the one that trains.
        Raises AptError when the samples have different shapes.
        """
        shapes = {self.samples[i].bucket for i in indices}
        if len(shapes) > 1:
            raise AptError(
                f"{self.folder}: samples of different shapes {sorted(shapes)} cannot be one batch: "
                "draw them from one bucket."
            )
        latents = np.empty((len(indices), *self.samples[indices[0]].bucket), np.float32)
        text = np.zeros((len(indices), self.text_length, self.text_dim), np.float32)
        for x, padded, i in zip(latents, text, indices):
            latent, embedding = self._stored(i)
            _copy(latent, x)
            _copy(embedding, padded[: len(embedding)])
        return torch.from_numpy(latents), torch.from_numpy(text), [self.samples[i].caption for i in indices]

    def _stored(self, i: int) -> tuple[Tensor, Tensor]:
        """A latent and its text embedding in the dtype they are stored in.

        They are read, not mapped: if a mapped file disappears, touching it kills the process.
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
        """A shard's header and offsets. The first time, the whole shard is read to check its digest.

        Old shards have no digest and are not checked.
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
    """Read rows first to last - 1 of a tensor from an open file. Raises EOFError if the file ends before."""
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
    """Whether a shard's contents match its digest; True if it has none. Raises OSError."""
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
    """Digest of a shard: its settings and sample entries, then its tensors' bytes, sorted by name."""
    digest = hashlib.blake2b(json.dumps([strings["settings"], strings["samples"]]).encode(), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def indexed_names(folder: Path) -> set[str]:
    """The ids of the samples in a folder's index; empty if there is no index or it cannot be read."""
    try:
        return {entry["id"] for entry in read_object(folder / INDEX, AGAIN)["samples"]}
    except (AptError, KeyError, TypeError):
        return set()


def fingerprint_of(settings: Mapping, samples: Sequence[Sample]) -> str:
    """Hash of the settings and of what each sample was made from; it identifies an index."""
    return hashlib.blake2b(
        json.dumps([settings, [sample.key for sample in samples]]).encode(), digest_size=16
    ).hexdigest()


def _sound(sample: Sample) -> bool:
    """Whether an entry is plausible: a shard's name without a path, and numbers that are not negative."""
    numbers = (*sample.bucket, sample.tokens, sample.row)
    return (
        isinstance(sample.shard, str)
        and SHARD.fullmatch(sample.shard) is not None
        and all(type(n) is int and n >= 0 for n in numbers)
    )


def _copy(stored: Tensor, out: np.ndarray) -> None:
    """Copy a stored tensor into an fp32 array of the same shape."""
    if stored.dtype == torch.bfloat16:  # numpy has no bf16, but it is just the upper half of an fp32 number
        np.left_shift(stored.view(torch.uint16).numpy(), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, stored.numpy(), casting="same_kind")


def read_sample(entry: Mapping) -> Sample:
    """Make a Sample from an entry of an index or of a shard's metadata."""
    return Sample(**{**entry, "bucket": tuple(entry["bucket"])})


def _short(value) -> str:
    return value[:8] if isinstance(value, str) else str(value)
