"""`generate` under torchrun: rows of processes that make each clip together, and the same files as one
process.
"""

import os
import socket
from pathlib import Path

import av
import numpy as np
from layouts import TIMEOUT, WORKERS

from apt_core.engine.request import Request
from apt_core.loading.sources import SHIPPED
from trainer.checkpoints.generate import generate
from trainer.config import Files
from trainer.machines.distributed import connect

FILES = Files(vae="mini", text_encoder="mini")
REQUEST = Request(
    ["a red circle", "a blue square moving left", "a green triangle"], height=48, width=48, frames=5, fps=8
)


def work(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ["APT_CACHE"] = str(folder / "cache")
    import torch

    torch.set_num_threads(1)
    with connect("cpu", context_parallel=2) as world:
        written = generate(SHIPPED["base"], REQUEST, folder / "out", FILES, world)
        assert len(written) == (0 if world.cp_rank else 2 - world.dp_rank)


def read(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_two_rows_of_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [WORKERS.Process(target=work, args=(rank, port, tmp_path)) for rank in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
    assert [worker.exitcode for worker in workers] == [0] * 4
    alone = generate(SHIPPED["base"], REQUEST, tmp_path / "alone", FILES)
    assert len(alone) == 3 and sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        path.name for path in alone
    ]
    for path in alone:
        difference = np.abs(read(path).astype(int) - read(tmp_path / "out" / path.name))
        assert difference.mean() < 0.1, path.name
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 3
