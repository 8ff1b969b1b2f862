"""The machine a run is on: the number of GPUs, their memory, and the speed of their matrix products."""

import math
import os
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from apt_core.engine.fast import check_device
from apt_core.errors import AptError

GIB = 2**30
SPARE = 0.94  # usable share of a device's memory: the rest goes to the CUDA context and fragmentation
LIBRARIES = ("comfyui-apt", "torch", "diffusers", "transformers", "safetensors", "av", "numpy", "scipy")
MODEL_SHARE = 0.5  # the share of the peak speed of matrix products that a training run is expected to reach


@dataclass(frozen=True)
class Machine:
    """gpus: how many the whole run has. memory: bytes of each. peak: FLOP/s of matrix products on each."""

    name: str
    gpus: int
    memory: float
    peak: float

    @property
    def usable(self) -> float:
        return self.memory * SPARE

    @property
    def speed(self) -> float:
        """FLOP/s on each GPU that a run is expected to reach."""
        return self.peak * MODEL_SHARE


def pick_device(name: str) -> str:
    """The device of this name; "auto" is "cuda" if there is a GPU, else "cpu". Raises AptError for a device
    that torch cannot use here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name


def check_launcher() -> None:
    """Raises AptError for options of `accelerate launch` that would have no effect here. With --multi_gpu it
    starts processes like torchrun; without it, it starts one process, whatever number it was given.
    """
    for name in ("fsdp", "deepspeed", "megatron_lm"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() in ("1", "true"):
            raise AptError(
                f"accelerate launch got --use_{name}, but this trainer does its own sharding: leave it out, "
                "and give --multi_gpu --num_processes N."
            )
    of_several = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if of_several and "RANK" not in os.environ:
        raise AptError(
            "accelerate launch was told to start several processes but started one, as it does with --cpu: "
            "give --multi_gpu --num_processes N instead (processes without a GPU use the CPU)."
        )


def this_machine(device: str, compute: str) -> Machine:
    """The machine as `device` describes it, with the peak measured in under a second. Under torchrun it has
    as many GPUs as there are processes, otherwise all GPUs that are here. compute: "bf16" or "fp32", the
    dtype of the peak. Raises AptError as `check_launcher` does.
    """
    check_launcher()
    processes = int(os.environ.get("WORLD_SIZE", 0))
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    if not device.startswith("cuda"):
        memory = memory_of_machine()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return Machine(
            f"CPU, {torch.get_num_threads()} threads",
            processes or 1,
            memory / local,
            matrix_peak("cpu", dtype, 512),
        )
    properties = torch.cuda.get_device_properties(device)
    gpus = processes or (1 if ":" in device else torch.cuda.device_count())
    # each process measures its own GPU
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    return Machine(properties.name, gpus, properties.total_memory, matrix_peak(device, dtype, 8192))


def memory_of_machine() -> int:
    """The machine's main memory in bytes."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil  # Windows

    return psutil.virtual_memory().total


def imagined(gpus: int, memory_gib: float, tflops: float) -> Machine:
    """A machine described by numbers instead of measured. Raises AptError for numbers that are not above
    0.
    """
    if not all(math.isfinite(value) and value > 0 for value in (gpus, memory_gib, tflops)):
        raise AptError(
            f"{gpus} GPUs of {memory_gib:g} GiB and {tflops:g} TFLOP/s are not a machine: give three numbers "
            "above 0."
        )
    return Machine("GPU as given", gpus, memory_gib * GIB, tflops * 1e12)


def matrix_peak(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of size x size matrix products, the best of five. On a CPU it measures one thread, by its CPU
    time, and multiplies by the number of threads, so that other programs do not lower the result.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    if device.startswith("cuda"):
        threads, clock, wait = 1, time.perf_counter, partial(torch.cuda.synchronize, device)
    else:
        threads, clock, wait = torch.get_num_threads(), time.thread_time, lambda: None
        torch.set_num_threads(1)
    best = float("inf")
    try:
        for _ in range(5):
            wait()
            started = clock()
            a @ b
            wait()
            best = min(best, clock() - started)
    finally:
        if not device.startswith("cuda"):
            torch.set_num_threads(threads)
    return threads * 2 * size**3 / best


def versions() -> dict[str, str]:
    """The versions of Python and the libraries that matter, the processor and the number of threads."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found | {"torch": torch.__version__}  # which names its build, as the package's version may not
