"""Recognise out of memory in all its forms, and let torch compile code for many sizes."""

import torch

SAYINGS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "unable to find an engine")
"""The last is cuDNN's when no convolution's workspace fits."""
GRAPHS = 64


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this error means out of memory, from torch itself or from a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or any(saying in str(error) for saying in SAYINGS)


def allow_many_graphs() -> None:
    """Let torch.compile keep graphs for more sizes than its default of 8, after which it gives up."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
