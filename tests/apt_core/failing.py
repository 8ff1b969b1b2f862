"""A layer of the decoder that runs out of memory when it is told to."""

import torch


class Failing:
    """calls: numbers of the calls that fail. late: when the layer has computed, and exchanged what it had to.
    error: what it fails with.
    """

    def __init__(self, layer, calls, late: bool = False, error: Exception | None = None):
        self.layer, self.calls, self.late, self.count = layer, calls, late, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory.")

    def __call__(self, x, stream):
        if not x.is_meta:
            self.count += 1
        failing = self.count in self.calls and not x.is_meta
        result = None if failing and not self.late else self.layer(x, stream)
        if failing:
            raise self.error
        return result
