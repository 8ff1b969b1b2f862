"""Prompts to video in one step: text, transformer, decode, file.

pipe = apt_core.OneStepPipeline.from_checkpoint("apt.safetensors", vae=..., text_encoder=...)
pipe("a red tram crossing a bridge in the rain", seed=1).save("tram.mp4")
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import AptError
from ..files.media_write import check_name, video_writer, write_image, write_video
from ..loading.sources import Sources, TransformerSource, read_sources
from ..method.generator import euler_cfg, few_step
from ..method.noise import draw
from ..method.steps import step_times
from ..models.attention import choose_backend
from ..models.text import TextEncoder
from ..models.tiny_decoder import TinyDecoder
from .decoder import Decoder
from .fast import Speed, check_compile, check_device, keep_compiled, make_fast
from .fp8 import check_fp8
from .request import Request
from .residence import ALL, Residence, first_level
from .text_cache import TextCache, cache_folder, encoder_fingerprint

GIB = 2**30
LOG = logging.getLogger("apt_core")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Video:
    """One sample. frames: uint8 `[F, H, W, 3]`; fps: 0 for a picture; number: its position in the request;
    about: what its file says about it, see `Request.about`.
    """

    frames: np.ndarray
    fps: float
    prompt: str
    number: int = 0
    about: Mapping | None = None

    def save(self, path: str | Path) -> None:
        """Write an .mp4, or for a single frame a picture (.png, .jpg, ...). Raises AptError as `media_write`
        does.
        """
        if len(self.frames) == 1:
            write_image(path, self.frames, about=self.about)
        else:
            write_video(path, self.frames, self.fps, about=self.about)


class OneStepPipeline:
    """A one-step generator with its text encoder and VAE. All inputs are checked first; weights are read at
    the first call that needs them.

    sources: the parts, see `from_checkpoint`. device: "auto" uses the GPU if there is one; dtype: by default
    bf16, on a CPU fp32.
    backend, compile, fp8: see `fast.Speed`; on a GPU compile also compiles the decoder. memory: GiB of the
    device that may be used; None means what is free. What does not fit waits in the CPU's memory. cache: the
    folder for what can be made again (text embeddings, compiled code); None means `cache_folder()`. group:
    processes that make each sample together; all must make the same calls. report: called with a sentence
    when the pipeline uses less memory after running out, when it assumes something about a LoRA without
    metadata, and when it picks one half of a Wan 2.2 A14B. By default the sentence is a warning of the logger
    apt_core. `residence` holds the networks that have been read.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        compile: bool = False,
        fp8: bool = False,
        memory: float | None = None,
        cache: str | Path | None = None,
        group: ProcessGroup | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.sources, self.group = sources, group
        if device != "auto":
            check_device(device)
        if dtype is not None and dtype not in DTYPES:
            raise AptError(f"dtype is {dtype!r}, but must be one of {', '.join(map(str, DTYPES))}.")
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        head_dim = sources.transformer.config["attention_head_dim"]
        self.speed = Speed(choose_backend(backend, self.device, self.dtype, head_dim).name, compile, fp8)
        if fp8:
            check_fp8(self.device)
        if memory is not None and not (isinstance(memory, Real) and 0 < memory < math.inf):
            raise AptError(
                f"memory is {memory!r}, but must be a number of GiB above 0, or None for all that is free."
            )
        self.memory = None if memory is None else int(memory * GIB)
        self.cache = cache_folder() if cache is None else Path(cache)
        if compile:
            check_compile(self.device)
            keep_compiled(self.cache / "compiled")
        self.report = report or (lambda sentence: LOG.warning("%s", sentence))
        if sources.transformer.note and not (dist.is_initialized() and dist.get_rank()):
            self.report(sources.transformer.note)
        self.residence = Residence(self.device, self._first_level(), self.report, self._left)
        self._text_cache: TextCache | None = None
        self._decoder: Decoder | None = None
        self._given_up: list[str] = []
        self._drawer = ThreadPoolExecutor(1)
        self._drawn: tuple[tuple, Future] | None = None  # the noise of the last request for noise

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | TransformerSource,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        base: str | Path | None = None,
        tiny_decoder: str | Path | None = None,
        **options,
    ) -> "OneStepPipeline":
        """Make a pipeline from files. Reads headers and configs, but no weight.

        path: a checkpoint, a LoRA file of any program (see `lora_files`) or a diffusers folder; vae,
        text_encoder: single files as ComfyUI takes them, or diffusers folders; tokenizer: needed when the
        text encoder does not contain its own; base: the transformer that a LoRA belongs to. Each of them may
        be "mini", the miniature that comes with the project. tiny_decoder: taew2_1 or taew2_2, which replaces
        the VAE and is fast and APPROXIMATE. options: those of the class.
        Raises AptError for parts that are missing, damaged or do not fit together.
        """
        return cls(read_sources(path, vae, text_encoder, tokenizer, base, tiny_decoder), **options)

    @property
    def approximate(self) -> bool:
        """Whether a tiny decoder replaces the VAE."""
        return self.sources.vae.approximate

    @property
    def steps_taken(self) -> list[str]:
        """What the pipeline gave up for lack of memory, one sentence for each step."""
        return list(
            dict.fromkeys(
                self.residence.steps_taken
                + self._given_up
                + (self._decoder.steps_taken if self._decoder else [])
            )
        )

    def __call__(self, prompt: str | Sequence[str], **wishes) -> Video | list[Video]:
        """One video for one prompt with count 1, else a list: `count` videos of each prompt, in the order of
        the prompts.

        wishes: seed, noise ("apt" or "comfyui"), steps, count, height, width, frames, fps, see Request.
        Raises AptError for a request that cannot be fulfilled, before any weight is read.
        """
        request = self.request(prompt, **wishes)
        text = self.embed(request)
        videos = []
        for number in range(request.samples):
            latents = self.latents(request, number, text)
            if number + 1 < request.samples:
                self._draw(request, number + 1)
            parts = list(self.frames(latents))
            frames = np.concatenate(parts) if len(parts) > 1 else parts[0]
            fps = request.sizes[3] if len(frames) > 1 else 0.0
            videos.append(Video(frames, fps, request.prompt(number), number, request.about(number)))
        return videos[0] if isinstance(prompt, str) and request.count == 1 else videos

    def stream(self, prompt: str, **wishes) -> Iterator[np.ndarray]:
        """The frames of one video while they are decoded, uint8 `[n, H, W, 3]`. Raises AptError at once and
        not at the first frame.
        """
        request = self._one(prompt, wishes)
        return self.frames(self.latents(request, 0, self.embed(request)))

    def write(self, prompt: str, path: str | Path, **wishes) -> None:
        """Write one video (.mp4) or picture to a file; frames are encoded while others are decoded. Raises
        AptError as the call does.
        """
        request = self._one(prompt, wishes)
        check_name(path, request.sizes[2])
        self.write_sample(request, 0, self.embed(request), path)

    def request(self, prompt: str | Sequence[str], **wishes) -> Request:
        """The request with all sizes filled in. Raises AptError when it cannot be fulfilled."""
        prompts = (prompt,) if isinstance(prompt, str) or not isinstance(prompt, Iterable) else tuple(prompt)
        return Request(prompts, **wishes).fitted(self.sources)

    def _one(self, prompt: str, wishes: dict) -> Request:
        request = self.request(prompt, **wishes)
        if request.samples != 1:
            raise AptError(
                f"{request.samples} samples were asked for where one can be made: "
                "call the pipeline itself for many."
            )
        return request

    def embed(self, request: Request) -> Tensor:
        """The embeddings of a request's texts, `[n, L, d]` fp32 on the CPU. The encoder is loaded only for a
        text that is not in the cache. Raises AptError for a text that is too long, before loading it.
        """
        source, length = self.sources.text, self.sources.transformer.text_length
        self._draw(request, 0)  # while the encoder runs
        if self._text_cache is None:
            self._text_cache = TextCache(self.cache / "text", encoder_fingerprint(source.facts))

        def encode(texts: list[str]) -> list[Tensor]:
            source.check(texts, length)
            return self.residence.run(
                "text encoder",
                lambda device: source.load(length, device),
                lambda encoder: encoder.encode(texts, batch=1),
            )

        return TextEncoder.pad(self._text_cache.get(request.texts, encode), length)

    def latents(self, request: Request, number: int, text: Tensor, z: Tensor | None = None) -> Tensor:
        """Sample `number` of a request as normalised latents `[1, C, f, h, w]`, fp32. text: the result of
        `embed`; z: noise `[C, f, h, w]` to start from instead of the sample's own.
        """
        shape, z = (
            request.latents(self.sources),
            (self._draw(request, number).result() if z is None else z)[None],
        )
        source = self.sources.transformer

        def noise(step: int) -> Tensor:
            return draw(request.noise, request.seed, number, shape, step)[None].to(self.device)

        prompt = text[number // request.count][None].to(self.device)

        def sample(transformer) -> Tensor:
            if source.few_step:
                return few_step(
                    transformer,
                    z.to(self.device),
                    prompt,
                    step_times(request.steps, source.second_time),
                    noise,
                )
            negative = text[-1][None].to(self.device)
            return euler_cfg(
                transformer,
                z.to(self.device),
                prompt,
                negative,
                request.steps,
                request.guidance,
                request.shift,
            )

        return self.residence.run("transformer", self._load_transformer, sample, alone=self.group is None)

    def frames(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents `[1, C, f, h, w]` -> frames while they are decoded, uint8 `[n, H, W, 3]`."""
        return map(Tensor.numpy, on_the_cpu(part[0] for part in self._decode(latents)))

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        decoder = self.residence.run(
            "vae", lambda device: self.sources.vae.load(self.dtype, device), self._decoder_of
        )
        yield from decoder.stream(latents, uint8=True, report=self.report)

    def _left(self, name: str) -> None:
        """Called when a network has left the device. The decoder holds weights in another form, and views
        that would keep the old ones on the device.
        """
        if name == "vae":
            self._given_up, self._decoder = self.steps_taken, None

    def write_sample(self, request: Request, number: int, text: Tensor, path: str | Path | None) -> None:
        """Write sample `number` of a request to a file. With path None the sample is only computed, for the
        other processes of the group.
        """
        latents = self.latents(request, number, text)
        if path is None:
            for _ in self._decode(latents):
                pass
            return
        parts, about = self.frames(latents), request.about(number)
        height, width, frames, fps = request.sizes
        if frames == 1:
            write_image(path, next(parts), about=about)
        else:
            # The stack closes in reverse order: the encoder's thread ends before the file is closed.
            with ExitStack() as stack:
                write = stack.enter_context(video_writer(path, height, width, fps, about=about))
                thread = stack.enter_context(ThreadPoolExecutor(1))
                before = None
                for part in parts:
                    if before:
                        before.result()
                    before = thread.submit(write, part)
                if before:
                    before.result()

    def _draw(self, request: Request, number: int) -> Future:
        """Start a thread that makes the noise that a sample starts from. At a real model's size this takes as
        long as some of its blocks.
        """
        what = request.noise, request.seed, number, request.latents(self.sources)
        if self._drawn is None or self._drawn[0] != what:
            self._drawn = what, self._drawer.submit(draw, *what)
        return self._drawn[1]

    def _load_transformer(self, device: torch.device):
        first = torch.device("cpu") if self.speed.fp8 else device  # 16-bit weights may not fit the device
        return make_fast(
            self.sources.transformer.load(self.dtype, first), self.device, self.speed, self.group, device
        )

    def _decoder_of(self, vae) -> Decoder | TinyDecoder:
        if self.approximate:
            return vae
        if self._decoder is None:
            # On a CPU compiling takes minutes, and the result is slower.
            compiled = self.speed.compile and self.device.type != "cpu"
            self._decoder = Decoder(vae, compile=compiled, budget=self._beside_weights(), group=self.group)
        return self._decoder

    def _weights(self) -> dict[str, int]:
        """Bytes of each network."""
        transformer, vae, text, width = (
            self.sources.transformer,
            self.sources.vae,
            self.sources.text,
            self.dtype.itemsize,
        )
        return {
            "transformer": transformer.parameters * (1 if self.speed.fp8 else width),
            "vae": vae.parameters * width,
            "text": text.facts.parameters * 2,
        }

    def _beside_weights(self) -> int | None:
        """How much of `memory` a decode may use."""
        weights = self._weights()
        there = sum(weights.values()) if self.residence.level == ALL else weights["vae"]
        return None if self.memory is None else max(self.memory - there, 0)

    def _first_level(self) -> int:
        """The result of `residence.first_level` for a sample of the size that the checkpoint was trained
        for.
        """
        transformer, width, weights = self.sources.transformer, self.dtype.itemsize, self._weights()
        _, f, h, w = Request(("",)).fitted(self.sources).latents(self.sources)
        tokens = f * h * w // int(np.prod(transformer.patch))
        d = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
        # for one block; nothing is kept
        working = tokens * (24 * d + 2 * transformer.config.get("ffn_dim", 4 * d)) * width
        return first_level(self.device, weights, working, self.memory)


def on_the_cpu(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Move each tensor to the CPU's memory; a GPU copies one while it makes the next."""
    before = None
    for part in parts:
        if part.device.type != "cuda":
            yield part
            continue
        copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        copy.copy_(part, non_blocking=True)
        arrived = torch.cuda.current_stream(part.device).record_event()
        if before:
            before[1].synchronize()
            yield before[0]
        before = copy, arrived
    if before:
        before[1].synchronize()
        yield before[0]
