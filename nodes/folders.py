"""The places in which the loaders look for files: ComfyUI's own folders, models/apt, and the miniature that
comes with the pack.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..apt_core.errors import AptError

MINI = Path(__file__).parents[1] / "apt_core" / "assets" / "mini"
CHECKPOINTS = ("diffusion_models", "apt")
NO_MODELS = re.compile(
    r"(^|[\\/])(latents[\\/](shard-[^\\/]*|prompts\.safetensors)|states[\\/].*[\\/]differences\.safetensors)$"
)
"""Data in the folder of a training run: latents, embedded prompts, what lies beside the states of a LoRA.
They are safetensors files too."""


def register() -> None:
    """Add models/apt, and make it, so that there is a place for files and links; and the miniature's files
    for the stock loaders too. These come last, because ComfyUI saves to the first folder of a kind.
    """
    for kind in ("diffusion_models", "vae"):
        folder_paths.add_model_folder_path(kind, str(MINI / kind))
    apt = os.path.join(folder_paths.models_dir, "apt")
    with suppress(OSError):  # models may be read-only, and is then as good without the folder
        os.makedirs(apt, exist_ok=True)
    folder_paths.add_model_folder_path("apt", apt)
    # In a folder that only one pack uses, ComfyUI would list every file, whatever its extension.
    folder_paths.folder_names_and_paths["apt"] = (
        folder_paths.get_folder_paths("apt"),
        folder_paths.supported_pt_extensions,
    )


def names(*kinds: str) -> list[str]:
    """Sorted names of all files of these kinds."""
    return sorted({name for kind in kinds for name in folder_paths.get_filename_list(kind)})


def checkpoints() -> list[str]:
    """Sorted names of whole models and LoRAs, without the data that a folder of training runs also holds."""
    return [name for name in names(*CHECKPOINTS) if not NO_MODELS.search(name)]


def fingerprint(file: str | None) -> str:
    """Size and time of a file, or "" when it is missing. A loader that returns this loads a file again after
    it has changed under the same name.
    """
    try:
        of_file = os.stat(file or "")
    except OSError:
        return ""
    return f"{of_file.st_size} {of_file.st_mtime_ns}"


def path(name: str | None, *kinds: str) -> str | None:
    """The path of a file by its name in the list, or None when it does not exist."""
    paths = (folder_paths.get_full_path(kind, name) for kind in kinds if name)
    return next(filter(None, paths), None)


def find(name: str, *kinds: str) -> str:
    """The path of a file by its name in the list. Raises AptError when no folder of these kinds has it."""
    if found := path(name, *kinds):
        return found
    places = " or ".join(f"models/{kind}" for kind in kinds)
    raise AptError(f"{name} is not in {places}: put the file there, or choose another one.")
