"""The processes of a run, as one of them sees it: its device, its share of the samples, and the processes
that share its samples in context parallelism.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from apt_core.errors import AptError
from trainer.machines.machine import check_launcher
from trainer.machines.pulse import Pulse, limit, open_pulse


@dataclass(frozen=True)
class World:
    """All processes of a run, in a grid of `dp` x `cp`. Each row of the grid sees different samples (data
    parallelism); the `cp` processes of one row see the same samples and divide their tokens (context
    parallelism).

    mesh: the grid, with dimensions (dp, cp). everyone: the same processes in one dimension; weights are
    sharded over it. Both are None for a single process without sharding.
    control: a process group on the CPU, for messages about the run itself.
    pulse: watches whether the other processes still answer; None if there are none.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    everyone: DeviceMesh | None = None
    control: dist.ProcessGroup | None = None
    pulse: Pulse | None = None

    @property
    def size(self) -> int:
        return self.everyone.size() if self.everyone else 1

    @property
    def rank(self) -> int:
        return self.everyone.get_rank() if self.everyone else 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints messages."""
        return self.rank == 0

    @property
    def dp(self) -> int:
        return self.mesh["dp"].size() if self.mesh else 1

    @property
    def dp_rank(self) -> int:
        return self.mesh["dp"].get_local_rank() if self.mesh else 0

    @property
    def cp(self) -> int:
        return self.mesh["cp"].size() if self.mesh else 1

    @property
    def cp_rank(self) -> int:
        return self.mesh["cp"].get_local_rank() if self.mesh else 0

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.mesh["cp"].get_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, including each process of a context-parallel group. All
        processes must call this together.
        """
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.everyone.get_group())
        return values

    def largest(self, *values: float) -> list[float]:
        """For each value, the largest one that any process gave. All processes must call this together."""
        if self.size == 1:
            return list(values)
        votes = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control)
        return votes.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks. For small values only; all processes must
        call this together.
        """
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, count: int) -> range:
        """The numbers of the samples, out of `count`, that this process works on. Every process gets equally
        many, because all must call a sharded network equally often. To fill up, the last numbers may be
        `count` or more; they stand for the samples from 0 on.
        """
        return range(self.dp_rank, -(-count // self.dp) * self.dp, self.dp)

    def gather_rows(self, mine: Tensor, count: int) -> Tensor:
        """Collect the rows of all samples: `mine` `[n, ...]` has one row per number in `share(count)`, and
        every process gets `[count, ...]` in the order of the numbers.
        """
        by_row = self.gather(mine.cpu())[:: self.cp]  # processes of one context-parallel group have the same
        return torch.stack(by_row, dim=1).flatten(0, 1)[:count]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def connect(
    device: str = "cpu",
    *,
    context_parallel: int = 1,
    sharded: bool = False,
    patience: timedelta = timedelta(minutes=30),
) -> Iterator[World]:
    """Join the processes that torchrun (or SLURM through it) started, and leave them at the end of the block.
    Without torchrun the run has this one process.

    device: "cpu", "cuda" (each process uses the GPU of its local rank) or one GPU, such as "cuda:1".
    context_parallel: how many processes divide the tokens of one sample.
    sharded: use FSDP2 (fp32 masters, bf16 compute) even for a single process.
    patience: how long processes wait for each other. A process that no longer answers ends the run sooner,
        see trainer.machines.pulse.

    Raises AptError for a device that torch cannot use, for a number of processes that is no multiple of
    `context_parallel`, and for options of `accelerate launch` that would have no effect here.
    """
    check_launcher()
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    size = int(os.environ["WORLD_SIZE"]) if started else 1
    if size % context_parallel:
        raise AptError(
            f"{size} processes cannot form groups of {context_parallel} for context parallelism: use a "
            f"multiple of {context_parallel}."
        )
    watched = limit()
    place = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if not started and not sharded:
        yield World(place)
        return
    backend = (
        "gloo"
        if place.type == "cpu"
        else f"cpu:gloo,{place.type}:{dist.get_default_backend_for_device(place)}"
    )
    alone = {} if started else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=patience, **alone)
    pulse, problem = open_pulse(dist.get_rank(), size, watched), None
    try:
        mesh = init_device_mesh(
            place.type, (size // context_parallel, context_parallel), mesh_dim_names=("dp", "cp")
        )
        everyone = init_device_mesh(place.type, (size,))
        yield World(place, mesh, everyone, dist.new_group(backend="gloo", timeout=patience), pulse)
    except BaseException as error:
        problem = error
        if pulse:
            pulse.explain(error)
        raise
    finally:
        if pulse:
            pulse.leave(problem)
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    try:
        device = torch.device(name)
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, local_rank)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):  # AssertionError: torch without CUDA
        raise AptError(
            f"torch cannot use the device {name!r} here; use cpu, or install a torch for that device."
        ) from None
    return device
