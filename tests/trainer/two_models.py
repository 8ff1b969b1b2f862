"""Samples of two models, and raters' votes on them, for the tests of the preference study."""

import json
from itertools import product
from pathlib import Path

import numpy as np

from apt_core.files.media_write import video_writer, write_image
from trainer.preference import QUESTIONS


def one_sentence(error, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    for part in parts:
        assert part in text, text


def picture(path: Path, level: int, prompt: str = "", seed: int = 0, number: int = 0, size: int = 8) -> Path:
    about = {"prompt": prompt, "seed": seed, "number": number} if prompt else None
    write_image(path, np.full((size, size, 3), level, np.uint8), about=about)
    return path


def clip(path: Path, level: int, noise: float = 0.0, about: dict | None = None) -> Path:
    frames = np.clip(np.random.default_rng(0).normal(level, noise, (4, 32, 48, 3)), 0, 255).astype(np.uint8)
    with video_writer(path, 32, 48, 8, about=about) as write:
        write(frames)
    return path


def folders(root: Path, pairs: int = 4) -> tuple[Path, Path]:
    """Two folders of pictures as generate names them: another model is another mark."""
    for n, (name, level) in product(range(pairs), {"a": 0, "b": 128}.items()):
        picture(root / name / f"{n:04d}-thing-{n}-seed0-{name * 6}.png", level + n, f"thing {n}", 0, n)
    return root / "a", root / "b"


def ballot(study, path: Path, rater: str, choices: dict[str, str], changes: dict | None = None) -> Path:
    """A rater's file. choices: by question "ABS-...", for the pairs in the order of A's names: the better
    model, S for the same, - for no answer."""
    order = sorted(range(len(study.pairs)), key=lambda n: study.pairs[n].a.path.name)
    rows = {}
    for place, n in enumerate(order):
        sides = {
            "A": "left" if study.left[n] == "a" else "right",
            "B": "right" if study.left[n] == "a" else "left",
            "S": "same",
            "-": None,
        }
        rows[n] = {"pair": study.mark(n)} | {
            question: sides[choices[question][place]] for question in QUESTIONS
        }
    content = {
        "kind": "apt-preference-votes",
        "format": 1,
        "study": study.id,
        "rater": rater,
        "votes": [rows[n] for n in sorted(rows)],
    }
    path.write_text(json.dumps(content | (changes or {})))
    return path


def same(letters: str) -> dict[str, str]:
    return dict.fromkeys(QUESTIONS, letters)
