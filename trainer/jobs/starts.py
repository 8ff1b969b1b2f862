"""What a phase of stage 2 starts from, checked by its header before a sample is encoded or a weight read."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_checkpoint
from apt_core.loading.backbones import load_backbone
from trainer.checkpoints.starting_models import build, check_base, read_about, times_note
from trainer.config import Preset
from trainer.run.folders import is_state, resolve
from trainer.stages.networks import Start, lora_of, read_start


def open_start(path: Path, preset: Preset, base: Path | None) -> Start:
    """Look at a start, once. base: the base transformer; None if it is not known, or not written yet.

    Raises AptError, with what would do, if a phase cannot begin with it: a run's folder or training state,
    the LoRA of another base or of a higher rank, a whole model in LoRA mode, another timestep.
    """
    _refuse_run(path)
    if not path.exists():
        raise AptError(f"--start-from {path} does not exist: give a model or a LoRA over the base.")
    file = read_checkpoint(path)
    note = times_note(file)
    if not file.is_lora:
        check_base(path, preset.model, preset.name, "--start-from", file.header)
    if base is not None and path.samefile(base):
        return Start(base, note=note)

    def empty() -> nn.Module:
        if base is not None:
            return load_backbone(base, device="meta")
        with torch.device("meta"):
            return build(preset.model)

    below = base if base is not None else f"the base of preset {preset.name}"
    return replace(read_start(file, below, empty, lora_of(preset.train)), note=note)


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
            "give a file of weights, or let it finish its first stage."
        )
