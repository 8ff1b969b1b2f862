"""Read the raters' files of a preference study and count their votes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from apt_core.errors import AptError
from apt_core.files.jsonfile import read_object, write_json
from trainer.run.progress import console, say

from . import ANSWERS, FORMAT, KEY, QUESTIONS, VOTES
from .statistics import CONFIDENCE, RESAMPLES, SEED, Score, score

PAGE_AGAIN = "take the file that the page was made with, or make both again"
VOTES_AGAIN = "have the rater open the page and save the votes again"


@dataclass(frozen=True)
class Key:
    """A study's key. left: for each pair, which sample is on the left, "a" or "b"; a, b: the two folders."""

    study: str
    a: str
    b: str
    left: Mapping[str, str]


@dataclass(frozen=True)
class Ballot:
    """One rater's votes. values: for each question an array `[pairs]`, 1 if A is better, 0 for the same, -1
    if B is better, NaN for no answer."""

    path: Path
    rater: str
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Count:
    """The result of a study. scores: by question."""

    key: Key
    raters: Sequence[str]
    scores: Mapping[str, Score]

    def json(self) -> dict:
        about = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "over": "pairs"}
        questions = {name: score.json() for name, score in self.scores.items()}
        key = self.key
        return {
            "study": key.study,
            "a": key.a,
            "b": key.b,
            "pairs": len(key.left),
            "raters": list(self.raters),
            "bootstrap": about,
            "questions": questions,
        }


def count_votes(paths: Sequence[Path], key: Path | None = None, unfinished: bool = False) -> Count:
    """Count the votes in raters' files: the scores of A against B.

    key: by default the study's key is looked for beside the files, in the current folder and among `paths`.
    unfinished: also count raters who did not answer everything.
    Raises AptError for files that are not votes, damaged, from another study or unfinished, for two files of
    the same rater, and if there is no key.
    """
    keys, ballots = _parted(paths)
    if not ballots:
        raise AptError("there are no votes to count: give the files that the raters saved.")
    found = find_key([*ballots], ballots[next(iter(ballots))]["study"], key, keys)
    read = [_ballot(path, content, found, unfinished) for path, content in ballots.items()]
    names: dict[str, Path] = {}
    for ballot in read:
        name = " ".join(ballot.rater.casefold().split())
        if name in names:
            raise AptError(
                f"{names[name]} and {ballot.path} are both of the rater {ballot.rater!r}: keep one of them, "
                "or mend the name in one."
            )
        names[name] = ballot.path
    scores = {
        question: score(np.stack([ballot.values[question] for ballot in read])) for question in QUESTIONS
    }
    return Count(found, [ballot.rater for ballot in read], scores)


def show_votes(
    paths: Sequence[Path], key: Path | None = None, unfinished: bool = False, out: Path | None = None
) -> Count:
    """Count the votes, print the result, and write the figures to `out`, if given.

    Raises AptError as `count_votes` does, and if `out` is one of the files to read."""
    if out is not None and out.exists() and any(path.exists() and path.samefile(out) for path in paths):
        raise AptError(f"--out {out} is one of the files of votes, which would be lost: give another name.")
    count = count_votes(paths, key, unfinished)
    raters = len(count.raters)
    pairs = len(count.key.left)
    say(
        f"A {count.key.a} against B {count.key.b}: {pairs} pair{'s' if pairs > 1 else ''}, {raters} "
        f"rater{'s' if raters > 1 else ''}.",
    )
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("score", f"{CONFIDENCE:.0%} interval", "A better", "same", "B better", "alpha"):
        table.add_column(name, justify="right", no_wrap=True)
    for question, one in count.scores.items():
        interval = "-" if one.low is None else f"{_percent(one.low)} to {_percent(one.high)}"
        agreement = "-" if one.agreement is None else f"{one.agreement:.2f}"
        cells = _percent(one.score), interval, str(one.good), str(one.same), str(one.bad), agreement
        table.add_row(escape(QUESTIONS[question][0]), *cells)
    console.print(table)
    say(
        f"Score: (A better - B better) / all. Interval: {RESAMPLES:,} resamples of the pairs, seed {SEED}. "
        "Alpha: Krippendorff's, ordinal; 1 is agreement, 0 chance.",
    )
    if out is not None:
        write_json(out, count.json())
    return count


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def find_key(votes: Sequence[Path], study: str, given: Path | None, among: Sequence[Path] = ()) -> Key:
    """Find a study's key. Raises AptError if there is none, or if the given file is not a key."""
    if given is not None:
        return read_key(given)
    folders = dict.fromkeys([*(path.parent for path in votes), Path(".")])
    found = []
    for path in dict.fromkeys(
        [*among, *(path for folder in folders for path in sorted(folder.glob("*.key.json")))]
    ):
        try:
            found.append(read_key(path))
        except AptError:
            if path in among:
                raise
    fitting = [key for key in found if key.study == study]
    if not fitting and len(found) != 1:
        raise AptError(
            f"no key of the study {study} lies beside {votes[0]}: give the page's own with --key "
            "page.key.json."
        )
    return (fitting or found)[0]


def read_key(path: Path) -> Key:
    """Read a key. Raises AptError for a file that is missing, damaged or not a key."""
    content = read_object(path, PAGE_AGAIN)
    if content.get("kind") != KEY:
        raise AptError(
            f"{path} is no key of a preference study: give the .key.json that lies beside the page."
        )
    _check_format(path, content)
    pairs, texts = content.get("pairs"), [content.get(name) for name in ("study", "a", "b")]
    rows = pairs if isinstance(pairs, list) and all(isinstance(row, dict) for row in pairs) else []
    left = {
        row.get("pair"): row.get("left")
        for row in rows
        if isinstance(row.get("pair"), str) and row.get("left") in ("a", "b")
    }
    if not all(isinstance(text, str) for text in texts) or not left or len(left) != len(rows):
        raise AptError(f"{path} is damaged: {PAGE_AGAIN}.")
    return Key(*texts, left)


def _parted(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, dict]]:
    """Separate keys, which a shell pattern may include, from votes; also returns the content of the votes."""
    keys, ballots = [], {}
    for path in dict.fromkeys(paths):
        content = read_object(path, VOTES_AGAIN)
        if content.get("kind") == KEY:
            keys.append(path)
            continue
        if content.get("kind") != VOTES:
            raise AptError(f"{path} holds no votes: give the files that the raters saved.")
        _check_format(path, content)
        if not isinstance(content.get("study"), str):
            raise AptError(f"{path} is damaged: {VOTES_AGAIN}.")
        ballots[path] = content
    return keys, ballots


def _check_format(path: Path, content: Mapping) -> None:
    if content.get("format") != FORMAT:
        raise AptError(
            f"{path} has format {content.get('format')!r}, but only {FORMAT} can be read: "
            "use the version that "
            "made the page."
        )


def _ballot(path: Path, content: Mapping, key: Key, unfinished: bool) -> Ballot:
    if content["study"] != key.study:
        raise AptError(
            f"{path} holds votes on another page (study {content['study']}, the key's is {key.study}): give "
            "its own key, or leave it out."
        )
    rater, votes = content.get("rater"), content.get("votes")
    rows = votes if isinstance(votes, list) and all(isinstance(row, dict) for row in votes) else None
    damaged = AptError(f"{path} is damaged: {VOTES_AGAIN}.")
    if rows is None or not isinstance(rater, str) or not rater.strip():
        raise damaged
    numbers = {pair: number for number, pair in enumerate(key.left)}
    values = {question: np.full(len(numbers), np.nan) for question in QUESTIONS}
    seen = set()
    for row in rows:
        pair = row.get("pair")
        if not isinstance(pair, str) or pair not in numbers or pair in seen:
            raise damaged
        seen.add(pair)
        for question in QUESTIONS:
            answer = row.get(question)
            if answer is not None and answer not in ANSWERS:
                raise damaged
            if answer is not None:
                towards_right = ANSWERS.index(answer) - 1
                values[question][numbers[pair]] = -towards_right if key.left[pair] == "a" else towards_right
    answered = ~np.isnan([values[question] for question in QUESTIONS])
    if not answered.any():
        raise AptError(f"{path} has no answer in it: {VOTES_AGAIN}, or leave it out.")
    open_pairs = int((~answered.all(0)).sum())
    if open_pairs and not unfinished:
        raise AptError(
            f"{path} is not finished, {open_pairs} of {len(numbers)} pairs lack an answer: have "
            f"{rater.strip()} go on, or count what there is with --unfinished."
        )
    return Ballot(path, rater.strip(), values)
