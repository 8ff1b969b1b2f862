"""Several processes on this machine that talk over gloo."""

import multiprocessing
import socket
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@contextmanager
def double():
    """fp64, although the models ask for fp32 inside: what is left of a difference is then a mistake, not
    rounding.
    """
    single = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


def start(size: int, function: Callable, *args, preload: Sequence[str] = ()) -> None:
    """Calls `function(group, *args)` in each of `size` processes, and waits. preload: what is imported once
    for all of them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(preload))
    mp.start_processes(_work, (size, port, function, args), nprocs=size, start_method="forkserver")


def _work(rank: int, size: int, port: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # of an exchange in which somebody is missing; on a busy machine that is whoever waits for a core
    timeout = timedelta(minutes=15)
    dist.init_process_group(
        "gloo", timeout=timeout, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    function(dist.group.WORLD, *args)
    dist.destroy_process_group()
