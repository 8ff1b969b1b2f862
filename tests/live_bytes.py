"""What torch holds in memory while a piece of code runs, on any device: bytes of storages that it made."""

import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live: ...`, then `live.peak`: the most at any time. Workspaces inside of an
    operation are not seen.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.most = 0  # never below what is alive; counted anew where it would be the peak
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.sizes: dict[int, int] = {}

    @property
    def now(self) -> int:
        """Storages as large as they are now: FSDP2 frees gathered weights, and fills them again, by their
        size.
        """
        alive = ((key, known()) for key, known in list(self.known.items()))
        self.sizes = {key: storage.nbytes() for key, storage in alive if storage is not None}
        return sum(self.sizes.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {storage._cdata: storage for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.known:
                self.known[storage._cdata] = weakref.ref(storage)
                weakref.finalize(storage, self._gone, storage._cdata)
                given[storage._cdata] = storage
        for key, storage in given.items():
            if key in self.known:
                self.most += storage.nbytes() - self.sizes.get(key, 0)
                self.sizes[key] = storage.nbytes()
        if self.most > self.peak:
            self.most = self.now
            self.peak = max(self.peak, self.most)
        return result

    def _gone(self, key: int) -> None:
        del self.known[key]
        self.most -= self.sizes.pop(key, 0)


def _storages(values) -> Iterator[torch.UntypedStorage]:
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor):
            yield getattr(x, "_local_tensor", x).untyped_storage()  # of a DTensor, this process's part
