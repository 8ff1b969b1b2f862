"""How fast this device multiplies and copies, measured; how long its work takes, and how much memory at its peak."""

import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.machine import matrix_peak


@dataclass(frozen=True)
class Rates:
    """matrix: FLOP/s of large products in the dtype that the engine computes in; copy: bytes/s read and written by a large copy."""

    matrix: float
    copy: float

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that such work takes at least, when products and memory both run at their best, and at the same time."""
        return max(flops / self.matrix, moved / self.copy)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    cpu = device.type == "cpu"
    matrix = matrix_peak(str(device), dtype, 1024 if cpu else 8192)
    source = torch.empty(2**25 if cpu else 2**30, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = min(_once(lambda: target.copy_(source), device) for _ in range(5))
    return Rates(matrix, 2 * source.numel() / seconds)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of `repeats` runs, after one that does not count."""
    _once(work, device)
    return statistics.median(_once(work, device) for _ in range(repeats))


def _once(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Bytes that a piece of work needed beyond what was there before it; filled in when it is over."""

    bytes = 0


@contextmanager
def peak_memory(device: torch.device, interval: float = 0.001) -> Iterator[Peak]:
    """On a GPU what torch allocated, on a CPU how much the process grew, looked at every `interval` seconds."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, unseen
    before, done = _resident(), threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak.bytes = max(peak.bytes, _resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        peak.bytes = max(peak.bytes, _resident() - before)
        done.set()
        thread.join()


def _resident() -> int:
    """Bytes of this process in memory; where the system does not tell, none."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0
