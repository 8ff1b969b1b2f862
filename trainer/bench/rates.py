"""Measure how fast a device multiplies and copies, how long work takes, and its peak memory."""

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
    """A device's measured speed.

    matrix: FLOP/s of large matrix products in the engine's dtype; matrix_fp8: the same in fp8, if requested.
    copy: bytes/s, read plus written, of a large copy.
    """

    matrix: float
    copy: float
    matrix_fp8: float | None = None

    def floor(self, flops: float, moved: float, eight: bool = False) -> float:
        """The fewest seconds for this work: products and memory both run at full speed, at the same time.

        eight: the products are in fp8.
        """
        return max(flops / (self.matrix_fp8 if eight else self.matrix), moved / self.copy)


def measure_rates(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> Rates:
    """Measure a device's rates. Raises AptError as `check_fp8` does."""
    cpu = device.type == "cpu"
    size = 1024 if cpu else 8192
    matrix, eight = matrix_peak(str(device), dtype, size), fp8_peak(device, size) if fp8 else None
    source = torch.empty(2**25 if cpu else 2**30, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = min(once(lambda: target.copy_(source), device) for _ in range(5))
    return Rates(matrix, 2 * source.numel() / seconds, eight)


def fp8_peak(device: torch.device, size: int) -> float:
    """FLOP/s of square matrix products in fp8, with the engine's kind of scales; the best of a few runs."""
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
    """Median seconds of `repeats` runs, after one that does not count."""
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
    """Bytes that some work needed on top of what was in use before it. Known once the work is done."""

    bytes = 0


@contextmanager
def peak_memory(device: torch.device, interval: float = 0.001) -> Iterator[Peak]:
    """Measure peak memory: on a GPU what torch allocated, on a CPU how much the process grew.

    On a CPU it looks every `interval` seconds.
    """
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
        ctypes.CDLL(None).malloc_trim(0)  # reused freed memory would not show
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
    """Resident memory of this process in bytes; 0 if the system does not tell."""
    path = Path("/proc/self/statm")
    return (
        int(path.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
    )
