"""The exponential moving average of a model's weights, in fp32. The paper takes its checkpoint from it, with
a decay of 0.995 (3.5).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import AptError

_foreach_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage] - it has no public name


class Ema:
    """An fp32 average of every floating-point entry of `model.state_dict()`, by name.

    Call `update(model)` once per GENERATOR update and never in discriminator steps; otherwise the average
    decays faster than asked for.
    For several decays use several objects. Buffers that the model does not save (Wan's rotary tables) are
    constants and are not averaged, so the names are exactly those of a checkpoint. On a sharded model
    (DTensor) each rank averages its own shard.

    decay: in [0, 1). warmup: in updates; a young average forgets faster: update n uses the decay `min(decay,
    n / (n + warmup))`. 0 is the plain decay (the paper mentions no warm-up). Raises AptError for a decay out
    of range, and for weights that are not fp32: a bf16 average with decay 0.995 does not move.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: float = 0):
        if not 0 <= decay < 1 or warmup < 0:
            raise AptError(
                f"EMA needs a decay in [0, 1) and a warm-up of at least 0, got {decay} and {warmup}."
            )
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        live = _floating(model)
        for name, value in live.items():
            if value.dtype != torch.float32:
                raise AptError(
                    f"EMA averages fp32 weights, but {name} is {value.dtype}: "
                    "keep the trained weights in fp32."
                )
        self.shadow = {name: value.clone() for name, value in live.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """`shadow <- d shadow + (1 - d) weights`, once per generator update. Raises AptError when the model's
        keys have changed.
        """
        live = _floating(model)
        _check_names(live, self.shadow)
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + self.warmup))
        names = list(self.shadow)
        _foreach_lerp_([_local(self.shadow[n]) for n in names], [_local(live[n]) for n in names], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the average into `model`'s weights, cast to their dtype. Raises AptError for keys or shapes
        that differ.
        """
        live = _floating(model)
        _check_names(live, self.shadow)
        _check_shapes(live, self.shadow)
        for name, value in self.shadow.items():
            live[name].copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Use the average as the model's weights inside a `with` block. The model's own weights come back at
        the end, also after an error.
        """
        own = {name: value.clone() for name, value in _floating(model).items()}
        try:
            self.copy_to(model)
            yield model
        finally:
            live = _floating(model)
            with torch.no_grad():
                for name, value in own.items():
                    live[name].copy_(value)

    def state_dict(self) -> dict:
        """`{"updates": int, "shadow": {name: tensor}}`. The tensors are the live ones, not copies. The decay
        and the warm-up are settings and not part of the state.
        """
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        """Load what `state_dict` returned. For missing or unknown keys and wrong shapes it raises AptError,
        which names them, and changes nothing.
        """
        _check_names(state, {"updates": 0, "shadow": 0})
        _check_names(state["shadow"], self.shadow)
        _check_shapes(state["shadow"], self.shadow)
        for name, value in self.shadow.items():
            value.copy_(state["shadow"][name])
        self.updates = int(state["updates"])


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by name; they share the model's memory."""
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def _local(value: Tensor) -> Tensor:
    # Foreach kernels refuse lists that mix DTensors (parameters) with plain tensors (buffers).
    local = getattr(value, "to_local", None)
    return value if local is None else local()


def _check_names(given: Mapping, expected: Mapping) -> None:
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise AptError(
            f"EMA keys do not match the model: missing {missing or 'none'}, unknown {unknown or 'none'}."
        )


def _check_shapes(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, value in expected.items():
        if given[name].shape != value.shape:
            raise AptError(
                f"EMA key {name} has shape {tuple(given[name].shape)}, expected {tuple(value.shape)}."
            )
