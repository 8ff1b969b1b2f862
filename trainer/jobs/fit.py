"""Does a stage fit into the GPUs' memory, and if not, with which nearest settings would it?"""

from itertools import combinations

from apt_core.errors import AptError
from trainer.config import Preset
from trainer.machines.account import Account, account, check_split
from trainer.machines.machine import GIB, Machine
from trainer.overrides import apply, known_names

MOST_GPUS = 4096


def check_fit(
    needed: Account, preset: Preset, stage: str, recipe: str, machine: Machine, frozen: int = 0
) -> None:
    """Raise AptError if the stage, whose account is `needed`, does not fit into the GPUs' memory. The message
    names the nearest settings that would fit. frozen: as for `account`.
    """
    if needed.bytes <= machine.usable:
        return
    ways = [
        way
        for way in (
            _by_settings(preset, stage, recipe, machine, frozen),
            _by_gpus(preset, stage, recipe, machine, frozen),
        )
        if way
    ]
    has = (
        f"{machine.gpus} x {machine.memory / GIB:.0f} GiB"
        if machine.gpus > 1
        else f"{machine.memory / GIB:.0f} GiB"
    )
    what = f"{preset.name}, {'stage 1' if stage == 'distill' else stage + ' phase'}"
    raise AptError(
        f"{what}, needs {needed.bytes / GIB:.1f} GiB on each GPU, which {has} cannot hold: "
        f"{' or '.join(ways) or 'take larger GPUs'}."
    )


def _by_settings(preset: Preset, stage: str, recipe: str, machine: Machine, frozen: int) -> str | None:
    """The least costly set of changes with which the stage fits, as `key=value`s; None if there is none."""
    options = _changes(preset, stage, recipe, machine.gpus)
    sets = [group for size in range(1, 6) for group in combinations(options, size)]
    for group in sorted(sets, key=lambda group: sum(cost for cost, _ in group)):
        changes = [change for _, changes in group for change in changes]
        if len({change.partition("=")[0] for change in changes}) < len(changes):
            continue
        changed = Preset.model_validate(
            apply(preset.model_dump(), changes, known_names(Preset, preset.model_dump()), ())
        )
        needed = account(changed, stage, recipe, machine.gpus, frozen)
        if needed.bytes <= machine.usable:
            return f"add {' '.join(changes)} ({needed.bytes / GIB:.1f} GiB)"
    return None


def _changes(preset: Preset, stage: str, recipe: str, gpus: int) -> list[tuple[int, list[str]]]:
    """(cost, settings) of each change that saves memory. Cheap ones take time, the dearest shrink clips."""
    train, model, data = preset.train, preset.model, preset.data
    out = []

    def offer(cost: int, wanted: bool, *settings: str) -> None:
        if wanted:
            out.append((cost, list(settings)))

    if stage != "distill":
        phase = f"stage2.{recipe}.{stage}"
        offer(
            1,
            preset.phase(stage, recipe).discriminator_step != "two_pass",
            f"{phase}.discriminator_step=two_pass",
        )
    offer(1, train.checkpointing == "none", "train.checkpointing=blocks")
    offer(1, train.microbatch != 1, "train.microbatch=1")
    offer(
        1,
        2 in (train.generator_zero, train.discriminator_zero),
        "train.generator_zero=3",
        "train.discriminator_zero=3",
    )
    offer(1, gpus > 1 and not train.sync_every_microbatch, "train.sync_every_microbatch=true")
    offer(2, bool(train.ema_decays), "train.ema_decays=[]")
    offer(2, train.checkpointing != "offload", "train.checkpointing=offload")
    offer(2, train.compute == "fp32", "train.compute=bf16")
    for cp in _splits(preset, stage, recipe, gpus):
        offer(3, cp != train.context_parallel, f"train.context_parallel={cp}")
    slim = max(1, round(1024 / model.head_dim)) * model.head_dim
    offer(3, stage != "distill" and (train.head_width or model.width) > slim, f"train.head_width={slim}")
    offer(8, train.mode != "lora", "train.mode=lora")
    if stage != "image":
        offer(12, data.frames > 33, "data.frames=33")
        offer(14, data.frames > 17, "data.frames=17")
        offer(16, data.height * data.width > 480 * 832, "data.height=480", "data.width=832")
    else:
        offer(16, data.size("image")[0] > 512, "data.image_height=512", "data.image_width=512")
    return out


def _splits(preset: Preset, stage: str, recipe: str, gpus: int) -> list[int]:
    def splits(cp: int) -> bool:
        changed = preset.model_copy(
            update={"train": preset.train.model_copy(update={"context_parallel": cp})}
        )
        try:
            check_split(changed, stage, recipe, gpus)
        except AptError:
            return False
        return True

    return [cp for cp in (2, 4, 5, 6, 8, 10, 12) if gpus % cp == 0 and splits(cp)]


def _by_gpus(preset: Preset, stage: str, recipe: str, machine: Machine, frozen: int) -> str | None:
    """The smallest number of GPUs (this machine's times 2, 4, ...) on which the unchanged settings fit."""
    gpus = machine.gpus * 2
    while gpus <= MOST_GPUS:
        try:
            needed = account(preset, stage, recipe, gpus, frozen)
        except AptError:  # the batch cannot be divided over this many
            return None
        if needed.bytes <= machine.usable:
            return f"take {gpus} such GPUs ({needed.bytes / GIB:.1f} GiB)"
        gpus *= 2
    return None
