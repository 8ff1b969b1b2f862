"""Load APT Prompts in a real ComfyUI: the files it lists, the lines it takes, what it says to bad ones."""

from pathlib import Path

import pytest

from trainer.mini import ASSETS

PACK = Path(__file__).parents[2]
NAME = "AptError Load APT Prompts:"


@pytest.fixture(scope="module")
def run(comfyui, tmp_path_factory):
    files = tmp_path_factory.mktemp("prompts") / "input"
    (files / "folder.txt").mkdir(parents=True)
    (files / "good.txt").write_bytes(
        b"\xef\xbb\xbf a fox, at dusk \r\n\r\n\xe5\x9c\x86 (word:1.2)\n\n# third\n"
    )
    (files / "empty.txt").write_text("\n  \n", encoding="utf-8")
    (files / "latin.txt").write_bytes("grün".encode("latin-1"))
    (files / "picture.png").write_bytes(b"")
    (files.parent / "outside.txt").write_text("secret", encoding="utf-8")
    return files, comfyui("read_prompts", pack=PACK, files=files)


def test_text_files_of_the_input_folder_are_listed_after_the_built_in(run):
    assert run[1]["listed"] == ["apt_mini_prompts", "empty.txt", "good.txt", "latin.txt"]


def test_every_line_that_is_not_empty_is_a_prompt(run):
    _, result = run
    lines = ["a fox, at dusk", "圆 (word:1.2)", "# third"]
    assert result["all"] == lines and result["is a list"] == [True]
    assert result["from the second"] == lines[1:]
    assert result["one"] == lines[1:2]
    assert result["more than there are"] == lines[2:]
    assert result["built in"] == (ASSETS / "prompts.txt").read_text(encoding="utf-8").splitlines()


def test_a_file_written_anew_is_read_anew(run):
    assert run[1]["same while untouched"] and run[1]["anew"]


def test_bad_files_get_a_sentence(run):
    files, result = run
    unread = "cannot be read as UTF-8 text: give a file with one prompt a line."
    late, empty, latin, gone, outside = result["sentences"]
    assert late == f"{NAME} start is 3, but good.txt has only 3 prompts: give one from 0 to 2."
    assert empty == f"{NAME} {files / 'empty.txt'} holds no prompt: write one a line."
    assert latin == f"{NAME} {files / 'latin.txt'} {unread}"
    assert (
        gone == f"{NAME} gone.txt is not a text file in ComfyUI's input folder: "
        "put it there, or choose another one."
    )
    assert (
        outside == f"{NAME} ../outside.txt is not a text file in ComfyUI's input folder: "
        "put it there, or choose another one."
    )
