"""What a pipeline is made of, as far as headers and configs tell; weights are read when they are asked for, and not before."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import nn

from .checkpoint import load_transformer, read_folder_metadata, read_header
from .errors import AptError
from .folders import half_note
from .lora import add_adapters, fold, load_lora
from .mmdit import load_mmdit
from .steps import is_few_step, second_time
from .tensorfile import metadata_json
from .text_files import LENGTH, TextFacts, load_text_encoder_files, read_text_encoder
from .tiny_decoder import is_tiny_decoder, load_tiny_decoder, read_tiny_decoder
from .vae import load_vae, read_vae, stride

MINI = "mini"
ASSETS = Path(__file__).parent / "assets" / "mini"
SHIPPED = {
    "checkpoint": ASSETS / "diffusion_models" / "apt_mini.safetensors",
    "base": ASSETS / "transformer.safetensors",
    "vae": ASSETS / "vae" / "apt_mini_vae.safetensors",
    "text_encoder": ASSETS / "text_encoder.safetensors",
}
WHAT = {
    "checkpoint": "a checkpoint or LoRA file, or a diffusers folder",
    "base": "the transformer: a diffusers folder or a .safetensors file",
    "vae": "the VAE: a diffusers folder or a .safetensors file",
    "tiny_decoder": "the VAE's fast stand-in: taew2_1.safetensors or taew2_2.safetensors",
    "text_encoder": "the UMT5 encoder: a transformers folder or the .safetensors file that ComfyUI takes",
}
NATIVE = {"height": 480, "width": 832, "frames": 49, "fps": 16}
"""Where a checkpoint does not say what it was trained for."""


def locate(part: str, given: str | Path | None) -> Path:
    """Where a part of a pipeline lies; "mini" is the shipped one. Raises AptError when it is not given or not there."""
    if not given:
        raise AptError(f"{part} is not given: add {part}=PATH of {WHAT[part]}.")
    if str(given) == MINI and part not in SHIPPED:
        raise AptError(f"{part} mini does not exist, the miniature has none: give the path of {WHAT.get(part, part)}.")
    path = SHIPPED[part] if str(given) == MINI else Path(given).expanduser()
    if not path.exists():
        raise AptError(f"{part} {given} does not exist: give the path of {WHAT[part]}.")
    return path


@dataclass(frozen=True)
class TransformerSource:
    """name: for messages; config: the transformer's arguments; metadata: the `apt` object of its file; parameters: how many;
    load(dtype, device): the model, whole and without adapters; note: a sentence to say when it is opened, or "".
    Raises AptError for metadata with sizes, lengths or a second time that are none."""

    name: str
    config: Mapping
    metadata: Mapping
    parameters: int
    load: Callable[[torch.dtype, torch.device], nn.Module]
    note: str = ""

    def __post_init__(self) -> None:
        native = self.metadata.get("native", {})
        sizes = native if isinstance(native, Mapping) else {"native": native}
        whole = {name: sizes[name] for name in ("height", "width", "frames", "native") if name in sizes} | {"text_length": self.text_length}
        wrong = [f"{name} {value!r}" for name, value in whole.items() if not (isinstance(value, int) and value > 0)]
        fps = sizes.get("fps", 1)
        if not (isinstance(fps, Real) and 0 < fps < math.inf):
            wrong.append(f"fps {fps!r}")
        if wrong:
            raise AptError(f"{self.name}: its metadata says {wrong[0]}, which cannot be: export the file again.")
        second_time(self.name, self.metadata)

    @property
    def few_step(self) -> bool:
        """Whether it is sampled by re-noising, not by Euler."""
        return is_few_step(self.metadata)

    @property
    def second_time(self) -> float:
        """See `steps.step_times`."""
        return second_time(self.name, self.metadata)

    @property
    def native(self) -> dict:
        """Height, width, frames and fps that it was trained for."""
        return NATIVE | self.metadata.get("native", {})

    @property
    def text_length(self) -> int:
        return self.metadata.get("text_length", LENGTH)

    @property
    def patch(self) -> tuple[int, int, int]:
        return tuple(self.config["patch_size"])


def read_transformer(path: Path, base: str | Path | None = None) -> TransformerSource:
    """The source of a checkpoint file, a diffusers folder, or a LoRA file with the transformer that it belongs to.

    Raises AptError for a file that is none of that, for a LoRA without its base, and as `checkpoint.read_header` does.
    """
    if path.is_dir():
        metadata = read_folder_metadata(path)
    else:
        header = read_header(path)
        metadata = metadata_json(path, header.metadata, "apt")
        if any(".lora_A." in key for key in header.shapes):
            return _read_lora(path, header.shapes, metadata, base)
    model = load_backbone(path, device="meta")

    def load(dtype: torch.dtype, device: torch.device) -> nn.Module:
        return load_backbone(path, dtype, device)

    return TransformerSource(str(path), dict(model.config), metadata, _count(model), load, half_note(path))


def _read_lora(path: Path, shapes: Mapping, metadata: Mapping, base: str | Path | None) -> TransformerSource:
    if not base:
        raise AptError(f"{path} is a LoRA: add base=PATH of the transformer that it belongs to.")
    below = locate("base", base)
    model = load_backbone(below, device="meta")
    rank = next(shape[0] for key, shape in shapes.items() if ".lora_A." in key)

    def load(dtype: torch.dtype, device: torch.device) -> nn.Module:
        adapted = add_adapters(load_backbone(below, dtype, device), ("generator",), rank)
        load_lora(path, adapted, "generator")
        return fold(adapted, "generator")

    return TransformerSource(str(path), dict(model.config), metadata, _count(model), load, half_note(below))


def load_backbone(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """The transformer at `path`, a Wan or an MMDiT, as its file says. Raises AptError as `load_transformer` and `load_mmdit` do."""
    if is_mmdit(Path(path)):
        return load_mmdit(path, dtype, device)
    return load_transformer(path, dtype=dtype, device=device)


def is_mmdit(path: Path) -> bool:
    """Whether the file is an MMDiT of this project."""
    return path.is_file() and "mmdit" in read_header(path).metadata


@dataclass(frozen=True)
class VaeSource:
    """channels: of its latents; stride: pixels per latent in (frames, height, width); load(dtype, device): the VAE, or where `approximate` the
    tiny decoder that stands in for it."""

    name: str
    channels: int
    stride: tuple[int, int, int]
    parameters: int
    load: Callable[[torch.dtype, torch.device], nn.Module]
    approximate: bool = False


def read_vae_source(path: Path) -> VaeSource:
    """Raises AptError for a tiny decoder, and as `apt_core.vae.load_vae` does."""
    if path.is_file() and path.suffix == ".safetensors" and is_tiny_decoder(read_header(path)):
        raise AptError(f"vae {path} is a tiny decoder, whose pictures are only near the VAE's: give the VAE, or this as tiny_decoder.")
    vae = read_vae(path)
    made = vae.config.out_channels // (vae.config.patch_size or 1) ** 2
    if made != 3:
        raise AptError(f"vae {path} makes {made} channels a pixel and not red, green and blue: give the VAE of the video model.")
    return VaeSource(str(path), vae.config.z_dim, stride(vae), _count(vae), lambda dtype, device: load_vae(path, dtype).to(device))


def read_tiny_source(path: Path) -> VaeSource:
    """Raises AptError as `load_tiny_decoder` does."""
    tiny = read_tiny_decoder(path)
    side = 8 * tiny.patch
    return VaeSource(str(path), tiny.z_dim, (4, side, side), _count(tiny), lambda dtype, device: load_tiny_decoder(path, dtype, device), True)


@dataclass(frozen=True)
class TextSource:
    """facts: see TextFacts; load(length, device): the encoder, for prompts of so many tokens."""

    name: str
    facts: TextFacts
    load: Callable[[int, torch.device], object]


def read_text_source(path: Path, tokenizer: str | Path | None) -> TextSource:
    """Raises AptError as `read_text_encoder` does."""
    facts = read_text_encoder(path, tokenizer)
    return TextSource(str(path), facts, lambda length, device: load_text_encoder_files(path, tokenizer, length).to(device))


@dataclass(frozen=True)
class Sources:
    """The three parts of a pipeline, which fit one another. Raises AptError where they do not."""

    transformer: TransformerSource
    vae: VaeSource
    text: TextSource

    def __post_init__(self) -> None:
        config = self.transformer.config
        made = config.get("out_channels") or config["in_channels"]
        if made != config["in_channels"] or config.get("image_dim"):
            raise AptError(
                f"{self.transformer.name} takes {config['in_channels']} channels and makes {made}: it wants an image or a control video beside the noise, which "
                "is not given here; give a text-to-video model."
            )
        if self.vae.channels != config["in_channels"]:
            raise AptError(
                f"vae {self.vae.name} has {self.vae.channels} channels, but {self.transformer.name} makes latents of {config['in_channels']}: "
                "give that model's VAE."
            )
        if self.text.facts.width != config["text_dim"]:
            raise AptError(
                f"text_encoder {self.text.name} has width {self.text.facts.width}, but {self.transformer.name} wants {config['text_dim']}: "
                "give that model's text encoder."
            )


def read_sources(
    checkpoint: str | Path | TransformerSource,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    tiny_decoder: str | Path | None = None,
) -> Sources:
    """All three, from paths; of a checkpoint of the miniature, parts that are not given are the shipped ones. tiny_decoder: in the VAE's place.

    Raises AptError for parts that are missing, damaged in their headers, or that do not fit one another. No weight is read.
    """
    transformer = checkpoint if isinstance(checkpoint, TransformerSource) else read_transformer(locate("checkpoint", checkpoint), base)
    shipped = MINI if transformer.metadata.get("base") == MINI else None
    if tiny_decoder:
        decoder = read_tiny_source(locate("tiny_decoder", tiny_decoder))
    else:
        decoder = read_vae_source(locate("vae", vae or shipped))
    return Sources(transformer, decoder, read_text_source(locate("text_encoder", text_encoder or shipped), tokenizer))


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
