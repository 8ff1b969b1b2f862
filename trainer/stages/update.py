"""One update of one network: sum the gradients of all microbatches and processes, check them, then take one
optimizer step.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from apt_core.errors import NotFinite
from apt_core.files.jsonfile import write_json
from trainer.data.batches import Micro, Microbatches
from trainer.machines.distributed import World
from trainer.machines.parallel import Parallel
from trainer.stages.networks import Networks

Report = Callable[[int, int, dict[str, float]], None]
"""Called after each update with its number, the number of all updates, and its metrics."""


class Learner:
    """A network that is being trained, with its optimizer. `steps` counts its updates.

    name: used in the names of its metrics and files.
    networks: all networks of the stage. They drop their gathered weights before an update, which would
        otherwise compute with outdated ones.
    zero: the ZeRO stage, 2 or 3, see Parallel.
    notes: a folder; if the run breaks on a batch, the names of its samples are written there.
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
        """The microbatches of one update. Gradients are reduced over all processes in the backward pass of
        the last one.

        stop: every process calls it before each microbatch; it may raise to end the run.
        """
        self._names, self._metrics = [], []
        self.networks.reshard()
        # While this network learns, the other one is frozen: with ZeRO-2 it is gathered once and kept.
        if isinstance(self.networks.partner, FSDPModule):
            self.networks.partner.set_reshard_after_backward(self.parallel.discriminator_zero == 3)
        for number, micro in enumerate(batch, start=1):
            stop()
            self._synchronise(last=number == len(batch))
            self._names.append(micro.names)
            yield micro

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the metrics (scalars on the device) of the last microbatch. Scale them by the microbatch's
        share, so that they add up to the mean over the whole batch.
        """
        self._metrics.append(metrics)

    def step(self) -> dict[str, float]:
        """Check the losses and gradients, then update the weights. Returns the metrics of the whole batch
        and the norm of the gradient.

        Raises NotFinite when one of them is not finite: on all processes, and before any weight has changed.
        The names of the batch's samples are then written to `notes`.
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
        """Weights and optimizer state by name: the live tensors, not copies, and sharded if they are."""
        self.networks.reshard()
        out = {f"weights/{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            out |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return out

    def loaded(self, steps: int) -> None:
        self.steps = steps

    def _allocate(self) -> None:
        """Create the optimizer's state before the first step, so that it can be saved and loaded."""
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
        """The squared norm of the part of the gradient that this process holds."""
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
            where = f" (all of them are in {path})"
        more = f" and {len(samples) - 3} more" if len(samples) > 3 else ""
        self.optimizer.zero_grad(set_to_none=True)
        raise NotFinite(
            f"{wrong} of the {self.name} became {row[wrong]} on {', '.join(samples[:3])}{more}{where}; "
            "no weight has changed: lower the learning rate or look for broken samples."
        )
