"""Open a generator from anything a run produces.

That is a checkpoint file, a LoRA file, a diffusers folder, a training state, or the run's folder itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_checkpoint
from apt_core.loading.backbones import load_backbone
from apt_core.method.discriminator import Discriminator
from apt_core.models.lora import add_adapters, load_lora, role
from apt_core.models.lora_files import LoraFile, merge, read_lora, read_lora_for
from apt_core.models.wan import PAPER_FRACTIONS
from trainer.checkpoints.starting_models import locate, read_about
from trainer.config import Files
from trainer.run.folders import ABOUT, DIFFERENCES, FACTS, is_state, resolve
from trainer.run.state_files import REMEDY, StateReader, check_digests, read_facts
from trainer.stages.networks import make_discriminator

ROLE = "generator"


@dataclass
class Generator:
    """A generator in fp32 on the CPU.

    model: a backbone with all its weights; metadata: the `apt` object (apt_core.files.contract).
    base: for a LoRA, the network its adapters are attached to; otherwise None. A LoRA that covers other
    layers than our trainer's is merged into the weights, so it has no base either.
    """

    model: nn.Module
    base: nn.Module | None
    metadata: dict


def open_generator(path: str | Path, base: str | Path | None = None, ema: float | None = None) -> Generator:
    """Open the generator at `path`.

    A run's folder gives the result of its last finished stage, a folder of states its newest state.
    base: the transformer that a LoRA file belongs to; for a training state, its base if that has moved.
    ema: for a training state, the decay of the EMA to take; by default the stage's own, 0 for raw weights.
    Raises AptError for a file that cannot be used (see `load_backbone`), a LoRA without its base, and an
    EMA that was not kept.
    """
    path = resolve(Path(path))
    if is_state(path):
        return _from_state(path, ema, base)
    if ema is not None:
        raise AptError(
            f"{path} holds one set of weights, no averages: give a training state (states/STAGE/step-...), "
            "or leave --ema out."
        )
    file = read_checkpoint(path)
    if not file.is_lora:
        return Generator(load_backbone(path), None, file.apt)
    if not base:
        if not file.apt:
            read_lora(path, header=file.header)  # raises if no base would help
        raise AptError(f"{path} is a LoRA: add --base PATH of the transformer that it belongs to.")
    below = locate(Files(base=str(base)), "base")
    lora = read_lora_for(path, load_backbone(below, device="meta"), below, file.header)
    metadata = read_checkpoint(below).apt | file.apt
    if not _like_ours(lora, below):
        return Generator(merge(load_backbone(below), lora.load()), None, metadata)
    model = add_adapters(load_backbone(below), (ROLE,), next(iter(lora.ranks.values())))
    load_lora(lora, model, ROLE)
    return Generator(role(model, ROLE), model, metadata)


def _like_ours(lora: LoraFile, base: Path) -> bool:
    """Whether a LoRA fits our trainer's adapters: one rank, and factors for all linear layers of the blocks.

    Anything else that it changes is kept as differences.
    """
    if len(set(lora.ranks.values())) != 1:
        return False
    model = add_adapters(load_backbone(base, device="meta"), (ROLE,), 1)
    return {model.official_name(layer) for layer in role(model, ROLE).adapters()} == set(lora.ranks)


def cast(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move the whole module to a device and dtype.

    We avoid diffusers' own `to`, because it warns about the parts that it prefers in fp32.
    """
    return nn.Module.to(module, device, dtype)


def base_of(state: Path, about: Mapping, given: str | Path | None = None) -> Path:
    """The path of the transformer that a training state started from: `given`, or else where it was then.

    Raises AptError when it does not exist.
    """
    path = locate(Files(base=str(given)), "base") if given else Path(about["base"])
    if not path.exists():
        raise AptError(
            f"{state} was trained from {path}, which is not there any more: "
            "add --base PATH of where it is now."
        )
    return path


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a state's weights into a network. Raises AptError when they do not fit it."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise AptError(
            f"{path} does not hold the weights of its network "
            f"({' '.join(str(error).split())[:200]}): {REMEDY}."
        ) from None


def open_discriminator(path: str | Path, base: str | Path | None = None) -> tuple[Discriminator, dict]:
    """Open the discriminator of a training state, fp32 on the CPU.

    Also returns the run's identity (phase, shift, ...).
    Raises AptError for anything but a training state of stage 2.
    """
    state = State(resolve(Path(path)))
    if not state.names("discriminator.weights/"):
        raise AptError(
            f"{state.path} has no discriminator: give a training state of stage 2 (states/image/step-... "
            "or states/video/step-...)."
        )
    backbone = load_backbone(base_of(state.path, state.about, base))
    if state.about["lora"]:
        rank, alpha = state.about["lora"]
        backbone = add_adapters(backbone, ("discriminator",), rank, alpha)
        if state.identity.get("discriminator_start") == "start":
            _add_differences(state.path, backbone, "discriminator")
        backbone = role(backbone, "discriminator")
    model = make_discriminator(
        backbone, state.identity.get("taps", PAPER_FRACTIONS), state.identity.get("head_width")
    )
    fill(model, state.tensors("discriminator.weights/"), state.path)
    return model.eval().requires_grad_(False), state.identity


def _add_differences(state: Path, model: nn.Module, name: str) -> None:
    """Add the differences, besides adapters, that the run's start had; they are stored beside the states."""
    if (beside := state.parent / DIFFERENCES).is_file():
        load_lora(beside, model, name)


class State:
    """A training state, opened for reading.

    `about` describes the stage, `facts` this state (its update, the run's identity, ...); `tensors` reads
    tensors by prefix. Raises AptError for a folder that is not a complete state.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        """check: read all of the state's files to verify their digests."""
        self.path = path
        remedy = f"give a whole training state that the trainer wrote, with its {ABOUT} beside it"
        self.about, self.facts = read_about(path.parent), read_facts(path, remedy)
        self.identity, self._digests = self.facts["identity"], self.facts.get("files", {})
        wanted = {"ema_decay": float | int, "phase": str}
        if not all(isinstance(self.identity.get(name), kind) for name, kind in wanted.items()):
            raise AptError(f"{path / FACTS} is damaged: {remedy}.")
        if check:
            check_digests(path, self._digests, sorted(self._digests))
        self._entries = StateReader(path, self._digests).read_metadata().state_dict_metadata

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._entries if name.startswith(prefix)]

    def numel(self, name: str) -> int:
        return math.prod(self._entries[name].size)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, by the rest of their names.

        Raises AptError for a state that cannot be loaded.
        """
        tensors = {
            name: torch.empty(self._entries[name].size, dtype=self._entries[name].properties.dtype)
            for name in self.names(prefix)
        }
        try:
            dcp.load(tensors, storage_reader=StateReader(self.path, self._digests), no_dist=True)
        except (CheckpointException, RuntimeError, OSError, ValueError, KeyError) as error:
            raise AptError(
                f"{self.path} cannot be loaded ({' '.join(str(error).split())[:200]}): {REMEDY}."
            ) from None
        return {name.removeprefix(prefix): value for name, value in tensors.items()}


def average_of(path: Path, ema: float | None) -> float:
    """The decay of the EMA that `open_generator` would take from a training state; 0 for the raw weights.

    No weights are read. Raises AptError for an EMA that was not kept.
    """
    return float(_average(State(path, check=False), ema))


def _average(state: State, ema: float | None) -> str:
    """The name of this EMA in the state."""
    decays = sorted(
        {name.split("/")[0].removeprefix("averages.") for name in state.names("averages.")}, key=float
    )
    wanted = f"{state.facts['identity']['ema_decay']:g}" if ema is None else f"{ema:g}"
    if ema != 0 and wanted not in decays:
        raise AptError(
            f"{state.path} has no average of decay {wanted}: it has {', '.join(decays)}, "
            "and 0 for the raw weights."
        )
    return wanted


def _from_state(path: Path, ema: float | None, given: str | Path | None) -> Generator:
    state = State(path)
    about, facts = state.about, state.facts
    network = "student" if state.names("student.") else "generator"
    wanted = _average(state, ema)
    weights = state.tensors(f"{network}.weights/" if ema == 0 else f"averages.{wanted}/")
    metadata = about["metadata"] | {
        "kind": "generator",
        "phase": facts["identity"]["phase"],
        "updates": facts["update"],
        "ema": float(wanted),
    }
    if ema != 0:
        # Runs from before this was a setting used 10.
        metadata["ema_warmup"] = facts["identity"].get("ema_warmup", 10)

    base = load_backbone(base_of(path, about, given))
    if about["lora"] is None:
        fill(base, weights, path)
        return Generator(base, None, metadata)
    rank, alpha = about["lora"]
    model = add_adapters(base, (ROLE,), rank, alpha)
    _add_differences(path, model, ROLE)
    adapters = role(model, ROLE)
    fill(adapters, weights, path)
    return Generator(adapters, model, metadata | {"kind": "lora"})
