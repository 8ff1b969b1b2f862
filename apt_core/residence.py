"""Which networks are in the device's memory, and what leaves it when there is too little: the results stay the same."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import AptError
from .memory import out_of_memory

T = TypeVar("T")
ALL, PARTS, BLOCKS = 0, 1, 2
SENTENCES = {
    PARTS: "Out of memory: from now on only the network in use is on {device}, the others wait in the CPU's memory.",
    BLOCKS: "Out of memory: from now on the networks' blocks come from the CPU's memory one after another.",
}
SPARE = 0.92  # of a device's free memory: the rest goes to fragments and workspaces


class Residence:
    """The networks of a pipeline on one device, as much of them as fits.

    level: ALL keeps every network on the device, PARTS only the one in use, BLOCKS of that only what it computes with. When memory runs
    out it goes to the next level by itself, once for good, tells it to `report` in a sentence, and tries again.
    steps_taken: those sentences.
    """

    def __init__(self, device: torch.device, level: int = ALL, report: Callable[[str], None] | None = None) -> None:
        self.device, self.level, self.report = device, level, report
        self.steps_taken: list[str] = []
        self._networks: dict[str, object] = {}
        self._streams: dict[str, BlockStream] = {}

    def run(self, name: str, load: Callable[[torch.device], object], work: Callable[[object], T], alone: bool = True) -> T:
        """`work(network)` with the network on the device. load(device) gives it when it is first asked for.

        alone: False for work in which other processes wait for this one: it cannot be tried again.
        Raises AptError when even the last level does not fit, and when memory runs out in such work.
        """
        while True:
            try:
                return work(self._ready(name, load))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            self._step_down(name, alone)  # not in the except block, which would still hold what the failed attempt had

    def _ready(self, name: str, load: Callable[[torch.device], object]):
        if self.level >= PARTS:
            for other, network in self._networks.items():
                if other != name:
                    network.to("cpu")
        if name not in self._networks:
            self._networks[name] = load(torch.device("cpu") if self.level == BLOCKS else self.device)
        network = self._networks[name]
        if self.level < BLOCKS or not blocks_of(network):
            if self.level > ALL:  # else it never left
                network.to(self.device)
        elif name not in self._streams:
            self._streams[name] = BlockStream(network, self.device)
        else:
            self._streams[name].place_rest()
        return network

    def _step_down(self, name: str, alone: bool) -> None:
        if not alone:
            raise AptError(f"{self.device} runs out of memory: add processes, or give all of them a smaller memory to keep within.")
        if self.level == BLOCKS:
            raise AptError(f"{self.device} runs out of memory even with one block of a network on it: ask for fewer frames or a smaller size.")
        self.level += 1
        self.steps_taken.append(SENTENCES[self.level].format(device=self.device))
        if self.level == BLOCKS and (network := self._networks.get(name)) is not None:
            network.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.report:
            self.report(self.steps_taken[-1])


def blocks_of(network) -> list[nn.Module]:
    """The equal blocks that a transformer or a TextEncoder is a row of; none for a VAE."""
    return list(network.blocks if hasattr(network, "blocks") else network.model.encoder.block if hasattr(network, "model") else ())


class BlockStream:
    """A network's blocks in the CPU's memory; each comes to the device before it computes, while the one before it still does."""

    def __init__(self, network, device: torch.device) -> None:
        self.device, self.blocks = device, blocks_of(network)
        self._copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host = [self._pinned(block) for block in self.blocks]
        streamed = {id(tensor) for block in self.blocks for tensor in _tensors(block)}
        self._rest = [tensor for tensor in _tensors(getattr(network, "model", network)) if id(tensor) not in streamed]
        self._coming: dict[int, list[Tensor]] = {}
        self._done: dict[int, torch.cuda.Event] = {}
        for number, block in enumerate(self.blocks):
            block._compiled_call_impl = None  # compiled code would take the moves into its graph
            block.register_forward_pre_hook(lambda *_, number=number: self._take(number))
            block.register_forward_hook(lambda *_, number=number: self._leave(number))
        self.place_rest()

    def place_rest(self) -> None:
        """Everything but the blocks, on the device."""
        for tensor in self._rest:
            tensor.data = tensor.data.to(self.device)

    def _pinned(self, block: nn.Module) -> list[Tensor]:
        for tensor in _tensors(block):
            tensor.data = tensor.data.cpu().pin_memory() if self._copier else tensor.data.cpu()
        return [tensor.data for tensor in _tensors(block)]

    def _fetch(self, number: int) -> None:
        with torch.cuda.stream(self._copier):  # None: no stream at all
            self._coming[number] = [tensor.to(self.device, non_blocking=True, copy=True) for tensor in self._host[number]]

    def _take(self, number: int) -> None:
        if number - 2 in self._done:  # the CPU runs ahead of the device, which would have to hold all the blocks that it asked for
            self._done[number - 2].synchronize()
        if number not in self._coming:
            self._fetch(number)
        here = self._coming.pop(number)
        if self._copier:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._copier)
            for tensor in here:
                tensor.record_stream(now)
        for tensor, copy in zip(_tensors(self.blocks[number]), here):
            tensor.data = copy
        if number + 1 < len(self._host):
            self._fetch(number + 1)

    def _leave(self, number: int) -> None:
        for tensor, host in zip(_tensors(self.blocks[number]), self._host[number]):
            tensor.data = host
        if self._copier:
            self._done[number] = torch.cuda.current_stream(self.device).record_event()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def free_memory(device: torch.device) -> float:
    """Bytes that a new network may count on."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free * SPARE


def first_level(device: torch.device, weights: dict[str, int], working: int, budget: float | None) -> int:
    """The level to begin with, so that nothing has to be loaded twice.

    weights: bytes of each network, of which "transformer" is the one with blocks; working: bytes that it computes with; budget: bytes that may
    be used, by default what the device has free.
    """
    has = free_memory(device) if budget is None else budget
    if sum(weights.values()) + working <= has:
        return ALL
    return PARTS if max(weights.values()) + working <= has else BLOCKS
