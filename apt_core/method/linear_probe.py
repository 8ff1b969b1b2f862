"""A linear probe (5.5): how much of a result one linear layer can already read from inner tokens."""

import math

import torch
from torch import Tensor

from ..errors import AptError


class Ridge:
    """Exact ridge regression of k targets on d inputs, with a bias. It only keeps sums over rows, so there is
    no learning rate and the rows may come in portions of any size.

    The sums are fp64 and centred near the mean of the first portion, because tokens far from zero would lose
    digits.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._near: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: inputs [n, d], y: targets [n, k]."""
        x, y = x.double(), y.double()
        if self._near is None:
            self._near = x.mean(0), y.mean(0)
            self._xx, self._xy = x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1], y.shape[1])
            self._x, self._y = torch.zeros_like(self._near[0]), torch.zeros_like(self._near[1])
        x, y = x - self._near[0], y - self._near[1]
        self.rows += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def solve(self, penalty: float = 1e-6) -> tuple[Tensor, Tensor]:
        """The weight [d, k] and bias [k], fp64, that minimise `sum |x W + b - y|^2 + p |W|^2`, where p is
        `penalty` times the inputs' mean sum of squares.

        The bias is not penalised. Raises AptError when no rows were added or the penalty is not above 0.
        """
        if self._near is None or not self.rows or not penalty > 0:
            raise AptError(
                f"a probe needs samples and a penalty above 0, but has {self.rows} rows and {penalty:g}."
            )
        x, y = self._x / self.rows, self._y / self.rows
        squares = self._xx - self.rows * torch.outer(x, x)
        products = self._xy - self.rows * torch.outer(x, y)
        mean = squares.diagonal().mean()
        squares.diagonal().add_(penalty * mean if mean > 0 else 1.0)  # inputs that never change tell nothing
        weight = torch.linalg.solve(squares, products)
        return weight, self._near[1] + y - (self._near[0] + x) @ weight


def band_energies(x: Tensor, cut: float = 1 / 3) -> tuple[float, float]:
    """The sum of squares of x [..., H, W] in its low and in its high spatial frequencies.

    Uses an orthonormal cosine transform (DCT-II) of rows and columns, so the two add up to the sum of squares
    of x. Low means below `cut` of the highest frequency that a row can hold, in any direction.
    """
    height, width = x.shape[-2:]
    rows, columns = _cosines(height).to(x.device), _cosines(width).to(x.device)
    energy = (rows @ x.double() @ columns.T).square()
    radius = torch.hypot((torch.arange(height) / height)[:, None], (torch.arange(width) / width)[None]).to(
        x.device
    )
    low = energy[..., radius < cut].sum()
    return float(low), float(energy.sum() - low)


def _cosines(n: int) -> Tensor:
    """The orthonormal DCT-II of n values as a matrix, [frequency, position]."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    table = (math.pi / n * (i + 0.5) * k).cos() * math.sqrt(2 / n)
    table[0] /= math.sqrt(2)
    return table
