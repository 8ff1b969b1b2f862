"""Frechet distances in the features of a network that the user supplies in a file.

A distance is named after that file: `fd_NAME` on whole frames, and `fd_patch_NAME` on centre crops without
resizing (the paper's appendix A). FID, PFID and FVD are those in the published files of `published`.
"""

import tomllib
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from apt_core.errors import AptError
from trainer.config import Settings
from trainer.digest import file_digest
from trainer.mini.metrics import frechet

from .inception import Inception, open_inception
from .published import KNOWN, PATCH, Published

S = TypeVar("S", bound=Settings)
FEATURES = "return_features"
FLAGS = (FEATURES, "rescale", "resize")
"""Arguments of forward in the networks of StyleGAN2-ADA and StyleGAN-V. With them on, such a network takes
levels 0 to 255, resizes and normalises them itself, and returns features instead of classes."""
PREPARED = ("size", "mean", "std")
"""Settings of a `[[features]]` table that a network has no use for which prepares its pixels itself."""


def is_digest(value: str) -> str:
    """A SHA-256 in lower case. Raises ValueError if it is none."""
    value = value.lower()
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError("it must be 64 hexadecimal digits")
    return value


class Network(Settings):
    """One `[[features]]` table in the file given as `--features`.

    path: relative to the TOML file: a network of torch.jit.save that returns features `[n, d]`, or weights of
        FID's Inception, which torch-fidelity opens.
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
    patch: int = Field(PATCH, ge=0)
    batch: int = Field(16, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, values: Any) -> Any:
        known = KNOWN.get(str(values.get("sha256")).lower())
        if known is None:
            return values
        if values.get("input", known.input) != known.input:
            raise ValueError(f"{known.file} takes {known.input}: leave input out")
        return {"input": known.input, "patch": PATCH if known.patch else 0} | values

    @field_validator("sha256")
    @classmethod
    def _is_a_digest(cls, value: str) -> str:
        return is_digest(value)

    @property
    def known(self) -> Published | None:
        return KNOWN.get(self.sha256)

    @property
    def name(self) -> str:
        return self.known.distance if self.known else f"fd_{self.path.stem}"

    @property
    def patch_name(self) -> str:
        if self.known and self.known.patch and self.patch == PATCH:
            return self.known.patch
        return f"fd_patch_{self.path.stem}"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.patch_name) if self.patch else (self.name,)


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


def network_tables(path: Path) -> list[Network]:
    """The `[[features]]` tables of a TOML file, whose files are not looked at. Raises AptError if one is not
    valid, or two distances would have one name.
    """
    networks = [checked_table(path, Network, table) for table in read_tables(path).get("features", [])]
    names = [name for network in networks for name in network.names]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise AptError(f"--features {path}: two files would both be called {double}: rename or remove one.")
    return [n.model_copy(update={"path": path.parent / n.path}) for n in networks]


def read_networks(path: Path) -> list[Network]:
    """The `[[features]]` tables of a TOML file. Raises AptError if the file is missing or has something else
    in it, and if a file of weights is missing or has another SHA-256 than its table says.
    """
    networks = network_tables(path)
    _check_files(path, networks)
    return networks


def _check_files(path: Path, networks: Sequence[Network]) -> None:
    for network in networks:
        if not network.path.is_file():
            what = network.known.file if network.known else "the file"
            raise AptError(
                f"{network.path}, the weights of {network.name}, does not exist: put {what} with SHA-256 "
                f"{network.sha256} there, or remove its table from {path}."
            )
        if (found := file_digest(network.path)) != network.sha256:
            raise AptError(
                f"{network.path} has SHA-256 {found}, but {path} says {network.sha256}: get the right "
                "file, or correct that line."
            )


class Features:
    """The network of one table, with its weights: `module` on `device`, or what its file holds.

    only: the names of the distances that are wanted; by default all of the table's.
    Raises AptError if the file holds no such network, or its table has settings that it does not use.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        module: nn.Module | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        self.network, self.device = network, device
        self.names = tuple(name for name in network.names if only is None or name in only)
        self.flags: dict[str, bool] = {}
        self.module = module or _open(network.path).to(device)
        self.levels = isinstance(self.module, Inception)
        if isinstance(self.module, torch.jit.ScriptModule):
            taken = {argument.name for argument in self.module.forward.schema.arguments}
            self.levels = FEATURES in taken
            self.flags = dict.fromkeys([f for f in FLAGS if f in taken], True) if self.levels else {}
        if self.levels and (set_ := [name for name in PREPARED if name in network.model_fields_set]):
            raise AptError(
                f"{network.path} resizes and normalises its pixels itself: leave out {', '.join(set_)} of "
                "its table."
            )

    def facts(self) -> dict:
        """Its file and the settings that it uses, as JSON values."""
        unused = PREPARED if self.levels else ()
        about = self.network.model_dump(exclude={"path", *unused})
        return {"name": self.network.name, "file": self.network.path.name} | about

    @torch.no_grad()
    def __call__(self, clip: np.ndarray) -> dict[str, np.ndarray]:
        """Features of a clip uint8 `[F, H, W, 3]`: fp64 `[n, d]` by the name of the distance, where n is F
        for a network over frames and 1 for one over clips.

        Raises AptError if the clip is smaller than the patch, or the network cannot process it.
        """
        network, patch = self.network, self.network.patch
        x = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
        found = {network.name: self._run(x, network.size)} if network.name in self.names else {}
        if patch and network.patch_name in self.names:
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
            made = [self.module(part.to(self.device), **self.flags).double().cpu() for part in parts]
        except (RuntimeError, AttributeError, TypeError) as error:
            said = str(error).strip().splitlines()[-1]
            raise AptError(
                f"{self.network.path.name} failed on {self.network.input} of shape {list(parts[0].shape)} "
                f"({said}): correct input, size or patch in its table."
            ) from None
        out, count = torch.cat(made), 1 if self.network.input == "clips" else len(frames)
        if out.ndim != 2 or len(out) != count:
            raise AptError(
                f"{self.network.path.name} returns shape {list(out.shape)} instead of [{count}, d]: make it "
                "end with pooled features."
            )
        return out.numpy()

    def _prepare(self, frames: Tensor, size: int) -> Tensor:
        if self.levels:
            return frames.float()
        x = frames.float() / 255
        if size:
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (self.network.mean, self.network.std))
        return (x - mean) / std


def _open(path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # torch asks for a newer export format, but the published file is what it is
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        if (inception := open_inception(path)) is not None:
            return inception
        raise AptError(
            f"{path} cannot be opened as TorchScript ({str(error).strip().splitlines()[0]}): save the "
            "network with torch.jit.save."
        ) from None


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
