"""The networks of each stage, whole or as LoRA adapters over one shared base, placed on a run's processes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import Checkpoint, read_checkpoint
from apt_core.files.contract import as_lora, metadata_strings
from apt_core.files.tensorfile import write_tensors
from apt_core.loading.backbones import kind_of
from apt_core.method.discriminator import Discriminator
from apt_core.method.ema import Ema
from apt_core.models.differences import differences
from apt_core.models.lora import Role, add_adapters, difference_state, load_lora, lora_state, role
from apt_core.models.lora_files import LoraFile, merge, read_lora_for
from apt_core.models.wan import PAPER_FRACTIONS
from trainer.config import Train
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel, place, reshard, shard_heads, whole_state

Load = Callable[..., nn.Module]


@dataclass(frozen=True)
class Lora:
    """Adapters on the linear layers of the base's blocks, scaled by alpha / rank (by 1 if alpha is None)."""

    rank: int = 64
    alpha: float | None = None


def lora_of(train: Train) -> Lora | None:
    """The adapters that a run with these settings trains; None if it trains whole networks."""
    return Lora(train.lora_rank, train.lora_alpha) if train.mode == "lora" else None


@dataclass(frozen=True)
class Start:
    """A generator's first weights, as their header shows them.

    path: of a whole model or of a LoRA over the base; the base's own path to start as the base is. lora: what
    the LoRA changes; None for a whole model. note: what the user should know of the times that it was made
    for. frozen: bytes of what it changes beside the layers that adapters adapt, for each network that starts
    from it; 0 where whole networks train. They are not sharded.
    """

    path: Path
    lora: LoraFile | None = None
    note: str | None = None
    frozen: int = 0

    def under_adapters(self, base: object) -> LoraFile | None:
        """The LoRA that adapters over `base` continue from; None, for fresh ones, if this is the base itself.
        Raises AptError for any other whole model.
        """
        if self.lora is None and self.path != base:
            raise AptError(
                f"{self.path} is a whole model, which adapters over {base} cannot hold: "
                f"train with mode=full, or give base={self.path} too, to train a LoRA over that model."
            )
        return self.lora


def read_start(file: Checkpoint, base: object, empty: Callable[[], nn.Module], lora: Lora | None) -> Start:
    """The start that a checkpoint is, when it fits; reads no weight.

    base: what the messages call the base; empty: makes it on "meta"; lora: the adapters that will train, None
    for whole networks.
    Raises AptError, with what would do, for the LoRA of another base, and with `lora` for what its adapters
    cannot hold: a whole model, or a LoRA of a higher rank.
    """
    if not file.is_lora:
        start = Start(file.path)
        if lora is not None:
            start.under_adapters(base)
        return start
    model = empty()
    found = read_lora_for(file.path, model, base, file.header)
    if lora is None:
        return Start(file.path, found)
    load_lora(found, add_adapters(model, ("generator",), lora.rank, lora.alpha), "generator")
    return Start(
        file.path, found, frozen=sum(value.nbytes for value in differences(model, "generator").values())
    )


@dataclass(frozen=True)
class Networks:
    """The networks of one stage.

    generator: the network that learns to sample in one step (in stage 1 it is called the student).
    partner: the network it learns from: stage 1's teacher or stage 2's discriminator.
    target: stage 1's target network, if it is another one than the student.
    base: the frozen network under all networks that are adapters.
    fake: the fake score of distribution matching.
    """

    generator: nn.Module
    partner: nn.Module
    target: nn.Module | None = None
    base: nn.Module | None = None
    fake: nn.Module | None = None

    @property
    def discriminator(self) -> nn.Module:
        """Stage 2's partner."""
        return self.partner

    @property
    def teacher(self) -> nn.Module:
        """Stage 1's partner."""
        return self.partner

    def reshard(self) -> None:
        """`trainer.machines.parallel.reshard` for all of these networks."""
        reshard(
            *(
                network
                for network in (self.generator, self.partner, self.target, self.base)
                if network is not None
            )
        )

    def differences(self) -> dict[str, Tensor]:
        """What the generator has of its start beside adapters, as the tensors of a LoRA file; {} mostly."""
        return difference_state(self.base, "generator") if isinstance(self.generator, Role) else {}

    def differences_digest(self) -> str | None:
        """Of `differences`, None where there are none: a run is another one with others."""
        if not (found := self.differences()):
            return None
        digest = hashlib.sha256()
        for name, value in sorted(found.items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: Path, average: Ema, metadata: Mapping, world: World) -> None:
        """Write the generator with its averaged weights to one file: a whole model, or a LoRA file in LoRA
        mode. The main process writes; all processes must call this together.
        """
        metadata = {**metadata, "ema": average.decay, "ema_warmup": average.warmup}
        if not isinstance(self.generator, Role):
            state = whole_state(average.shadow, world)
            if world.main:
                kind_of(self.generator).save(path, state, self.generator.config, metadata, torch.float32)
        else:
            self.reshard()
            with average.applied(self.generator):
                state = {
                    name: value.detach().to("cpu", copy=True)
                    for name, value in lora_state(self.base, "generator").items()
                }
            if world.main:
                rank = next(iter(state.values())).shape[0]
                write_tensors(path, state, metadata_strings(path, as_lora(metadata, rank)))
        world.barrier()


def adversarial_networks(
    start: Start | Path,
    base: Path,
    load: Load,
    world: World,
    parallel: Parallel,
    lora: Lora | None = None,
    head_width: int | None = None,
    *,
    taps: Sequence[float] = PAPER_FRACTIONS,
    discriminator_start: str = "base",
    train_backbone: bool = True,
) -> Networks:
    """The generator with the weights of `start`, and the discriminator over the weights in `base`. The
    discriminator's heads draw their first weights from torch's random state.

    start: a whole model, or a LoRA over `base`, which is merged into it. With `lora`: `base` itself, or a
        LoRA over it of at most that rank. The adapters continue from it, and what else it changes stays as it
        is (apt_core.models.lora.load_lora). A path is looked at here, before a weight is read.
    head_width: width of the heads' attention, a multiple of the base's attention head; by default the base's
        own width.
    taps, discriminator_start, train_backbone: see trainer.config.Adversarial. With `lora` the last two are
        about the discriminator's adapters: whether they start from those in `start`, and whether they train.

    Raises AptError for files that do not fit each other, and when the base has too few blocks for the taps.
    """
    if isinstance(start, Path):  # from a caller without a plan
        empty = partial(load, base, device=torch.device("meta"))
        start = Start(base) if start == base else read_start(read_checkpoint(start), base, empty, lora)
    first = start if discriminator_start == "start" else Start(base)

    def load_discriminator(device: torch.device) -> Discriminator:
        backbone = _load_start(first, base, load, device)
        if not train_backbone:
            backbone.requires_grad_(False)
        return make_discriminator(backbone, taps, head_width).to(device)

    if lora is None:
        generator = place(
            lambda device: _load_start(start, base, load, device), world, parallel, parallel.generator_zero
        )
        discriminator = place(load_discriminator, world, parallel, parallel.discriminator_zero)
        return Networks(generator, discriminator)
    starts = {"generator": start.under_adapters(base), "discriminator": first.under_adapters(base)}
    shared = _shared_base(
        base, starts, load, world, parallel, lora, () if train_backbone else ("discriminator",)
    )
    discriminator = make_discriminator(role(shared, "discriminator"), taps, head_width).to(world.device)
    shard_heads(discriminator, world, parallel)
    return Networks(role(shared, "generator"), discriminator, base=shared)


def make_discriminator(backbone: nn.Module, taps: Sequence[float], head_width: int | None) -> Discriminator:
    """A discriminator over this backbone. For the arguments see `adversarial_networks`."""
    heads = head_width and head_width // backbone.config.attention_head_dim
    return Discriminator(backbone, taps, num_heads=heads, inner_dim=head_width)


def distillation_networks(
    base: Path, load: Load, world: World, parallel: Parallel, lora: Lora | None, target: bool
) -> Networks:
    """The student, its frozen teacher and, if `target`, the target network; all start as `base`."""
    if lora is None:
        frozen = [
            place(lambda device: load(base, device=device).requires_grad_(False), world, parallel)
            for _ in range(2 if target else 1)
        ]
        return Networks(
            place(lambda device: load(base, device=device), world, parallel, parallel.generator_zero), *frozen
        )
    starts = dict.fromkeys(("generator", "target") if target else ("generator",))
    shared = _shared_base(base, starts, load, world, parallel, lora, ("target",) if target else ())
    still = role(shared, "target") if target else None
    return Networks(role(shared, "generator"), role(shared, None), still, shared)


def matching_networks(
    base: Path, load: Load, world: World, parallel: Parallel, lora: Lora | None, fake: Lora
) -> Networks:
    """The generator of distribution matching, whole or with `lora` as adapters; its real score, the frozen
    base as it is; and its fake score, adapters on that base of the generator's rank, or of `fake`'s where the
    generator is whole. All from `base`.
    """
    roles = ("fake",) if lora is None else ("generator", "fake")
    shared = _shared_base(base, dict.fromkeys(roles), load, world, parallel, lora or fake, ())
    if lora is None:
        generator = place(lambda device: load(base, device=device), world, parallel, parallel.generator_zero)
    else:
        generator = role(shared, "generator")
    return Networks(generator, role(shared, None), base=shared, fake=role(shared, "fake"))


def _load_start(start: Start, base: Path, load: Load, device: torch.device) -> nn.Module:
    """A whole model to train on from: the start, or what its LoRA makes of the base, summed in fp32."""
    if start.lora is None:
        return load(start.path, device=device)
    model = load(base, device=device)
    return model if device.type == "meta" else merge(model, start.lora.load())


def _shared_base(
    base: Path,
    starts: Mapping[str, LoraFile | None],
    load: Load,
    world: World,
    parallel: Parallel,
    lora: Lora,
    still: Sequence[str],
) -> nn.Module:
    """The frozen base in the dtype it computes in, with one set of adapters per role. The adapters, and the
    weights that `precision.stays_fp32` names, are fp32.

    starts: for each role the LoRA to start from, None for fresh adapters. still: roles that are not trained.
    """
    dtype = torch.bfloat16 if parallel.compute == "bf16" else torch.float32

    def make(device: torch.device) -> nn.Module:
        model = load(base, device=device, dtype=dtype)
        add_adapters(model, tuple(starts), lora.rank, lora.alpha)
        for name, start in starts.items():
            if start is not None:
                load_lora(start, model, name)
        for name in still:  # before sharding: gathered copies keep the requires_grad they were made with
            role(model, name).requires_grad_(False)
        return model

    # Only the main process draws the adapters, but every process draws the heads next, and from the same
    # random state: so drawing the adapters must leave no trace in it.
    with torch.random.fork_rng(devices=[]):
        return place(make, world, parallel, parallel.generator_zero)
