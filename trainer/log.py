"""The record of a training run: one row of numbers an update."""

import math

from torch import Tensor

from apt_core.errors import AptError


class History:
    """Rows of metrics. Tensors are read off the device when a row is finished, once an update."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Start a new row. Call between backward and optimizer step: a loss that is not finite stops the run before any weight moves.

        Raises AptError naming the first such metric and the update.
        """
        self._rows.append({})
        self.extend(metrics)

    def extend(self, metrics: dict[str, Tensor]) -> None:
        """Add to the newest row; same check."""
        for name, value in metrics.items():
            number = float(value)
            if not math.isfinite(number):
                raise AptError(f"{name} became {number} in update {len(self._rows)}; lower the learning rate or look for broken samples.")
            self._rows[-1][name] = number

    def last(self) -> dict[str, float]:
        return self._rows[-1]

    def rows(self) -> list[dict[str, float]]:
        return self._rows
