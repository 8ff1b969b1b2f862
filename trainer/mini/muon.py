"""The optimizer that the miniature's networks are pre-trained with."""

import torch


class Muon:
    """Muon for matrices and convolutions, AdamW at a tenth of its rate for gains, biases and tables.

    On the miniature's VAE Muon gets in 200 updates where Adam is after 1000. torch's own Muon takes matrices only, so
    each kernel is handed to it as a view `[out, in * k]`.
    """

    def __init__(self, parameters) -> None:
        parameters = list(parameters)
        self.kernels = [p for p in parameters if p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 3]
        self.views = [p.detach().flatten(1).requires_grad_() for p in self.kernels]
        taken = set(map(id, self.kernels))
        self._muon = torch.optim.Muon(self.views, momentum=0.9, weight_decay=0.0)
        self._adam = torch.optim.AdamW([p for p in parameters if id(p) not in taken], betas=(0.9, 0.99))

    def step(self, lr: float) -> None:
        """Update from the gradients in `.grad`, at rate `lr` (0.02 is a good one), and clear them."""
        for kernel, view in zip(self.kernels, self.views):
            view.grad = None if kernel.grad is None else kernel.grad.flatten(1)
            kernel.grad = None
        self._muon.param_groups[0]["lr"], self._adam.param_groups[0]["lr"] = lr, lr / 10
        self._muon.step()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
