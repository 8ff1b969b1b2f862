"""What the operations of a piece of code read and write, counted on device "meta" as if it ran on a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MovedBytes(TorchDispatchMode):
    """`with MovedBytes() as moved: ...`, then `moved.total`: bytes of all inputs and outputs; views and empty
    tensors cost nothing.
    """

    FREE = ("empty", "empty_like", "new_empty", "detach")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        given, made = (
            [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), result)
        )
        known = {x.untyped_storage()._cdata for x in given}
        view = not name.endswith("_") and all(x.untyped_storage()._cdata in known for x in made)
        if name == "conv3d" and given[1].is_contiguous(memory_format=torch.channels_last_3d):
            result = result.to(memory_format=torch.channels_last_3d)  # as cuDNN gives it; meta does not
        if not view and name not in self.FREE:
            self.total += sum(x.nbytes for x in (*given, *made))
        return result
