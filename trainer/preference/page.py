"""Make the page of a preference study, an offline HTML file for raters, and the key that says which side is
which model's."""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from apt_core.errors import AptError
from apt_core.files.atomic import make_folder, replacing
from apt_core.files.jsonfile import write_json
from trainer.data.media import bare
from trainer.digest import file_digest
from trainer.run.progress import say

from . import FORMAT, KEY, QUESTIONS, SIDES, VOTES
from .pairs import Pair, Sample, match, read_samples
from .votes import read_key

LIMIT = 200 * 2**20
"""How many bytes of samples a page may hold. Browsers take some seconds to open a page of this size."""


@dataclass(frozen=True)
class Study:
    """A preference study. pairs: in the order in which they are shown; left: for each pair, which sample is
    on the left, "a" or "b"; seed: determines both, together with the samples."""

    id: str
    a: Path
    b: Path
    seed: int
    pairs: Sequence[Pair]
    left: Sequence[str]

    def side(self, number: int, side: str) -> Sample:
        """The sample of pair `number` on this side."""
        model = self.left[number] if side == "left" else "ba"["ab".index(self.left[number])]
        return getattr(self.pairs[number], model)

    def mark(self, number: int, side: str = "") -> str:
        """The page's name for a pair or for one of its samples. It reveals nothing about the models."""
        return _hash(self.id, number, side, size=8)


def make_page(a: Path, b: Path, out: Path, seed: int = 0, link: bool = False, limit: int = LIMIT) -> Study:
    """Write the page `out` and, beside it, its key (`page.key.json`), which raters must not get.

    a, b: folders of samples. link: put the samples into a folder beside the page (`page.files`) instead of
    into the page. The same folders and seed give the same page: order and sides are derived from the seed and
    the samples. Half of the pairs have A on the left.
    Raises AptError for folders that are the same, have no sample in common or hold files that cannot be
    shown; for pairs without a prompt; for more than `limit` bytes of samples without `link`; and for an `out`
    that cannot be written, or whose key belongs to another study.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise AptError(f"{out} does not end in .html: give the page a name that does.")
    study, left_over = arrange(a, b, seed)
    key = key_of(out)
    if key.exists() and read_key(key).study != study.id:
        raise AptError(
            f"{key} belongs to another study, whose votes could not be counted without it: give another "
            "--out, or remove it."
        )
    write_page(study, out, link, limit)
    write_json(key, key_json(study))
    _tell(study, left_over, out, key)
    return study


def arrange(a: Path, b: Path, seed: int) -> tuple[Study, tuple[list[Sample], list[Sample]]]:
    """Pair up two folders' samples in a study; also returns each folder's samples without a partner.

    Raises AptError as `make_page` does."""
    samples = read_samples(a), read_samples(b)
    if a.samefile(b):
        raise AptError(f"{a} and {b} are the same folder: give the samples of two models.")
    pairs, *left_over = match(*samples)
    if silent := [pair for pair in pairs if not pair.prompt]:
        path = silent[0].a.path
        raise AptError(
            f"{len(silent)} of {len(pairs)} pairs have no prompt, {path} for one: write it into "
            f"{path.with_suffix('.txt').name} beside the sample."
        )
    digests = [(file_digest(pair.a.path), file_digest(pair.b.path)) for pair in pairs]
    if all(one == other for one, other in digests):
        raise AptError(f"{a} and {b} hold the same samples: give those of two models.")
    # The samples go into the seed too, so that nobody can work out the sides from the seed and this code.
    study = _hash(seed, digests, [pair.prompt for pair in pairs], size=8)
    rng = np.random.default_rng(int(_hash("order and sides", seed, digests, size=16), 16))
    order = rng.permutation(len(pairs))
    half = np.arange(len(pairs)) + rng.integers(2)  # if the number is odd, chance decides the last one
    left = ["ab"[number % 2] for number in rng.permutation(half)]
    return Study(study, a, b, seed, [pairs[i] for i in order], left), tuple(left_over)


def key_of(page: Path) -> Path:
    """The path of a page's key."""
    return page.with_suffix(".key.json")


def key_json(study: Study) -> dict:
    """The key: which side is which model's. `votes.read_key` reads it."""
    pairs = [
        {
            "pair": study.mark(n),
            "left": study.left[n],
            "a": pair.a.path.name,
            "b": pair.b.path.name,
            "prompt": pair.prompt,
        }
        for n, pair in enumerate(study.pairs)
    ]
    return {
        "kind": KEY,
        "format": FORMAT,
        "study": study.id,
        "seed": study.seed,
        "a": str(study.a),
        "b": str(study.b),
        "pairs": pairs,
    }


def write_page(study: Study, out: Path, link: bool, limit: int) -> None:
    """Write a study's page. Raises AptError as `make_page` does."""
    template = files(__package__) / "template"
    parts = {
        name: (template / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    }
    folder = out.with_suffix(".files")
    seen = []
    for n, pair in enumerate(study.pairs):
        names = {side: study.mark(n, side) + (".png" if pair.a.kind == "image" else ".mp4") for side in SIDES}
        shown = {side: f"{folder.name}/{name}" if link else f"#{name}" for side, name in names.items()}
        seen.append({"pair": study.mark(n), "kind": pair.a.kind, "prompt": pair.prompt, **shown})
    questions = [
        {"name": name, "title": title, "wording": wording} for name, (title, wording) in QUESTIONS.items()
    ]
    told = {"study": study.id, "kind": VOTES, "format": FORMAT, "questions": questions, "pairs": seen}
    # Escape what could end the script element, because prompts may contain anything.
    data = (
        json.dumps(told, ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    head, tail = parts["page.html"].split("@@SAMPLES@@")
    with replacing(out) as part, part.open("w", encoding="utf-8", newline="\n") as page:
        page.write(
            head.replace("@@STYLE@@", parts["page.css"]).replace("@@FILES@@", "'self' file:" if link else "")
        )
        for name, content in _samples(study, None if link else limit):
            if link:
                make_folder(folder)
                with replacing(folder / name) as file:
                    file.write_bytes(content)
            else:
                page.write(
                    f'<script type="text/plain" id="{name}">{base64.b64encode(content).decode()}</script>\n'
                )
        page.write(tail.replace("@@SCRIPT@@", parts["page.js"]).replace("@@STUDY@@", data))


def _samples(study: Study, limit: int | None) -> Iterator[tuple[str, bytes]]:
    """Name and content of every sample. The two samples of a pair have equal length."""
    total = 0
    for n, pair in enumerate(study.pairs):
        contents = [bare(study.side(n, side).path) for side in SIDES]
        suffix = ".png" if pair.a.kind == "image" else ".mp4"
        for side, content in zip(SIDES, _one_length(contents, suffix)):
            total += len(content)
            if limit is not None and total > limit:
                raise AptError(
                    f"the samples of {len(study.pairs)} pairs are more than {limit / 2**20:.0f} MiB, too "
                    "much for one page: "
                    "--link puts them into a folder beside it."
                )
            yield study.mark(n, side) + suffix, content


def _one_length(contents: Sequence[bytes], suffix: str) -> list[bytes]:
    """Pad files to one length, because a sharper model's files are larger and would give it away.

    Players ignore a `free` box in an .mp4, and anything after the end of a picture."""
    if len(set(map(len, contents))) == 1:
        return list(contents)
    longest = max(map(len, contents)) + 8  # a box has at least 8 bytes
    sizes = [longest - len(content) for content in contents]
    heads = [size.to_bytes(4, "big") + b"free" if suffix == ".mp4" else bytes(8) for size in sizes]
    return [content + head + bytes(size - 8) for content, head, size in zip(contents, heads, sizes)]


def _hash(*values, size: int) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=size).hexdigest()


def _tell(study: Study, left_over: Sequence[Sequence[Sample]], out: Path, key: Path) -> None:
    for samples, other in zip(left_over, (study.b, study.a)):
        if samples:
            many = f"{len(samples)} sample{'s' if len(samples) > 1 else ''} of {samples[0].path.parent}"
            say(
                f"{many} left out, without a partner in {other}: "
                f"{samples[0].path.name}{', ...' if len(samples) > 1 else ''}"
            )
    say(f"{out}: {len(study.pairs)} pair{'s' if len(study.pairs) > 1 else ''}, for the raters.")
    say(f"{key}: which side is whose, for you alone.")
