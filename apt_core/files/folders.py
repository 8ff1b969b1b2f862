"""Folders of models in the forms that people have: diffusers' with shards and variants, Wan-AI's own, and the
two halves of a Wan 2.2 A14B.
"""

import os
import re
from pathlib import Path

from ..errors import AptError
from .jsonfile import read_object

STEM = "diffusion_pytorch_model"
SHARD = re.compile(r"-(\d+)-of-(\d+)$")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
HALVES = {"transformer": "transformer_2", "high_noise_model": "low_noise_model"}
"""The subfolders with the high-noise half and with the low-noise half, in diffusers' folders and in Wan-AI's.
"""


def transformer_folder(path: Path) -> Path:
    """The folder that holds the transformer: the subfolder `transformer` or `high_noise_model`, else the
    folder itself.
    """
    return next((path / name for name in HALVES if (path / name).is_dir()), path)


def half_note(path: str | Path) -> str:
    """A sentence that says which half of a Wan 2.2 A14B is used from `path`; "" for any other model."""
    path = Path(path)
    for high, low in HALVES.items():
        if transformer_folder(path) == path / high and (path / low).is_dir():
            what = f"{high} (high noise) is taken and {low} (low noise) is not"
            why = "because a one-step model needs only the first"
            return f"{path} holds both halves of a Wan 2.2 A14B: {what}, {why}."
    name = path.name.lower()
    if name in HALVES.values() or re.search(r"low[-_ ]?noise", name):
        what = "is by its name the low-noise half of a Wan 2.2 A14B"
        return f"{path} {what}: give the high-noise half, which a one-step model needs."
    return ""


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The weight files in a folder: one file or all shards. Files without a variant (`.fp16.`) come first;
    without such files it takes the variant that is there.

    Raises AptError for a folder without weights, for a damaged index, and for a shard that the index names
    but the folder does not have.
    """
    variants = ["", *sorted(_variants(folder, stem))]
    for variant in variants:
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            remedy = "copy or download it again"
            names = read_object(index, remedy).get("weight_map")
            if (
                not isinstance(names, dict)
                or not names
                or not all(isinstance(name, str) for name in names.values())
            ):
                raise AptError(f"{index} is damaged: {remedy}.")
            files = [folder / Path(name).name for name in sorted(set(names.values()))]
            if missing := next((file for file in files if not os.path.isfile(file)), None):
                raise AptError(f"{missing} is missing, which {index.name} names: copy or download it again.")
            return files
        if (file := folder / f"{stem}{variant}.safetensors").is_file():
            return [file]
        shards = sorted(folder.glob(f"{stem}{variant}-*-of-*.safetensors"))
        if shards and (found := SHARD.search(shards[0].stem)):
            if len(shards) < int(found[2]):
                what = f"{len(shards)} of {int(found[2])} shards and no index"
                raise AptError(f"{folder} has {what}: download the others too.")
            return shards
    raise AptError(
        f"{folder} has no {stem}.safetensors{pickle_hint(folder)}: download it again, in safetensors."
    )


def pickle_hint(folder: Path) -> str:
    """In brackets, the name of a pickle that lies in the folder instead of safetensors; "" when there is
    none.
    """
    name = next((path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES), None)
    return f" (its {name} is a pickle, which can run code when it is opened)" if name else ""


def refuse_shard(path: Path) -> None:
    """Raise AptError for a file whose name says that it is one of several shards."""
    found = SHARD.search(path.stem)
    if found and int(found[2]) > 1:
        of = f"shard {int(found[1])} of {int(found[2])} of a model"
        raise AptError(f"{path} is {of}: give the folder that holds all of them, with its config.json.")


def _variants(folder: Path, stem: str) -> set[str]:
    """The variants in the folder, with their dots: ".fp16", ".bf16"."""
    pattern = re.compile(re.escape(stem) + r"(\.[A-Za-z0-9_]+)(-\d+-of-\d+)?\.safetensors")
    return {
        found[1] for path in folder.glob(f"{stem}.*.safetensors") if (found := pattern.fullmatch(path.name))
    }
