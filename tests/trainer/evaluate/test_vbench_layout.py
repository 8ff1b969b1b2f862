"""`evaluate --vbench`: the layout that VBench's mode custom_input reads, and the command that runs it."""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path

import commands
import pytest

from apt_core.errors import AptError
from trainer.evaluate import vbench as layout
from trainer.evaluate.vbench import DIMENSIONS, check_folder, video_names

PROMPTS = ["a red circle", "50/50: left or right?"]


def digits(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def told(name: str) -> str:
    """The prompt that VBench reads from a name: its stem without the number at the end."""
    return re.sub(r"-\d+$", "", Path(name).stem)


command = partial(commands.command, "evaluate")


def test_samples_are_laid_out_for_vbench_and_its_command_is_printed(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out, folder = tmp_path / "out", tmp_path / "to test" / "vbench"
    given = ("--prompts", tmp_path / "prompts.txt", "--count", 2, "--metrics", "contrast")
    run = command("mini", *given, "--out", out, "--vbench", folder)
    assert run.exit_code == 0, run.output
    second = f"50 50  left or right  {digits(PROMPTS[1])}"
    names = ["a red circle-0.mp4", "a red circle-1.mp4", f"{second}-0.mp4", f"{second}-1.mp4"]
    assert sorted(path.name for path in folder.iterdir()) == ["01-apt_mini", "prompts.json"]
    assert {path.name for path in (folder / "01-apt_mini").iterdir()} == set(names)
    clips = json.loads((out / "evaluation.json").read_text())["models"][0]["clips"]
    for name, clip in zip(names, clips):
        assert (folder / "01-apt_mini" / name).read_bytes() == (out / clip["file"]).read_bytes()
    assert len({(folder / "01-apt_mini" / name).read_bytes() for name in names}) == 4
    told = json.loads((folder / "prompts.json").read_text())
    assert told == dict(zip(names, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2))
    assert "VBench has not been run" in run.output
    (line,) = [line for line in run.output.splitlines() if line.startswith("vbench evaluate ")]
    given = launched(shlex.split(line)[2:])
    assert given["dimension"] == list(DIMENSIONS)
    assert given["mode"] == ["custom_input"] and given["videos_path"] == [f"{folder}/01-apt_mini"]
    assert given["output_path"] == [f"{folder}/results/01-apt_mini"]
    found = prompts_of(Path(given["videos_path"][0]), Path(given["prompt_file"][0]))
    assert found == told


def launched(arguments: list[str]) -> dict[str, list[str]]:
    """What vbench 0.1.5 makes of the arguments of `vbench evaluate`: each option takes one value, and a shell
    reads them once more, `--videos_path` in double quotes and all others as they are.
    """
    parser = argparse.ArgumentParser()
    for name in ("dimension", "videos_path", "mode", "prompt_file", "output_path"):
        parser.add_argument(f"--{name}", type=str, required=True)
    values = vars(parser.parse_args(arguments))
    quoted = {name: f'"{value}"' if name == "videos_path" else value for name, value in values.items()}
    line = " ".join(f"--{name} {value}" for name, value in quoted.items())
    words = subprocess.run(f"printf '%s\\n' {line}", shell=True, capture_output=True, text=True, check=True)
    found = {}
    for word in words.stdout.splitlines():
        if word.startswith("--"):
            values = found.setdefault(word[2:], [])
        else:
            values.append(word)
    return found


def prompts_of(videos: Path, file: Path) -> dict[str, str]:
    """The prompt of each video in mode custom_input: the file has one for every video, by its name."""
    prompts = json.loads(file.read_text())
    assert type(prompts) is dict
    names = [
        path.name for path in videos.iterdir() if path.suffix.lower() in (".mp4", ".gif", ".jpg", ".png")
    ]
    assert len(prompts) >= len(names) and set(names) <= set(prompts)
    return {name: prompts[name] for name in names}


@pytest.mark.skipif(os.name == "nt", reason="it asks a POSIX shell")
@pytest.mark.parametrize("name", ["vbench", "to test", "it's $HOME", 'a "b" `c` \\d', "ä;&|"])
def test_paths_reach_vbench_through_its_second_shell(name):
    folder = Path("/data") / name
    given = launched(shlex.split(layout.command(folder, "01-m"))[2:])
    assert given["videos_path"] == [str(folder / "01-m")]
    assert given["prompt_file"] == [str(folder / "prompts.json")]
    assert given["output_path"] == [str(folder / "results" / "01-m")]


def test_a_prompt_that_a_name_can_hold_is_the_name():
    prompts = ["Ukiyo-3", "a cat. It sleeps.", "ein Käse", "an owl's eye, 100%"]
    assert [told(name) for name in video_names(prompts, 1)] == prompts
    assert video_names(["x", "y", "x"], 2) == [
        *("x-0.mp4", "x-1.mp4", "y-0.mp4", "y-1.mp4", "x-2.mp4", "x-3.mp4")
    ]


@pytest.mark.parametrize("letter", ["w", "é", "水", "🐈"])
def test_a_name_ends_at_255_bytes_and_never_within_a_character(letter, tmp_path):
    size = len(letter.encode())
    whole = letter * (249 // size) + "w" * (249 % size)  # and "-0.mp4": 255 bytes
    names = video_names([whole], 1)
    assert names == [f"{whole}-0.mp4"] and len(names[0].encode()) == 255
    long = [letter * 300 + end for end in ("one", "two")]
    names = video_names(long, 6)  # indices of two digits would fit
    assert len(set(names)) == 12
    for name, prompt in zip(names, [long[0]] * 6 + [long[1]] * 6):
        assert 255 - 1 - size < len(name.encode()) <= 255
        assert told(name) == letter * ((255 - 7 - 9) // size) + " " + digits(prompt)
        (tmp_path / name).touch()


def test_names_are_told_apart_where_only_the_prompts_are():
    prompts = ["a b", "a/b", "a:b", "a\tb", "A B", "caf\u00e9", "cafe\u0301"]
    names = video_names(prompts, 1)
    assert names[0] == "a b-0.mp4" and names[5] == "caf\u00e9-0.mp4"
    for number in (1, 2, 3):
        assert names[number] == f"a b {digits(prompts[number])}-0.mp4"
    assert names[4] == f"A B {digits('A B')}-0.mp4"
    assert names[6] == f"cafe\u0301 {digits(prompts[6])}-0.mp4"


def test_mistakes_are_refused_before_anything_is_made(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    given = ("mini", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out")
    run = command(*given, "--vbench", tmp_path / "full")
    assert run.exit_code == 2 and run.stderr.count("\n") == 1
    assert "full already exists and is not empty: give another folder, or remove it." in run.stderr
    run = command(*given, "--frames", 1, "--vbench", tmp_path / "vbench")
    assert run.exit_code == 2 and "is for videos, but each sample is one picture" in run.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "mine.txt").exists()
    for folder in (tmp_path / "out", tmp_path):
        with pytest.raises(AptError, match="is or holds --out .*: give another folder, or one in --out"):
            check_folder(folder, tmp_path / "out", 9)
    check_folder(tmp_path / "out" / "vbench", tmp_path / "out", 9)


def test_the_docs_name_the_six_dimensions():
    text = (Path(__file__).parents[3] / "docs" / "evaluate.md").read_text()
    section = text.split("## VBench\n")[1].split("\n# ")[0]
    assert len(set(DIMENSIONS)) == 6 and all(f"`{name}`" in section for name in DIMENSIONS)
    assert "**VBench is not run here**" in section
