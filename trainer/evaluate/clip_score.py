"""CLIP score: how well a clip fits its prompt, by a CLIP model in a local folder.

transformers, which training depends on anyway, reads it; open_clip would need torchvision as well.
"""

import json
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from apt_core.errors import AptError
from apt_core.files.folders import weight_files
from trainer.config import Settings
from trainer.digest import file_digest, files_digest

from .features import checked_table, is_digest, read_tables

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin")
"""In the order in which transformers looks for them."""


class ClipFolder(Settings):
    """The `[clip]` table in the file given as `--features`.

    path: a folder as transformers saves it (config.json, weights, tokenizer), relative to the TOML file.
    sha256: of the weights' file in it, 64 hexadecimal digits; without it any weights are taken. Of shards it
        is the SHA-256 of what sha256sum prints for them in the order of their names.
    batch: frames per call.
    """

    path: Path
    sha256: str | None = None
    batch: int = Field(16, ge=1)

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str | None) -> str | None:
        return value if value is None else is_digest(value)


def read_clip(path: Path) -> ClipFolder:
    """The `[clip]` table of a TOML file, with the SHA-256 that was found. Raises AptError if it is not valid,
    or if the folder has no weights or others than the table says.
    """
    folder = checked_table(path, ClipFolder, read_tables(path)["clip"])
    folder = folder.model_copy(update={"path": path.parent / folder.path})
    files = _weights(folder.path)
    if not files:
        pinned = f" with SHA-256 {folder.sha256}" if folder.sha256 else ""
        raise AptError(
            f"{folder.path} does not hold {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]} "
            "for clip_score: save a CLIP "
            f"model of transformers{pinned} and its tokenizer there, or remove [clip] from {path}."
        )
    names = [file.name for file in files]
    found = file_digest(files[0]) if len(files) == 1 else files_digest(folder.path, names)
    if folder.sha256 not in (None, found):
        raise AptError(
            f"{' and '.join(map(str, files))} has SHA-256 {found}, but {path} says {folder.sha256}: get the "
            "right file, or correct that line."
        )
    return folder.model_copy(update={"sha256": found})


def _weights(folder: Path) -> list[Path]:
    """The files of weights that transformers would read; none if there are none. Raises AptError for shards
    that are not all there.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name == INDEX:
        return weight_files(folder, "model")
    return [folder / name] if name else []


class ClipScore:
    """100 max(cos(image, text), 0) of each frame, averaged over the frames of a clip.

    (Hessel et al. 2021, "CLIPScore", with 100 in the place of their 2.5, as is common for generated images.)
    Frames are resized along the shorter side to the model's size (bicubic, antialiased), cropped in the
    centre and normalised as preprocessor_config.json of the folder says, or as OpenAI's models are. Texts are
    cut to the model's length. The model runs in fp32.

    Raises AptError for a folder that transformers cannot read as a CLIP model.
    """

    def __init__(self, folder: ClipFolder, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        self.folder, self.device = folder, device
        try:
            about = folder.path / "preprocessor_config.json"
            found = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
            mean, std = found.get("image_mean", OPENAI_CLIP_MEAN), found.get("image_std", OPENAI_CLIP_STD)
            model, loaded = CLIPModel.from_pretrained(
                folder.path, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
                raise ValueError(f"its weights lack {missing[0]}")
            self.tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
            self.mean, self.std = (torch.tensor(v)[None, :, None, None] for v in (mean, std))
        except Exception as error:  # whatever the libraries raise for a file that is not what it should be
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise AptError(
                f"{folder.path} cannot be read as a CLIP model ({said}): save one there with transformers, "
                "with its tokenizer."
            ) from None
        self.model = model.eval().to(device)
        self.size = model.config.vision_config.image_size
        self.length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, clip: np.ndarray, words: str) -> float:
        """The score, 0 to 100, of a clip uint8 `[F, H, W, 3]` and its text."""
        frames = torch.tensor(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
        parts = []
        for part in frames.split(self.folder.batch):
            pooled = self.model.vision_model(self.prepare(part).to(self.device)).pooler_output
            parts.append(self.model.visual_projection(pooled))
        tokens = self.tokenizer(words, truncation=True, max_length=self.length, return_tensors="pt")
        pooled = self.model.text_model(tokens["input_ids"].to(self.device)).pooler_output
        text = self.model.text_projection(pooled)
        cos = F.cosine_similarity(torch.cat(parts).double(), text.double())
        return float((100 * cos).clamp(min=0).mean())

    def prepare(self, frames: Tensor) -> Tensor:
        """uint8 `[n, 3, H, W]` as the model takes it: fp32 `[n, 3, size, size]`."""
        sides = frames.shape[-2:]
        shape = [self.size * side // min(sides) for side in sides]
        x = F.interpolate(frames, shape, mode="bicubic", antialias=True) / 255  # of uint8, as Pillow does it
        top, left = ((side - self.size) // 2 for side in shape)
        return (x[..., top : top + self.size, left : left + self.size] - self.mean) / self.std
