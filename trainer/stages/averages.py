"""Several EMAs of one network at once, because the best decay is only known after the run (section 5.3)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from apt_core.method.ema import Ema
from trainer.machines.distributed import World
from trainer.stages.networks import Networks


class Averages:
    """fp32 averages of the generator (or student), sharded like it. The average with the first decay is the
    main one: it makes the samples and becomes the result.

    warmup: the same for all averages, see apt_core.method.ema.Ema; 0 is the paper's plain decay.
    """

    def __init__(self, networks: Networks, decays: Sequence[float], warmup: float) -> None:
        self.networks, self.network, self.steps = networks, networks.generator, 0
        self.emas = {decay: Ema(self.network, decay, warmup) for decay in decays}

    @property
    def main(self) -> Ema:
        return next(iter(self.emas.values()))

    def update(self) -> None:
        """Call once after each update of the network."""
        self.networks.reshard()
        self.steps += 1
        for ema in self.emas.values():
            ema.update(self.network)

    def copy_to(self, network: nn.Module) -> None:
        """Copy the main average into another network of the same shape."""
        self.networks.reshard()
        self.main.copy_to(network)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Inside the block, the network has the main average as its weights."""
        self.networks.reshard()
        with self.main.applied(self.network):
            yield self.network
            self.networks.reshard()

    def save(self, out: Path, metadata: Mapping, world: World) -> None:
        """Write the main average to `out`, and the others beside it with the decay in the file's name."""
        self.networks.save(out, self.main, metadata, world)
        for decay, ema in list(self.emas.items())[1:]:
            self.networks.save(out.with_name(f"{out.stem}-ema{decay:g}{out.suffix}"), ema, metadata, world)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{decay:g}/{name}": value
            for decay, ema in self.emas.items()
            for name, value in ema.shadow.items()
        }

    def loaded(self, steps: int) -> None:
        self.steps = steps
        for ema in self.emas.values():
            ema.updates = steps
