"""Plan a stage: what it trains, from which files, on which machine, and with which settings it fits there.

Everything that can be checked before weights are read is checked here.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

from apt_core.errors import AptError
from apt_core.loading.sources import MINI
from apt_core.models.attention import check_name
from trainer.checkpoints.starting_models import RANDOM, find_base
from trainer.config import Adversarial, Preset
from trainer.jobs.starts import open_start
from trainer.machines.account import Account, account, check_split
from trainer.machines.machine import GIB, Machine, pick_device, this_machine
from trainer.machines.parallel import Parallel, parallel_of
from trainer.run.folders import DISTILLED, IMAGE
from trainer.run.monitor import Work
from trainer.stages.networks import Lora, Start, lora_of

LATENTS = "latents"
MOST_GPUS = 4096


@dataclass(frozen=True)
class Plan:
    """One stage of a run, as `make_plan` makes it.

    preset: with its recipe applied; stage: "distill", or stage 2's "image" or "video"; out: the run's folder.
    base: the base transformer's file; machine: what it runs on; attention: the attention backend, in words;
    start: the generator's first weights, of stage 2, where there is a file of them.
    A plan for a dry run has base None if none is given, and device, parallel and attention None for a machine
    that is only described.
    """

    preset: Preset
    stage: str
    recipe: str
    out: Path
    seed: int
    shards: Path
    base: Path | None
    device: str | None
    parallel: Parallel | None
    attention: str | None
    machine: Machine
    start: Start | None = None

    @property
    def result(self) -> Path:
        """The file that the stage writes its result to."""
        return final_file(self.out, self.preset, self.stage)

    @property
    def states(self) -> Path:
        return self.out / "states" / self.stage

    @property
    def log(self) -> Path:
        return self.out / "log" / self.stage

    @cached_property
    def settings(self) -> Adversarial:
        """The settings of this phase of stage 2."""
        return self.preset.phase(self.stage, self.recipe)

    @cached_property
    def account(self) -> Account:
        """The memory and FLOPs that the stage needs on its machine. Raises AptError as `account` does."""
        return self.account_of(self.preset, self.machine.gpus)

    def account_of(self, preset: Preset, gpus: int) -> Account:
        """What the stage would need with other settings, or on another number of GPUs."""
        return account(preset, self.stage, self.recipe, gpus, self.start.frozen if self.start else 0)

    @cached_property
    def lora(self) -> Lora | None:
        return lora_of(self.preset.train)

    @property
    def ema_decays(self) -> list[float]:
        """Decays of the additional EMAs, without the stage's own."""
        own = self.preset.distill.ema_decay if self.stage == "distill" else self.settings.ema_decay
        return [decay for decay in self.preset.train.ema_decays if decay != own]

    @property
    def work(self) -> Work | None:
        """What an update costs on this machine, for the log of stage 2; None for stage 1."""
        if self.stage == "distill":
            return None
        return Work(self.settings.batch, self.account.flops, self.machine.peak * self.machine.gpus)

    @property
    def kind(self) -> str:
        """The kind of sample that it trains on, if the shards have it. Stage 1 prefers clips."""
        return "video" if self.stage == "distill" else self.stage

    def metadata(self, kind: str) -> dict:
        """Metadata for the stage's files when it trains on samples of `kind`; see `metadata`."""
        found = metadata(self.preset, self.stage, kind, self.recipe, self.seed)
        return found | {"over": self.base.name} if self.lora else found

    def check_fit(self) -> None:
        """Raise AptError, with the nearest settings that fit, if the stage does not fit the GPUs' memory."""
        needed, machine = self.account, self.machine
        if needed.bytes <= machine.usable:
            return
        ways = [way for way in (_by_settings(self), _by_gpus(self)) if way]
        each = f"{machine.memory / GIB:.0f} GiB"
        has = f"{machine.gpus} x {each}" if machine.gpus > 1 else each
        what = f"{self.preset.name}, {'stage 1' if self.stage == 'distill' else self.stage + ' phase'}"
        raise AptError(
            f"{what}, needs {needed.bytes / GIB:.1f} GiB on each GPU, which {has} cannot hold: "
            f"{' or '.join(ways) or 'take larger GPUs'}."
        )


def make_plan(
    preset: Preset,
    stage: str,
    out: Path,
    *,
    recipe: str | None = None,
    seed: int = 0,
    shards: Path | None = None,
    start: Path | None = None,
    dry_run: bool = False,
    machine: Machine | None = None,
) -> Plan:
    """Plan a stage on this machine. preset: with its recipe applied (`Preset.with_recipe`).

    recipe: by default the preset's own; shards: by default those in the run's folder `out`; start: of stage
    2, the generator's first weights, by default the result of the stage before.
    dry_run: the plan is only shown, so it needs no base and may be too large. machine: a dry run's, if it is
    not this one; what is installed there and which files it has is not known.
    Raises AptError for a device, a backend or a compiler that is not there, for a base that is missing or has
    another shape, as `open_start`, for settings that contradict each other, and when the stage does not fit
    the GPUs' memory.
    """
    recipe, device, parallel, attention = recipe or preset.default_recipe, None, None, None
    if here := machine is None:
        device = pick_device(preset.train.device)
        parallel, backend = parallel_of(preset, device)
        attention = str(backend)
    else:
        check_name(preset.train.attention)
    base = None
    if preset.files.base == RANDOM:
        base = out / "base.safetensors"
    elif not dry_run or (preset.files.base and (here or start)):
        base = find_base(preset)
    if here:
        machine = this_machine(device, preset.train.compute)
        start = start or result_before(out, preset, stage)
    begin = open_start(start, preset, base if base and base.exists() else None) if start else None
    shards = shards or out / LATENTS
    plan = Plan(preset, stage, recipe, out, seed, shards, base, device, parallel, attention, machine, begin)
    if not dry_run:
        plan.check_fit()
    return plan


def final_file(out: Path, preset: Preset, stage: str) -> Path:
    """The file with a stage's result. stage: "distill", or stage 2's "image" or "video"."""
    return out / {"distill": DISTILLED, "image": IMAGE, "video": f"apt-{preset.name}.safetensors"}[stage]


def result_before(out: Path, preset: Preset, stage: str) -> Path | None:
    """The result of the stage before this one in a run's folder, if there is one; None for stage 1."""
    earlier = {"distill": (), "image": ("distill",), "video": ("image", "distill")}[stage]
    found = (final_file(out, preset, before) for before in earlier)
    return next((path for path in found if path.exists()), None)


def find_start(plan: Plan) -> Start:
    """The generator's first weights: the plan's start or, without one, the miniature's base. For other
    presets this raises AptError.
    """
    if plan.start:
        return plan.start
    out, preset = plan.out, plan.preset
    if preset.files.base != MINI:
        raise AptError(
            f"{out} holds no {DISTILLED}: run `distill {preset.name} --out {out}` first, "
            "or add --start-from FILE."
        )
    return Start(plan.base)


def metadata(preset: Preset, stage: str, kind: str, recipe: str, seed: int) -> dict:
    """Metadata for a stage's files when it trains on samples of `kind`; see apt_core.files.contract."""
    model = preset.model
    return {
        "base": MINI if preset.files.base == MINI else preset.name,
        "text_length": model.text_length,
        "vae": {
            "name": MINI if preset.files.base == MINI else f"wan {model.vae}",
            "stride": list(model.stride),
            "channels": model.channels,
        },
        "native": preset.data.native(kind),
        "second_time": preset.sampling.second_time,
        "preset": preset.name if stage == "distill" else f"{preset.name}/{recipe}",
        "seed": seed,
    }


def _by_settings(plan: Plan) -> str | None:
    """The least costly set of changes with which the stage fits, as `key=value`s; None if there is none."""
    preset, options = plan.preset, _changes(plan)
    sets = [group for size in range(1, 6) for group in combinations(options, size)]
    for group in sorted(sets, key=lambda group: sum(cost for cost, _ in group)):
        changes = [change for _, changes in group for change in changes]
        if len({change.partition("=")[0] for change in changes}) < len(changes):
            continue
        needed = plan.account_of(preset.changed({}, plan.recipe, changes), plan.machine.gpus)
        if needed.bytes <= plan.machine.usable:
            return f"add {' '.join(changes)} ({needed.bytes / GIB:.1f} GiB)"
    return None


def _changes(plan: Plan) -> list[tuple[int, list[str]]]:
    """(cost, settings) of each change that saves memory. Cheap ones take time, the dearest shrink clips."""
    preset, stage, gpus = plan.preset, plan.stage, plan.machine.gpus
    train, model, data = preset.train, preset.model, preset.data
    out = []

    def offer(cost: int, wanted: bool, *settings: str) -> None:
        if wanted:
            out.append((cost, list(settings)))

    if stage != "distill":
        step = f"stage2.{plan.recipe}.{stage}.discriminator_step=two_pass"
        offer(1, plan.settings.discriminator_step != "two_pass", step)
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
    for cp in _splits(plan):
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


def _splits(plan: Plan) -> list[int]:
    """The values of context_parallel that divide heads, GPUs and batch."""
    preset, gpus = plan.preset, plan.machine.gpus

    def divides(cp: int) -> bool:
        changed = preset.model_copy(
            update={"train": preset.train.model_copy(update={"context_parallel": cp})}
        )
        try:
            check_split(changed, plan.stage, plan.recipe, gpus)
        except AptError:
            return False
        return True

    return [cp for cp in (2, 4, 5, 6, 8, 10, 12) if gpus % cp == 0 and divides(cp)]


def _by_gpus(plan: Plan) -> str | None:
    """The smallest number of GPUs (this machine's times 2, 4, ...) on which the unchanged settings fit."""
    gpus = plan.machine.gpus * 2
    while gpus <= MOST_GPUS:
        try:
            needed = plan.account_of(plan.preset, gpus)
        except AptError:  # the batch cannot be divided over this many
            return None
        if needed.bytes <= plan.machine.usable:
            return f"take {gpus} such GPUs ({needed.bytes / GIB:.1f} GiB)"
        gpus *= 2
    return None
