"""Encode the prompts that training needs besides captions: the negative prompt and those of sample videos.

They are stored beside the shards, so that a training run does not have to load the text encoder.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from apt_core.errors import AptError
from apt_core.files.contract import metadata_json
from apt_core.files.tensorfile import read_tensors, write_tensors
from apt_core.models.text import TextEncoder

PROMPTS = "prompts.safetensors"


def write_prompts(folder: Path, text_encoder, prompts: Sequence[str]) -> None:
    """Encode the prompts into a file in `folder`, replacing an earlier one.

    Raises AptError for a prompt that is too long.
    """
    prompts = list(dict.fromkeys(prompts))
    embeddings = text_encoder.encode(prompts) if prompts else []
    tensors = {f"{number}": embedding for number, embedding in enumerate(embeddings)}
    about = {"prompts": prompts, "length": text_encoder.text_length, "dim": text_encoder.dim}
    write_tensors(folder / PROMPTS, tensors, {"about": json.dumps(about)})


class Prompts:
    """The stored prompts of a folder, usable in place of the text encoder that encoded them.

    Raises AptError when the folder has no stored prompts.
    """

    pad = staticmethod(TextEncoder.pad)

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / PROMPTS
        if not path.is_file():
            raise AptError(f"{path} does not exist: run precompute, which encodes the prompts too.")
        tensors, header = read_tensors(path)
        about = metadata_json(path, header.metadata, "about")
        self.text_length, self.dim = about["length"], about["dim"]
        self._embeddings = {
            text: tensors[f"{number}"].float() for number, text in enumerate(about["prompts"])
        }

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """One embedding `[L_i, d]` per text, fp32. Raises AptError for a text that is not stored."""
        if missing := [text for text in texts if text not in self._embeddings]:
            raise AptError(
                f'the prompt "{missing[0][:60]}" was not encoded with the shards: '
                "run precompute again, which adds it in seconds."
            )
        return [self._embeddings[text] for text in texts]
