"""Load APT Prompts: the lines of a text file, for which the rest of a graph runs one after another."""

import os

import folder_paths
from comfy_api.latest import io

from ..apt_core.errors import AptError
from ..apt_core.files.prompts import read_prompts
from . import folders

NAME = "Load APT Prompts"
BUILT_IN = "apt_mini_prompts"
BUILT_IN_FILE = str(folders.MINI / "prompts.txt")
MOST = 1_000_000


class APTLoadPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTLoadPrompts",
            display_name=NAME,
            category="APT",
            description=(
                "Reads prompts from a text file, one a line: connected to CLIP Text Encode, "
                "one run makes a clip of each. Empty lines are left out."
            ),
            search_aliases=["text file", "prompt list", "prompts from file", "batch", "load text", "apt"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[BUILT_IN, *_listed()],
                    default=BUILT_IN,
                    tooltip=(
                        f"Default {BUILT_IN}, prompts of the miniature, which come with the pack. "
                        "Files whose names end in .txt in ComfyUI's input folder, in UTF-8."
                    ),
                ),
                io.Int.Input(
                    "start",
                    default=0,
                    min=0,
                    max=MOST,
                    tooltip=(
                        "Default 0, the first prompt. How many to leave out at the beginning: "
                        "a batch that was stopped goes on there."
                    ),
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=MOST,
                    tooltip="Default 0: all the others. How many prompts to take.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompts",
                    is_output_list=True,
                    tooltip="The prompts as a list, for CLIP Text Encode: what follows runs once for each.",
                )
            ],
        )

    @classmethod
    def execute(cls, file: str, start: int, count: int) -> io.NodeOutput:
        path = _path(file)
        if path is None:
            raise AptError(
                f"{NAME}: {file} is not a text file in ComfyUI's input folder: "
                "put it there, or choose another one."
            )
        try:
            prompts = read_prompts(path)
        except AptError as error:
            raise AptError(f"{NAME}: {error}") from None
        chosen = prompts[start : start + count if count else None]
        if not chosen:
            raise AptError(
                f"{NAME}: start is {start}, but {file} has only {len(prompts)} "
                f"prompt{'s'[: len(prompts) > 1]}: "
                f"give one from 0 to {len(prompts) - 1}."
            )
        return io.NodeOutput(chosen)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, start: int | None, count: int | None) -> str:
        return folders.fingerprint(_path(file) if file else None)


def _path(file: str) -> str | None:
    """None where there is no such file, or one outside of the input folder."""
    if file == BUILT_IN:
        return BUILT_IN_FILE
    folder = folder_paths.get_input_directory()
    path = os.path.join(folder, file)
    return path if folder_paths.is_within_directory(folder, path) and os.path.isfile(path) else None


def _listed() -> list[str]:
    """Sorted names of the text files that lie in the input folder itself, as Load Image lists pictures."""
    folder = folder_paths.get_input_directory()
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.lower().endswith(".txt") and _path(name))
