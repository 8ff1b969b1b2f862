"""What a phase of stage 2 starts from, checked by its header before a sample is encoded or a weight read."""

from dataclasses import dataclass
from pathlib import Path

import torch

from apt_core.errors import AptError
from apt_core.loading.backbones import load_backbone
from apt_core.models.differences import differences
from apt_core.models.lora import add_adapters, load_lora
from trainer.checkpoints.starting_models import build, check_base, read_about, times_note
from trainer.config import Preset
from trainer.run.folders import is_state, resolve
from trainer.stages.networks import Lora, check_start, is_lora_at, lora_of


@dataclass(frozen=True)
class Start:
    """A file or folder with a generator's first weights.

    note: what the user should know of the times that it was made for, see `times_note`.
    frozen: bytes of what it changes beside the layers that adapters adapt, for each network that starts from
    it; 0 where whole networks train. They are not sharded.
    """

    path: Path
    note: str | None = None
    frozen: int = 0


def open_start(path: Path, preset: Preset, base: Path | None) -> Start:
    """Look at a start. base: the base transformer; None if it is not known, or not written yet.

    Raises AptError, with what would do, if a phase cannot begin with it: a run's folder or training state,
    the LoRA of another base or of a higher rank, a whole model in LoRA mode, another timestep.
    """
    _refuse_run(path)
    note = times_note(path)
    if path.is_dir() or not is_lora_at(path):
        check_base(path, preset.model, preset.name, "--start-from")
    if base is not None and path.samefile(base):
        return Start(base, note)
    lora = lora_of(preset.train)

    def load(place, device=None):
        if base is not None:
            return load_backbone(place, device=device)
        with torch.device("meta"):
            return build(preset.model)

    below = base if base is not None else f"the base of preset {preset.name}"
    check_start(path, below, load, lora)
    return Start(path, note, frozen_bytes(path, load(below, device="meta"), lora) if lora else 0)


def frozen_bytes(path: Path, model: torch.nn.Module, lora: Lora) -> int:
    """Bytes of the differences that the LoRA at `path` leaves in one role of `model`, which is on "meta"
    (apt_core.models.lora.load_lora). Only the header is read. Raises AptError as `check_lora` does.
    """
    load_lora(path, add_adapters(model, ("generator",), lora.rank, lora.alpha), "generator")
    return sum(value.nbytes for value in differences(model, "generator").values())


def _refuse_run(path: Path) -> None:
    """Raise AptError for a run's folder or training state: which of its weights are meant is not told."""
    if not path.is_dir():
        return
    found = resolve(path)
    if is_state(found):
        what = "a training state" if found == path else "a folder of training states"
        form = " --form lora" if read_about(found.parent)["lora"] else ""
        raise AptError(
            f"--start-from {path} is {what}, and a start is weights alone: write them to a file with "
            f"`export {found} --out FILE{form} --dtype fp32`, and give that."
        )
    if found != path:
        raise AptError(f"--start-from {path} is the folder of a run: give the file in it, {found}.")
    if (path / "states").is_dir() or (path / "latents").is_dir():
        raise AptError(
            f"--start-from {path} is the folder of a run that has finished no stage: "
            "give a file of weights, or let it "
            "finish its first stage."
        )
