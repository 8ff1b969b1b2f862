"""Match the samples of one folder with those of another."""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apt_core.errors import AptError
from trainer.data.captions import ALL_SUFFIXES, METADATA, find_items
from trainer.data.media import kind_of, read_about

MARK = re.compile(r"(.*-seed\d+)-[0-9a-f]{6}")  # generate's names end in a hash


@dataclass(frozen=True)
class Sample:
    """A sample's file. prompt, seed, number: from the file's metadata; the prompt may also come from a
    caption beside it. None if unknown."""

    path: Path
    prompt: str | None = None
    seed: int | None = None
    number: int | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.path)


@dataclass(frozen=True)
class Pair:
    a: Sample
    b: Sample

    @property
    def prompt(self) -> str | None:
        return self.a.prompt or self.b.prompt


def read_samples(folder: Path) -> list[Sample]:
    """Read a folder's videos and pictures, sorted by name.

    For files whose metadata has no prompt, captions are read as `precompute` reads them.
    Raises AptError for a folder that is missing or has no samples, and for files that cannot be opened.
    """
    if not folder.is_dir():
        raise AptError(f"{folder} is not a folder: give two folders of samples, as generate writes them.")
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise AptError(f"{folder} cannot be read ({error.strerror}): check its permissions.") from None
    media = [path for path in files if path.suffix.lower() in ALL_SUFFIXES]
    if not media:
        raise AptError(
            f"{folder} holds no videos or pictures: give a folder of samples, as generate writes them."
        )
    stems = {path.stem for path in media}
    captioned = any(
        path.name in METADATA or path.suffix.lower() == ".txt" and path.stem in stems for path in files
    )
    captions = {item.path: item.caption for item in find_items(folder, skip_bad=True)[0]} if captioned else {}
    return [_sample(path, captions.get(path)) for path in media]


def match(a: Sequence[Sample], b: Sequence[Sample]) -> tuple[list[Pair], list[Sample], list[Sample]]:
    """Match samples into pairs; also returns the unmatched samples of each side.

    It tries, in this order: file name; prompt, seed and number; prompt and seed; generate's name without the
    hash at its end. Samples with different prompts are never paired.
    Raises AptError when there is no pair, and when a picture would be paired with a video.
    """
    pairs: list[Pair] = []
    for key in (_stem, _made, _noise, _name):
        found = _zip(a, b, key)
        pairs += found
        a = [sample for sample in a if not any(sample is pair.a for pair in found)]
        b = [sample for sample in b if not any(sample is pair.b for pair in found)]
    if not pairs:
        raise AptError(
            f"{a[0].path.parent} and {b[0].path.parent} share no sample: make both with generate from the "
            "same prompts and seed, "
            "or give their files the same names."
        )
    for pair in pairs:
        if pair.a.kind != pair.b.kind:
            raise AptError(
                f"{pair.a.path} and {pair.b.path} cannot be compared, one is a picture and one a video: make "
                "both alike."
            )
    return sorted(pairs, key=lambda pair: pair.a.path.name), a, b


def _zip(a: Sequence[Sample], b: Sequence[Sample], key: Callable[[Sample], Hashable]) -> list[Pair]:
    """Pair samples with equal keys, except None; several with the same key are paired in order."""
    waiting = defaultdict(list)
    for sample in b:
        waiting[key(sample)].append(sample)
    pairs = []
    for sample in a:
        others = waiting[key(sample)] if key(sample) is not None else []
        other = next(
            (
                other
                for other in others
                if None in (sample.prompt, other.prompt) or sample.prompt == other.prompt
            ),
            None,
        )
        if other is not None:
            others.remove(other)
            pairs.append(Pair(sample, other))
    return pairs


def _stem(sample: Sample) -> Hashable:
    return sample.path.stem


def _made(sample: Sample) -> Hashable:
    known = sample.prompt, sample.seed, sample.number
    return None if None in known else known


def _noise(sample: Sample) -> Hashable:
    known = sample.prompt, sample.seed
    return None if None in known else known


def _name(sample: Sample) -> Hashable:
    found = MARK.fullmatch(sample.path.stem)
    return found and found[1]


def _sample(path: Path, caption: str | None) -> Sample:
    about = read_about(path)
    prompt, seed, number = (about.get(name) for name in ("prompt", "seed", "number"))
    written = " ".join(prompt.split()) if isinstance(prompt, str) else ""
    whole = [
        value if isinstance(value, int) and not isinstance(value, bool) else None for value in (seed, number)
    ]
    return Sample(path, written or caption, *whole)
