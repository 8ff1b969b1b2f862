"""What every stage is given beside its settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from apt_core.loading.checkpoint import load_transformer
from trainer.data.batches import Batches
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.run.state import Keep
from trainer.stages.networks import Load, Lora, Networks
from trainer.stages.samples import Samples
from trainer.stages.update import Learner, Report


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a stage trains on, how its processes share the work, and what it writes.

    out: the file for the result, an EMA of the generator. metadata: what that file says of itself, see
        apt_core.files.contract.
    report: called after each update.
    world, parallel: the processes of the run and how they share the work. Every process makes the same call.
    lora: train adapters (and the discriminator's heads) over one frozen base, instead of whole networks.
    ema_decays: decays of additional averages; each is written to its own file beside `out`.
    keep: where training states are saved. With `resume`, training continues from the newest one.
    samples: writes pictures during training.
    load(path, device=...): reads a network; with device "meta" it builds the network without weights.
    """

    batches: Batches
    out: Path
    seed: int
    metadata: dict
    report: Report
    world: World = World()
    parallel: Parallel = Parallel()
    lora: Lora | None = None
    ema_decays: Sequence[float] = ()
    keep: Keep | None = None
    resume: bool = True
    samples: Samples | None = None
    load: Load = load_transformer

    def learner(
        self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer, networks: Networks, zero: int
    ) -> Learner:
        """See Learner; notes on a broken batch go beside the training states."""
        notes = self.keep and self.keep.folder
        return Learner(name, network, optimizer, networks, self.world, self.parallel, zero, notes)
