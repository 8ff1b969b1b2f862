"""How fast this device multiplies and copies, measured; how long its work takes, and how much memory at its
peak.
"""

import ctypes
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_core.engine.fp8 import check_fp8, quantise
from trainer.machines.machine import matrix_peak


@dataclass(frozen=True)
class Rates:
    """matrix: FLOP/s of large products in the dtype that the engine computes in; copy: bytes/s read and
    written by a large copy.

    matrix_fp8: as `matrix`, in fp8, where that was asked for.
    """

    matrix: float
    copy: float
    matrix_fp8: float | None = None

    def floor(self, flops: float, moved: float, eight: bool = False) -> float:
        """Seconds that such work takes at least, when products and memory both run at their best, and at the
        same time. eight: products in fp8.
        """
        return max(flops / (self.matrix_fp8 if eight else self.matrix), moved / self.copy)


def measure_rates(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> Rates:
    """Raises AptError as `check_fp8` does."""
    cpu = device.type == "cpu"
    size = 1024 if cpu else 8192
    matrix, eight = matrix_peak(str(device), dtype, size), fp8_peak(device, size) if fp8 else None
    source = torch.empty(2**25 if cpu else 2**30, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = min(once(lambda: target.copy_(source), device) for _ in range(5))
    return Rates(matrix, 2 * source.numel() / seconds, eight)


def fp8_peak(device: torch.device, size: int) -> float:
    """FLOP/s of square products in fp8 with the scales that the engine uses, the best of a few."""
    rowwise = check_fp8(device)
    (a, a_scale), (b, b_scale) = (quantise(torch.randn(size, size, device=device), rowwise) for _ in range(2))
    b_scale = b_scale.t().contiguous() if rowwise else b_scale

    def product():
        torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_scale,
            scale_b=b_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=device.type == "cuda",
        )

    return 2 * size**3 / min(once(product, device) for _ in range(5))


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of `repeats` runs, after one that does not count."""
    once(work, device)
    return statistics.median(once(work, device) for _ in range(repeats))


def once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
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
    return (
        int(path.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
    )
