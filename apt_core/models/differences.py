"""What a role of a shared base changes beside its adapters, and does not train: differences of biases, norms,
modulation tables and whole matrices, as few-step LoRAs have them (`diff_b`, `diff`, `diff_m`).

The base keeps its weights. A module that a role changes reads them through a property, which adds the
difference while that role is in play.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

BETWEEN = "_changed_for_"


class Playing(Protocol):
    """role: the one that the model plays at this moment."""

    role: str | None


def set_differences(model: nn.Module, switch: Playing, name: str, changes: Mapping[str, Tensor]) -> None:
    """The role's differences by the names of the model's parameters, in their shapes, in the place of those
    that it had. They are buffers, in no state dict, which the model takes along to its device.
    """
    clear_differences(model, name)
    for key, change in changes.items():
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        module.register_buffer(f"{leaf}{BETWEEN}{name}", change, persistent=False)
        if not isinstance(getattr(type(module), leaf, None), property):
            module.__class__ = type(
                type(module).__name__, (type(module),), {leaf: _shifted(leaf, switch), "shifted": True}
            )


def differences(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The role's differences by the names of the model's parameters; live."""
    found = {}
    for owner, module in model.named_modules():
        for buffer, value in module._buffers.items():
            leaf, between, role = buffer.partition(BETWEEN)
            if between and role == name and value is not None:
                found[f"{owner}.{leaf}" if owner else leaf] = value
    return found


def clear_differences(model: nn.Module, name: str) -> None:
    """Take a role's differences away; a module without any is of its own class again."""
    for key in differences(model, name):
        owner, _, leaf = key.rpartition(".")
        module = model.get_submodule(owner)
        del module._buffers[f"{leaf}{BETWEEN}{name}"]
        module._non_persistent_buffers_set.discard(f"{leaf}{BETWEEN}{name}")
        while hasattr(type(module), "shifted") and not any(BETWEEN in buffer for buffer in module._buffers):
            module.__class__ = type(module).__bases__[0]


def add(value: Tensor, *changes: Tensor) -> Tensor:
    """The sum, made in fp32 (beside fp64 in fp64), in the value's dtype; the value itself where nothing is
    added.
    """
    if not changes:
        return value
    wide = value.to(torch.promote_types(value.dtype, changes[0].dtype))
    for change in changes:
        wide = wide + change
    return wide.to(value.dtype)


def _shifted(leaf: str, switch: Playing) -> property:
    def value(self: nn.Module) -> Tensor | None:
        own, change = self._parameters[leaf], self._buffers.get(f"{leaf}{BETWEEN}{switch.role}")
        if own is None or change is None or hasattr(own, "full_tensor"):
            return own  # a DTensor is FSDP2's, which asks for its parameter; a forward pass sees whole ones
        return add(own, change)

    return property(value)
