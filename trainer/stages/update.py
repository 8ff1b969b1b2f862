"""One update of one network: gradients from many microbatches on many processes, looked at, then one step of
the optimizer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from apt_core.errors import NotFinite
from trainer.data.batches import Micro, Microbatches
from trainer.files import write_json
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Networks

Report = Callable[[int, int, dict[str, float]], None]
"""Told after each update: its number, how many there are, its figures."""


class Learner:
    """A network under training with its optimizer.

    name: what its metrics and files are called by; networks: those of the stage, whose gathered weights an
    update must not find stale; zero: see Parallel; notes: folder for the names of a batch that breaks the
    run. `steps` counts updates.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        networks: Networks,
        world: World,
        parallel: Parallel,
        zero: int,
        notes: Path | None = None,
    ) -> None:
        self.name, self.network, self.optimizer, self.networks = name, network, optimizer, networks
        self.world, self.parallel, self.zero, self.notes = world, parallel, zero, notes
        self._wrapped = [module for module in (network, networks.base) if isinstance(module, FSDPModule)]
        self.steps = 0
        self._names: list[list[str]] = []
        self._metrics: list[dict[str, Tensor]] = []
        self._allocate()

    def microbatches(self, batch: Microbatches, stop: Callable[[], None]) -> Iterator[Micro]:
        """The microbatches of one update; the backward pass of the last one brings all processes' gradients
        together.

        stop: called before each of them, by all processes alike; it may raise.
        """
        self._names, self._metrics = [], []
        self.networks.reshard()
        # Frozen while another network learns: gathered once, if it is to stay so.
        if isinstance(self.networks.partner, FSDPModule):
            self.networks.partner.set_reshard_after_backward(self.parallel.discriminator_zero == 3)
        for number, micro in enumerate(batch, start=1):
            stop()
            self._synchronise(last=number == len(batch))
            self._names.append(micro.names)
            yield micro

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Metrics (scalars on the device) of the microbatch that was yielded last, in terms that add up to
        the whole batch's mean.
        """
        self._metrics.append(metrics)

    def step(self) -> dict[str, float]:
        """Look at losses and gradients, then move the weights. Returns the metrics of the whole batch and the
        gradient's norm.

        Raises NotFinite when one of them is not finite, on all processes, before any weight has moved; what
        was in the batch is written down.
        """
        names = sorted({name for metrics in self._metrics for name in metrics})
        zero = torch.zeros((), device=self.world.device)
        # [microbatches, names]
        table = torch.stack(
            [torch.stack([metrics.get(name, zero).float() for name in names]) for metrics in self._metrics]
        )
        sums = torch.cat([table.sum(0) / self.world.size, self._squared_gradient()[None]])
        *values, squared = self.world.sum(sums).tolist()
        row = dict(zip(names, values)) | {f"{self.name}_gradient": squared**0.5}
        if not torch.isfinite(torch.tensor([*values, squared])).all():
            self._refuse(row, table)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return row

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimizer state by name, the live ones, sharded as they are."""
        self.networks.reshard()
        out = {f"weights/{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            out |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return out

    def loaded(self, steps: int) -> None:
        self.steps = steps

    def _allocate(self) -> None:
        """Optimizer state before the first step, so that there is something to save and to load into."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()

    def _synchronise(self, last: bool) -> None:
        for module in self._wrapped:
            module.set_requires_gradient_sync(last or self.parallel.sync_every_microbatch)
            module.set_reshard_after_backward(last or self.zero == 3)

    def _squared_gradient(self) -> Tensor:
        """This process's part of the squared norm of the gradient."""
        grads = [
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        grads = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
        norms = torch.stack(torch._foreach_norm([grad for grad in grads if grad.numel()])).double()
        return norms.square().sum().float()

    def _refuse(self, row: dict[str, float], table: Tensor) -> None:
        broken = ~torch.isfinite(table).all(dim=1).cpu()
        mine = {name for names, bad in zip(self._names, broken.tolist()) if bad for name in names}
        found = sorted(set().union(*self.world.gather(mine)))
        every = sorted(set().union(*self.world.gather({name for names in self._names for name in names})))
        wrong = next(name for name, value in row.items() if not abs(value) < float("inf"))
        samples = found or every
        where = ""
        if self.notes:
            path = self.notes / f"not-finite-{self.name}.json"
            if self.world.main:
                write_json(
                    path,
                    {
                        "update": self.steps + 1,
                        "metrics": {name: repr(value) for name, value in row.items()},
                        "samples": samples,
                    },
                )
            where = f", all in {path}"
        more = f" and {len(samples) - 3} more" if len(samples) > 3 else ""
        self.optimizer.zero_grad(set_to_none=True)
        raise NotFinite(
            f"{wrong} of the {self.name} became {row[wrong]} on {', '.join(samples[:3])}{more}{where}; "
            "no weight has moved: lower the learning rate or look for broken samples."
        )
