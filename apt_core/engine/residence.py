"""Which networks are in the device's memory, and which of them leave it when memory is short. The results
stay the same.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import OutOfMemory
from .torch_limits import out_of_memory

N = TypeVar("N")
T = TypeVar("T")
ALL, PARTS, BLOCKS = 0, 1, 2
SENTENCES = {
    PARTS: (
        "Out of memory: from now on only the network in use is on {device}, "
        "the others wait in the CPU's memory."
    ),
    BLOCKS: "Out of memory: from now on the networks' blocks come from the CPU's memory one after another.",
}
SPARE = 0.92  # the part of a device's free memory to use; fragments and workspaces need the rest


class Residence:
    """The networks of a pipeline on one device, as many of them as fit.

    level: ALL keeps every network on the device, PARTS only the network in use, BLOCKS of that network
    only what it needs at the moment. When memory runs out it moves to the next level for good, tells `report`
    so in a sentence, and tries again. leaves: called with the name of each network that has left the device,
    so that anything else made from its weights there can go too.
    networks: those that have been loaded, by name; steps_taken: the sentences so far.
    """

    def __init__(
        self,
        device: torch.device,
        level: int = ALL,
        report: Callable[[str], None] | None = None,
        leaves: Callable[[str], None] | None = None,
    ) -> None:
        self.device, self.level, self.report, self.leaves = device, level, report, leaves
        self.steps_taken: list[str] = []
        self.networks: dict[str, Any] = {}
        self._streams: dict[str, BlockStream] = {}
        self._here: set[str] = set()

    def run(
        self,
        name: str,
        load: Callable[[torch.device], N],
        work: Callable[[N], T],
        alone: bool = True,
    ) -> T:
        """`work(network)` with the network on the device. load(device) makes the network at its first use.

        alone: False for work in which other processes wait for this one, which therefore cannot be repeated.
        Raises OutOfMemory when even the last level does not fit, and when memory runs out in such work.
        """
        while True:
            try:
                return work(self._ready(name, load))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Outside of the except block, where the failed attempt's memory would still be held.
            self._step_down(name, alone)

    def _ready(self, name: str, load: Callable[[torch.device], N]) -> N:
        if self.level >= PARTS:
            for other in self._here - {name}:
                self._leave(other)
        if name not in self.networks:
            self.networks[name] = load(torch.device("cpu") if self.level == BLOCKS else self.device)
        network = self.networks[name]
        self._here.add(name)
        if self.level < BLOCKS or not blocks_of(network):
            if self.level > ALL:  # at level ALL it never left
                network.to(self.device)
            return network
        if name not in self._streams:
            self._streams[name] = BlockStream(network, self.device)
        self._streams[name].begin()
        return network

    def _leave(self, name: str) -> None:
        """Take a network off the device, with any blocks that a failed pass has left there."""
        if name in self._streams:
            self._streams[name].end()
        elif name in self.networks:
            self.networks[name].to("cpu")
        self._here.discard(name)
        if self.leaves:
            self.leaves(name)

    def _step_down(self, name: str, alone: bool) -> None:
        if not alone:
            raise OutOfMemory(
                f"{self.device} runs out of memory: add processes, or give all of them a "
                "smaller memory to keep within."
            )
        if self.level >= PARTS:
            self._leave(name)
        if self.level == BLOCKS:
            raise OutOfMemory(
                f"{self.device} runs out of memory even with a single block of a network on it: "
                "ask for fewer frames or a smaller size."
            )
        self.level += 1
        self.steps_taken.append(SENTENCES[self.level].format(device=self.device))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.report:
            self.report(self.steps_taken[-1])


def blocks_of(network) -> list[nn.Module]:
    """The equal blocks in a transformer or a TextEncoder; none for a VAE."""
    return list(
        network.blocks
        if hasattr(network, "blocks")
        else network.model.encoder.block
        if hasattr(network, "model")
        else ()
    )


class BlockStream:
    """Keeps a network's blocks in the CPU's memory. Each comes to the device before it computes, while the
    block before it still computes.

    It remembers modules and never their tensors, because `.to` gives a module new buffers. Diffusers'
    `apply_group_offloading` does not help here: its first pass only learns the order of the blocks and
    fetches them without overlap, and a one-step sample takes one pass. Its later passes wait for the device
    after each block, or (`record_stream`) copy ahead until all blocks are there.
    """

    def __init__(self, network, device: torch.device) -> None:
        self.device, self.blocks = device, blocks_of(network)
        self._copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        inner = {id(module) for block in self.blocks for module in block.modules()}
        self._outer = [
            module for module in getattr(network, "model", network).modules() if id(module) not in inner
        ]
        self._host = [self._pinned(block) for block in self.blocks]
        self._coming: dict[int, list[Tensor]] = {}
        self._done: dict[int, torch.cuda.Event | torch.Event] = {}
        for number, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self._take(number))
            block.register_forward_hook(lambda *_, number=number: self._give_back(number))

    def begin(self) -> None:
        """Bring everything but the blocks to the device."""
        self._drop_blocks()
        self._place_rest(self.device)

    def end(self) -> None:
        """Take everything off the device."""
        self._drop_blocks()
        self._place_rest(torch.device("cpu"))

    def _place_rest(self, device: torch.device) -> None:
        for module in self._outer:
            for tensor in _tensors(module, recurse=False):
                tensor.data = tensor.data.to(device)

    def _drop_blocks(self) -> None:
        """Take off blocks that are still there. A finished pass leaves none; a failed one leaves up to
        two.
        """
        self._coming.clear()
        self._done.clear()
        for block, host in zip(self.blocks, self._host):
            self._point(block, host)

    def _own(self, block: nn.Module) -> list[Tensor]:
        """A block's tensors, without those that it shares with modules outside."""
        rest = {id(tensor) for module in self._outer for tensor in _tensors(module, recurse=False)}
        return [tensor for tensor in _tensors(block) if id(tensor) not in rest]

    def _point(self, block: nn.Module, data: list[Tensor]) -> None:
        for tensor, new in zip(self._own(block), data, strict=True):
            tensor.data = new

    def _pinned(self, block: nn.Module) -> list[Tensor]:
        host = [
            tensor.data.cpu().pin_memory() if self._copier else tensor.data.cpu()
            for tensor in self._own(block)
        ]
        self._point(block, host)
        return host

    def _fetch(self, number: int) -> None:
        with torch.cuda.stream(self._copier):  # None: not another stream
            self._coming[number] = [
                tensor.to(self.device, non_blocking=True, copy=True) for tensor in self._host[number]
            ]

    def _take(self, number: int) -> None:
        # Without this wait the CPU would run ahead, and the device would have to hold all blocks at once.
        if number - 2 in self._done:
            self._done[number - 2].synchronize()
        if number not in self._coming:
            self._fetch(number)
        here = self._coming.pop(number)
        if self._copier:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._copier)
            for tensor in here:
                tensor.record_stream(now)
        self._point(self.blocks[number], here)
        if number + 1 < len(self._host):
            self._fetch(number + 1)

    def _give_back(self, number: int) -> None:
        self._point(self.blocks[number], self._host[number])
        if self._copier:
            self._done[number] = torch.cuda.current_stream(self.device).record_event()


def _tensors(module: nn.Module, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def free_memory(device: torch.device) -> float:
    """How many bytes a new network may use."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free * SPARE


def first_level(device: torch.device, weights: dict[str, int], working: int, budget: float | None) -> int:
    """The level to begin with, so that nothing has to be loaded twice.

    weights: bytes of each network ("transformer" is the one with blocks); working: bytes that it computes
    with; budget: bytes that may be used, by default what the device has free.
    """
    has = free_memory(device) if budget is None else budget
    if sum(weights.values()) + working <= has:
        return ALL
    return PARTS if max(weights.values()) + working <= has else BLOCKS
