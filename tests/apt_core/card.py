"""A GPU for tests on a CPU: tensors compute as ever, but each is known to lie on the card or not, and the two
do not mix.

What is known is known of a tensor's memory, so that `.data`, views, `.to` of modules and orphaned buffers
behave as on a real card. Within `Card(monkeypatch)` torch answers as on a machine with one, as far as the
engine asks. `held()` and `peak` are bytes on it.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
# a real card takes the CPU's tensors there, too
ANYWHERE = {
    "__set__",
    "copy_",
    "__getitem__",
    "__setitem__",
    "_has_compatible_shallow_copy_type",
}


class Queue:
    """A CUDA stream or event of a card that is always done."""

    def __init__(self, *_):
        pass

    def __getattr__(self, name: str):
        return lambda *_: self


class Card(TorchFunctionMode):
    def __init__(self, monkeypatch, capacity: int = 2**50):
        super().__init__()
        self.capacity, self.peak, self._memory = capacity, 0, []
        fakes = {
            "Stream": Queue,
            "current_stream": Queue,
            "stream": lambda *_: nullcontext(),
            "empty_cache": lambda: None,
        }
        fakes |= {
            "mem_get_info": lambda *_: (self.capacity - self.held(), self.capacity),
            "get_device_capability": lambda *_: (9, 0),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def held(self) -> int:
        self._memory = [(memory, size) for memory, size in self._memory if not memory.expired()]
        return sum(size for _, size in self._memory)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if function == Tensor.device.__get__:
            return CARD if on_card(args[0]) else function(*args)
        if function == Tensor.is_cuda.__get__:
            return on_card(args[0])
        if name == "numpy" and on_card(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "cpu":
            return self._moved(args[0], CPU, None, False)
        if name == "to":
            return self._moved(args[0], *_target(args[0], args[1:], kwargs))
        if name == "pin_memory":
            return args[0].clone()
        if name == "record_stream":
            return None
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = CPU if _is_card(device) else device
        places = {on_card(value) for value in given if value.ndim}
        if len(places) > 1 and name not in ANYWHERE:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name})"
            )
        out = function(*args, **kwargs)
        known = {value.untyped_storage()._cdata for value in given}
        if _is_card(device) if device is not None else any(on_card(value) for value in given):
            for value in tree_leaves(out):
                if isinstance(value, Tensor) and value.untyped_storage()._cdata not in known:
                    self._mark(value)
        return out

    def _moved(
        self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None, copy: bool, **options
    ) -> Tensor:
        if on_card(tensor) == _is_card(device) and not copy and dtype in (None, tensor.dtype):
            return tensor.to(**options) if options else tensor
        moved = tensor.detach().to(dtype or tensor.dtype, copy=True, **options)
        return self._mark(moved) if _is_card(device) else moved

    def _mark(self, tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if not on_card(tensor):
            memory.on_card = True
            self._memory.append((StorageWeakRef(memory), memory.nbytes()))
            self.peak = max(self.peak, self.held())
        return tensor


def on_card(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided and not tensor.is_meta and hasattr(tensor.untyped_storage(), "on_card")
    )


def _is_card(device) -> bool:
    return torch.device(device).type == "cuda"


def _target(tensor: Tensor, args: tuple, kwargs: dict) -> tuple:
    """(device, dtype, copy) of `tensor.to(*args, **kwargs)`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in args:
        if isinstance(value, Tensor):
            device, dtype = CARD if on_card(value) else CPU, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = value
    return (CARD if on_card(tensor) else CPU) if device is None else device, dtype, kwargs.get("copy", False)
