"""Samples laid out for VBench (arXiv 2311.17982), which is run elsewhere: its weights and dependencies are
its own.

VBench's mode custom_input takes a folder of videos named PROMPT-INDEX.mp4, and a JSON file that gives the
prompt of each name, which counts where a name cannot hold its prompt.
"""

import hashlib
import re
import shlex
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from apt_core.errors import AptError
from apt_core.files.atomic import replacing_folder
from apt_core.files.jsonfile import write_json

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
"""Those of VBench's sixteen dimensions that it supports on videos of one's own prompts."""
PROMPTS, RESULTS = "prompts.json", "results"
LONGEST = 255
"""Bytes of a file name in UTF-8 that every usual file system takes."""
FORBIDDEN = set('/\\:*?"<>|')
"""Characters that a file name cannot have on Linux, macOS or Windows, beside control characters."""


def video_names(prompts: Sequence[str], count: int) -> list[str]:
    """The file name PROMPT-INDEX.mp4 of every sample, `count` in turn for each prompt, all different.

    A prompt stands there as it is where a file system takes it. Otherwise each character that it does not
    take becomes a space, what is too long is cut, and eight digits of the prompt's SHA-256 keep it apart from
    others. A prompt that comes again goes on counting.
    """
    longest = len(f"-{len(prompts) * count - 1}.mp4")
    stems: dict[str, str] = {}
    taken, used, names = set(), dict.fromkeys(prompts, 0), []
    for prompt in used:
        stem = "".join(
            " " if c in FORBIDDEN or unicodedata.category(c) in ("Cc", "Cs") else c for c in prompt
        )
        if stem != prompt or len(stem.encode()) + longest > LONGEST or _folded(stem) in taken:
            end = f" {hashlib.sha256(prompt.encode(errors='surrogatepass')).hexdigest()[:8]}"
            stem = stem.encode()[: LONGEST - longest - len(end)].decode(errors="ignore") + end
        taken.add(_folded(stem))
        stems[prompt] = stem
    for prompt in prompts:
        for _ in range(count):
            names.append(f"{stems[prompt]}-{used[prompt]}.mp4")
            used[prompt] += 1
    return names


def _folded(stem: str) -> str:
    """Equal for names that macOS or Windows take for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())


def check_folder(folder: Path, out: Path, frames: int) -> None:
    """Raises AptError if samples cannot be laid out in `folder`: it is the result's folder `out` or around
    it, holds files, or a sample is a picture.
    """
    if frames == 1:
        raise AptError(f"--vbench {folder} is for videos, but each sample is one picture: leave it out.")
    if folder.absolute() in (out.absolute(), *out.absolute().parents):
        raise AptError(f"--vbench {folder} is or holds --out {out}: give another folder, or one in --out.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AptError(
            f"--vbench {folder} already exists and is not empty: give another folder, or remove it."
        )


def lay_out(folder: Path, out: Path, result: dict) -> list[str]:
    """Copy the clips of an evaluation into `folder`, one folder per model, with `prompts.json`. Returns the
    VBench command of each model, whose figures it would write into `results` there.

    out: the evaluation's folder. result: what its evaluation.json holds.
    """
    prompts, count = result["prompts"], result["count"]
    names, places = video_names(prompts, count), []
    with replacing_folder(folder) as new:
        for model in result["models"]:
            files = [Path(clip["file"]) for clip in model["clips"]]
            place = files[0].parent.name
            (new / place).mkdir()
            for file, name in zip(files, names, strict=True):
                shutil.copyfile(out / file, new / place / name)
            places.append(place)
        write_json(new / PROMPTS, {name: prompts[n // count] for n, name in enumerate(names)})
    return [command(folder.absolute(), place) for place in places]


def command(folder: Path, place: str) -> str:
    """The line that runs VBench's six dimensions on the videos in `folder/place`.

    vbench takes the dimensions as one argument. It puts what it is given into a shell's line once more, the
    videos' folder in double quotes and the rest as it is, so paths are quoted for that one too.
    """
    videos = re.sub(r'(["$`\\])', r"\\\1", str(folder / place))
    options = ["--videos_path", videos, "--mode=custom_input"]
    options += ["--prompt_file", shlex.quote(str(folder / PROMPTS))]
    options += ["--output_path", shlex.quote(str(folder / RESULTS / place))]
    return shlex.join(["vbench", "evaluate", "--dimension", " ".join(DIMENSIONS), *options])
