"""The layout of a run's folder: where files and training states are."""

import re
from pathlib import Path

from apt_core.errors import AptError
from apt_core.loading.sources import MINI, SHIPPED

ABOUT = "about.json"  # beside the training states of a stage: what is needed to export them
DIFFERENCES = "differences.safetensors"  # there too: what a LoRA's start changes besides the adapted layers
# results of the earlier stages
DISTILLED, IMAGE = (
    "distilled.safetensors",
    "apt-image.safetensors",
)
STATE = ".metadata"  # what torch.distributed.checkpoint calls its index
FACTS = "run.json"  # in each training state, written last
STEP = re.compile(r"step-(\d{6,})(?:-half(\d*))?")
"""Names of training states. The trainer touches nothing else in their folder."""
UNFINISHED = ".part"  # suffix of a state that is still being written


def is_state(path: Path) -> bool:
    """Whether this folder is a training state: it has the files that every state has."""
    return path.is_dir() and (path / FACTS).is_file() and (path / STATE).is_file()


def whole_states(folder: Path) -> list[Path]:
    """The complete training states in a stage's folder, oldest first."""
    found = (path for path in folder.glob("step-*") if STEP.fullmatch(path.name) and is_state(path))
    return sorted(found, key=_age)


def newest_state(folder: Path) -> Path | None:
    """The newest complete training state in a stage's folder, if there is one."""
    return next(reversed(whole_states(folder)), None)


def state_name(update: int, ahead: int) -> str:
    """The name of the state after so many updates, and so many steps of the discriminator or of the fake
    score ahead of the next one: step-000100, step-000100-half, step-000100-half2.
    """
    return f"step-{update:06d}" + ("-half" + (str(ahead) if ahead > 1 else "") if ahead else "")


def _age(path: Path) -> tuple[int, int]:
    """Sort key: the numbers. Sorted by name, step-1000000 would come before step-999999."""
    number, ahead = STEP.fullmatch(path.name).groups()
    return int(number), 0 if ahead is None else int(ahead or 1)


def unfinished_states(folder: Path) -> list[Path]:
    """Remains of states that were never completed, or whose deletion was interrupted."""
    names = (
        (path, path.name.removesuffix(UNFINISHED))
        for path in folder.glob("step-*")
        if path.is_dir() and not path.is_symlink()
    )
    return sorted(
        path
        for path, name in names
        if STEP.fullmatch(name) and (name != path.name or not (path / FACTS).exists())
    )


def resolve(path: Path) -> Path:
    """The one thing that a folder of a run stands for; "mini" is the shipped generator, unless something
    there is called so; other paths as they are. Raises AptError when there is nothing at `path`.
    """
    if not path.exists():
        if str(path) == MINI:
            return SHIPPED["checkpoint"]
        raise AptError(
            f"{path} does not exist: give a checkpoint file, a diffusers folder, "
            "a training state or the folder of a run."
        )
    if not path.is_dir() or is_state(path):
        return path
    if newest := newest_state(path):
        return newest
    last = [file for file in path.glob("apt-*.safetensors") if "-ema" not in file.stem and file.name != IMAGE]
    earlier = [file for file in (path / IMAGE, path / DISTILLED) if file.is_file()]
    return max(last, key=lambda file: file.stat().st_mtime) if last else next(iter(earlier), path)


def earlier_note(path: Path, images: bool = False) -> str:
    """A line on which file stands for a run's folder whose video phase has not finished; "" for all else.

    images: whether images are asked for, which the image phase makes.
    """
    if not path.is_dir() or is_state(path) or newest_state(path):
        return ""
    name = resolve(path).name
    if name == IMAGE and not images:
        return f"{path} has finished no video phase, which makes clips: {name} is taken, and makes images."
    if name == DISTILLED:
        return f"{path} has finished stage 1 only: {name} is taken, and stage 2 is what makes it sharp."
    return ""
