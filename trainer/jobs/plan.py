"""One stage of a run as a plan: what it trains, from what, on which machine, and all that can be checked
before a weight is read.
"""

from dataclasses import dataclass
from pathlib import Path

from apt_core.errors import AptError
from apt_core.loading.sources import MINI
from trainer.checkpoints.starting_models import RANDOM, find_base
from trainer.config import Adversarial, Preset
from trainer.jobs.dry_run import check_fit
from trainer.machines.account import Account
from trainer.machines.machine import Machine, pick_device, this_machine
from trainer.machines.parallel import Parallel, parallel_of
from trainer.run.folders import DISTILLED, IMAGE
from trainer.run.monitor import Work
from trainer.stages.networks import Lora

LATENTS = "latents"
STAGES = ("distill", "image", "video")


@dataclass(frozen=True)
class Plan:
    """A stage ("distill", or stage 2's "image" or "video") of a preset, with its recipe applied, in the
    folder `out` of a run.

    base: the transformer's file; attention: the backend in words; account: counted memory and FLOPs. Made by
    `make_plan`.
    """

    preset: Preset
    stage: str
    recipe: str
    out: Path
    seed: int
    shards: Path
    base: Path
    device: str
    parallel: Parallel
    attention: str
    machine: Machine
    account: Account

    @property
    def result(self) -> Path:
        """The file that the stage leaves."""
        return final_file(self.out, self.preset, self.stage)

    @property
    def states(self) -> Path:
        return self.out / "states" / self.stage

    @property
    def log(self) -> Path:
        return self.out / "log" / self.stage

    @property
    def settings(self) -> Adversarial:
        """Of the phase of stage 2."""
        return getattr(self.preset.phases(self.recipe), self.stage)

    @property
    def lora(self) -> Lora | None:
        train = self.preset.train
        return Lora(train.lora_rank, train.lora_alpha) if train.mode == "lora" else None

    @property
    def ema_decays(self) -> list[float]:
        """Of the averages beside the stage's own."""
        own = self.preset.distill.ema_decay if self.stage == "distill" else self.settings.ema_decay
        return [decay for decay in self.preset.train.ema_decays if decay != own]

    @property
    def work(self) -> Work | None:
        """What an update costs on this machine, for the log of stage 2."""
        if self.stage == "distill":
            return None
        return Work(self.settings.batch, self.account.flops, self.machine.peak * self.machine.gpus)

    @property
    def kind(self) -> str:
        """What it trains on, if the shards have it: stage 1 on clips first of all."""
        return "video" if self.stage == "distill" else self.stage

    def metadata(self, kind: str) -> dict:
        """What the stage's files say of themselves, trained on samples of `kind`; see
        apt_core.files.contract.
        """
        return metadata(self.preset, self.stage, kind, self.recipe, self.seed)


def make_plan(
    preset: Preset,
    stage: str,
    out: Path,
    *,
    recipe: str | None = None,
    seed: int = 0,
    shards: Path | None = None,
) -> Plan:
    """The plan of a stage. preset: with its recipe applied (`Preset.with_recipe`); machine: this one, unless
    given.

    Raises AptError for a device, a backend or a compiler that is not there, a base that is missing or of
    another shape, and settings that do not go together.
    """
    device = pick_device(preset.train.device)
    parallel, attention = parallel_of(preset, device)
    base = out / "base.safetensors" if preset.files.base == RANDOM else find_base(preset)
    machine = this_machine(device, preset.train.compute)
    recipe = recipe or preset.variant
    account = check_fit(preset, stage, recipe, machine)
    return Plan(
        preset,
        stage,
        recipe,
        out,
        seed,
        shards or out / LATENTS,
        base,
        device,
        parallel,
        str(attention),
        machine,
        account,
    )


def final_file(out: Path, preset: Preset, stage: str) -> Path:
    """What a stage leaves: "distill", or stage 2's "image" or "video"."""
    return out / {"distill": DISTILLED, "image": IMAGE, "video": f"apt-{preset.name}.safetensors"}[stage]


def find_start(plan: Plan) -> Path:
    """The generator's first weights: what the stage before left in the run; the miniature may also start from
    its base.

    Raises AptError when no stage before has been run.
    """
    out, preset = plan.out, plan.preset
    before = [
        final_file(out, preset, stage)
        for stage in (("image", "distill") if plan.stage == "video" else ("distill",))
    ]
    if found := next((path for path in before if path.exists()), None):
        return found
    if preset.files.base != MINI:
        raise AptError(
            f"{out} holds no {before[-1].name}: run `distill {preset.name} --out {out}` first, or add --start-from FILE."
        )
    return plan.base


def metadata(preset: Preset, stage: str, kind: str, recipe: str, seed: int) -> dict:
    """What the files of a stage say of themselves, trained on samples of `kind`; see apt_core.files.contract."""
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
