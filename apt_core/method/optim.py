"""RMSProp as the paper uses it (3.5): alpha 0.9, no weight decay, with Adam's bias correction as an
option.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import AptError

FOREACH_BYTES = 64 * 2**20
"""More weights than this in a process are stepped one tensor after the other: at a step torch's foreach
kernels hold one more copy of all second moments, 4 bytes a parameter.
"""


class RMSProp(torch.optim.RMSprop):
    """torch's RMSprop with an optional bias correction of the first steps, which makes it equal to
    Adam(beta1=0, beta2=alpha) to the last digit.

    The paper claims that the two are equivalent. Without the correction, step n is 1 / sqrt(1 - alpha^n)
    times as large: 3.16 times at the first step and some nine learning rates of extra travel in all, again
    after every restart. With it, lr and eps are both multiplied by sqrt(1 - alpha^n).
    All parameters of a group must be updated together. `group["lr"]` may be changed between steps (warm-up).
    """

    def __init__(
        self,
        params,
        lr: float,
        alpha: float = 0.9,
        eps: float = 1e-8,
        bias_correction: bool = True,
        foreach: bool | None = True,
    ):
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, foreach=foreach)
        self.bias_correction = bias_correction

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients in `.grad`. Returns the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settings = [(group["lr"], group["eps"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                correction = self._correction(group)
                group["lr"] = group["lr"] * correction
                group["eps"] = group["eps"] * correction
            super().step()
        finally:
            for group, (lr, eps) in zip(self.param_groups, settings):
                group["lr"], group["eps"] = lr, eps
        return loss

    def _correction(self, group: dict) -> float:
        if not self.bias_correction:
            return 1.0
        # torch's own step counter of each parameter. It lies on the CPU and in the state_dict, so a resumed
        # run continues to count.
        done = next(
            (float(self.state[p]["step"]) for p in group["params"] if p.grad is not None and self.state[p]),
            0.0,
        )
        return math.sqrt(1 - group["alpha"] ** (done + 1))


def make_rmsprop(
    params: Iterable[Tensor] | Iterable[dict],
    lr: float,
    alpha: float = 0.9,
    eps: float = 1e-8,
    bias_correction: bool = True,
) -> RMSProp:
    """RMSProp with foreach kernels over parameters or parameter groups. The defaults are the paper's (3.5);
    it does not state eps.

    Raises AptError for weights below fp32: at the paper's learning rate of 5e-6 an update is smaller than the
    spacing of bf16 numbers, and nothing would move.
    """
    optimizer = RMSProp(params, lr, alpha, eps, bias_correction)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise AptError(
                    f"weights of shape {tuple(p.shape)} are {p.dtype}: "
                    "train fp32 weights, and compute in lower precision only."
                )
    step_in_turn(optimizer)
    return optimizer


def step_in_turn(optimizer: torch.optim.Optimizer) -> None:
    """Turns torch's foreach kernels off in an optimizer of more than FOREACH_BYTES, of this process's shards.
    What a step does stays the same.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in weights]
    if sum(p.nbytes for p in local) > FOREACH_BYTES:
        for group in optimizer.param_groups:
            group["foreach"] = False
