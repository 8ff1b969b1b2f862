"""The Wan VAE's decoder as a stream: it gives exactly the pixels of diffusers' `vae.decode`, a few latent
frames at a time.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import AptError, OutOfMemory
from ..models.latents import denormalize
from .decoder_layers import Bands, Stream, Whole, decoder_layers
from .decoder_memory import Plan, choose
from .parallel_vae import Rows, Shapes, any_failed
from .torch_limits import allow_many_graphs, out_of_memory


class Decoder:
    """Decodes with the weights of a loaded AutoencoderKLWan (Wan 2.1 or 2.2, any width), on its device and in
    its dtype.

    The decoder uses the VAE's own weights. Their values stay, but their layout in memory changes: `save_vae`
    can still write them, `save_pretrained` cannot.

    frames_per_call: latent frames per call; None means as many as `budget` allows. More frames are faster and
    need more memory; the pixels are the same.
    compile: compile the layers with torch, once for each shape (not with a group, and not in bands).
    budget: bytes that a decode may use besides the weights; None means what the device has free.
    group: a process group whose processes share the rows. Each passes the whole latents and gets the whole
    pixels.

    When memory runs out all the same, the decoder takes a smaller plan: fewer latent frames per call, then
    bands of rows (not with a group), then the past frames that it remembers go to the CPU. A group does this
    together when any of its processes runs out. The pixels stay the same.
    `steps_taken` holds one sentence for each such change, `plans` the plan by the shape of latents (channels
    last) for which memory once ran out, and `layers` the two lists of `decoder_layers`.
    """

    def __init__(
        self,
        vae,
        *,
        frames_per_call: int | None = None,
        compile: bool = False,
        budget: int | None = None,
        group: ProcessGroup | None = None,
    ):
        if frames_per_call is not None and frames_per_call < 1:
            raise AptError(
                f"frames_per_call is {frames_per_call}: give 1 or more, or None for as many as memory allows."
            )
        self.vae, self.frames_per_call, self.budget, self.group = vae, frames_per_call, budget, group
        self.steps_taken: list[str] = []
        self.layers = decoder_layers(vae)
        self._kernels = _kernels_for(vae.device)
        self.plans: dict[torch.Size, Plan] = {}
        self._compiled = compile and not group
        if self._compiled:
            allow_many_graphs()
        self._run = torch.compile(_run, fullgraph=True, dynamic=False) if self._compiled else _run

    @torch.inference_mode()
    def stream(
        self, latents: Tensor, *, uint8: bool = False, report: Callable[[str], None] | None = None
    ) -> Iterator[Tensor]:
        """Normalised latents `[B, z, f, h, w]` -> slices `[B, n, H, W, 3]` in time order, together 4(f-1)+1
        frames.

        The slices are fp32 in [-1, 1], or uint8 in 0..255, on the decoder's device. The first slice has 4k-3
        frames and the others 4k, where k is the current number of latent frames per call. report: called with
        each sentence that is added to `steps_taken`.
        Raises AptError for latents that do not belong to this VAE, and OutOfMemory when memory runs out with
        the smallest plan.
        """
        z = self.vae.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != z or not latents.numel():
            raise AptError(
                f"latents of shape {list(latents.shape)} are not this VAE's: "
                f"give [batch, {z}, frames, height, width]."
            )
        latents = (
            denormalize(latents.to(self.vae.device).float(), self.vae)
            .to(self.vae.dtype)
            .movedim(1, -1)
            .contiguous()
        )
        plan, slices = self._plan(latents), None
        total = self.vae.config.scale_factor_temporal * (latents.shape[1] - 1) + 1
        given = at = 0  # frames returned so far, and frames made by `slices`: fewer after a new start
        while given < total:
            if slices is None:
                rows, calls = self._rows(latents), 0
                slices = self._slices(latents, plan, rows)
            try:
                pixels, calls = next(slices), calls + 1
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                pixels = None
            # Outside of the except block, where the exception would keep the failed call's memory alive.
            if pixels is None and self.group:
                self._keep_up(latents, plan, calls + 1, rows.exchanges)
            failed = self.group is not None and any_failed(pixels is None, self.group, latents.device)
            if pixels is None or failed:
                pixels = slices = None
                at = 0
                plan = self.plans[latents.shape] = self._step_down(plan, latents.shape[2], report)
                continue
            new = pixels[:, max(given - at, 0) :]
            at += pixels.shape[1]
            if new.shape[1]:
                given = at
                yield _bytes(new) if uint8 else new.float()

    def decode(self, latents: Tensor, *, uint8: bool = False) -> Tensor:
        """All slices of `stream` concatenated: `[B, 4(f-1)+1, H, W, 3]`."""
        return torch.cat(list(self.stream(latents, uint8=uint8)), dim=1)

    def _plan(self, latents: Tensor) -> Plan:
        if latents.shape in self.plans:
            return self.plans[latents.shape]
        clips, f, h, w, _ = latents.shape
        if self.group:
            h = -(-h // self.group.size())
        bands = self.group is None
        plan = choose(
            self.layers,
            (clips, f, h, w),
            latents.dtype,
            self.frames_per_call,
            self.budget,
            latents.device,
            bands,
        )
        if self.group:
            least = torch.tensor(0 if plan.offload else plan.frames, device=latents.device)
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
            plan = Plan(max(int(least), 1), offload=not least)
        return plan

    def _rows(self, latents: Tensor, skip: int = 0) -> Rows | Whole:
        return Rows(self.group, latents.shape[2], self.vae.device, skip) if self.group else Whole()

    def _slices(self, latents: Tensor, plan: Plan, rows: Rows | Whole) -> Iterator[Tensor]:
        latents = rows.cut(latents)
        memory = torch.device("cpu") if plan.offload else None
        kernels = None if latents.is_meta or (self._compiled and plan.bands == 1) else self._kernels
        streams = [Stream(rows, memory, kernels) for _ in latents]
        frames = latents.shape[1]
        for start in range(0, frames, plan.frames):
            parts = []
            for clip, stream in zip(latents, streams):
                stream.first, stream.last = start == 0, start + plan.frames >= frames
                parts.append(self._call(clip[start : start + plan.frames], stream, plan))
            yield torch.stack(parts)

    def _keep_up(self, latents: Tensor, plan: Plan, calls: int, exchanges: int) -> None:
        """After running out of memory in call number `calls`: take part with zeros in what the other
        processes still exchange in that call. Otherwise they would wait.
        """
        with Shapes():
            latents = latents.to("meta")
            slices = self._slices(latents, plan, self._rows(latents, skip=exchanges))
            for _ in range(calls):
                next(slices)

    def _call(self, z: Tensor, stream: Stream, plan: Plan) -> Tensor:
        low, high = self.layers
        if plan.bands == 1:
            return self._run(low + high, z, stream)
        x = self._run(low, z, stream)
        stream.rows, pixels = Bands(plan.bands), []
        for stream.rows.index, band in enumerate(x.tensor_split(plan.bands, dim=1)):
            pixels.append(_run(high, band, stream))
        stream.rows = Whole()
        return torch.cat(pixels, dim=1)

    def _step_down(self, plan: Plan, height: int, report: Callable[[str], None] | None) -> Plan:
        smaller = plan.smaller(height, bands=self.group is None)
        if smaller is None:
            raise OutOfMemory(
                f"the VAE decode is out of memory even with {plan}: free memory, or choose fewer pixels."
            )
        self.steps_taken.append(f"The VAE decode was out of memory with {plan}: it goes on with {smaller}.")
        if report:
            report(self.steps_taken[-1])
        if self.vae.device.type == "cuda":
            torch.cuda.empty_cache()
        return smaller


@cache  # a pipeline short of memory makes a new decoder for every clip
def _kernels_for(device: torch.device) -> ModuleType | None:
    """The module `kernels` if Triton is installed and works, else None."""
    if device.type != "cuda" or not find_spec("triton"):
        return None
    kernels = import_module(".kernels", __package__)
    return kernels if kernels.work_on(device) else None


def _run(layers: list, x: Tensor, stream: Stream) -> Tensor:
    for layer in layers:
        x = layer(x, stream)
    return x


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.float().add_(1).mul_(127.5).round_().to(torch.uint8)


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]; infinite for equal ones."""
    error = (pixels.double() - reference.double()).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf
