"""The parts of a pipeline, as far as headers and configs describe them. Weights are read only when they are
needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import AptError
from ..files import contract
from ..files.checkpoint_header import Checkpoint, read_checkpoint, read_header
from ..files.contract import is_few_step
from ..files.folders import half_note
from ..models.backbone import as_backbone
from ..models.latents import stride
from ..models.lora_files import merge, read_lora, read_lora_for
from ..models.text import TextEncoder, Tokenizer
from ..models.tiny_decoder import is_tiny_decoder, load_tiny_decoder, read_tiny_decoder
from ..models.vae import load_vae, read_vae
from .backbones import load_backbone
from .text_files import TextFacts, load_text_encoder, read_spiece, read_text_encoder

MINI = "mini"
ASSETS = Path(__file__).parents[1] / "assets" / "mini"
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


def locate(part: str, given: str | Path | None) -> Path:
    """The path of a pipeline's part; "mini" is the one that comes with the project. Raises AptError when it
    is not given or does not exist.
    """
    if not given:
        raise AptError(f"{part} is not given: add {part}=PATH of {WHAT[part]}.")
    if str(given) == MINI and part not in SHIPPED:
        raise AptError(
            f"{part} mini does not exist, the miniature has none: give the path of {WHAT.get(part, part)}."
        )
    path = SHIPPED[part] if str(given) == MINI else Path(given).expanduser()
    if not path.exists():
        raise AptError(f"{part} {given} does not exist: give the path of {WHAT[part]}.")
    return path


@dataclass(frozen=True)
class TransformerSource:
    """name: for messages; config: the transformer's arguments; metadata: the `apt` object of its file;
    parameters: how many; load(dtype, device): the whole model, without adapters; note: a sentence to show
    when it is opened, or "".
    Raises AptError for metadata with impossible sizes, lengths or second time.
    """

    name: str
    config: Mapping
    metadata: Mapping
    parameters: int
    load: Callable[[torch.dtype, torch.device], nn.Module]
    note: str = ""

    def __post_init__(self) -> None:
        contract.check_sizes(self.name, self.metadata)

    @property
    def few_step(self) -> bool:
        """Whether it is sampled by re-noising and not by Euler steps."""
        return contract.is_few_step(self.metadata)

    @property
    def second_time(self) -> float:
        """The second time of two-step sampling."""
        return contract.second_time(self.name, self.metadata)

    @property
    def native(self) -> dict:
        """The height, width, frames and fps that it was trained for, or `contract.released`."""
        return contract.native(self.name, self.metadata) or contract.released(self.config["in_channels"])

    @property
    def text_length(self) -> int:
        return contract.text_length(self.name, self.metadata) or contract.TEXT_LENGTH

    @property
    def patch(self) -> tuple[int, int, int]:
        frames, rows, columns = self.config["patch_size"]
        return frames, rows, columns


def read_transformer(path: Path, base: str | Path | None = None) -> TransformerSource:
    """The source for a checkpoint file, a diffusers folder, or a LoRA file with the transformer that it
    belongs to.

    Raises AptError for any other file, for a LoRA without its base, and as `checkpoint_header.read_header`
    does.
    """
    file = read_checkpoint(path)
    if file.is_lora:
        return _read_lora(file, base)
    model = load_backbone(path, device="meta")

    def load(dtype: torch.dtype, device: torch.device) -> nn.Module:
        return load_backbone(path, dtype, device)

    return TransformerSource(
        str(path), dict(as_backbone(model).config), file.apt, _count(model), load, half_note(path)
    )


def _read_lora(file: Checkpoint, base: str | Path | None) -> TransformerSource:
    path, metadata = file.path, file.apt
    if not base:
        if not metadata:
            read_lora(path, header=file.header)  # which may say why no base would do
        raise AptError(f"{path} is a LoRA: add base=PATH of the transformer that it belongs to.")
    below = locate("base", base)
    model = load_backbone(below, device="meta")
    lora = read_lora_for(path, model, below, file.header)

    def load(dtype: torch.dtype, device: torch.device) -> nn.Module:
        return merge(load_backbone(below, dtype, device), lora.load())

    about, notes = {**read_checkpoint(below).apt, **metadata}, [half_note(below)]
    if not metadata:
        how = "by Euler steps; a LoRA for few steps wants its own steps and guidance"
        notes.append(
            f"{path} has no metadata of this project: it is added to {below} at strength 1 "
            f"(alpha {lora.alpha}) and sampled like that model, "
            f"{'in one step' if is_few_step(about) else how}."
        )
    return TransformerSource(
        str(path), dict(as_backbone(model).config), about, _count(model), load, " ".join(filter(None, notes))
    )


@dataclass(frozen=True)
class VaeSource:
    """channels: of its latents; stride: pixels per latent in (frames, height, width); load(dtype, device):
    the VAE, or if `approximate` the tiny decoder in its place.
    """

    name: str
    channels: int
    stride: tuple[int, int, int]
    parameters: int
    load: Callable[[torch.dtype, torch.device], nn.Module]
    approximate: bool = False


def read_vae_source(path: Path) -> VaeSource:
    """The source for a VAE. Raises AptError for a tiny decoder, and as `apt_core.models.vae.load_vae`
    does.
    """
    if path.is_file() and path.suffix == ".safetensors" and is_tiny_decoder(read_header(path)):
        raise AptError(
            f"vae {path} is a tiny decoder, whose pictures are only close to the VAE's: "
            "give the VAE, or give this file as tiny_decoder."
        )
    vae = read_vae(path)
    made = vae.config.out_channels // (vae.config.patch_size or 1) ** 2
    if made != 3:
        raise AptError(
            f"vae {path} makes {made} channels a pixel and not red, green and blue: "
            "give the VAE of the video model."
        )
    return VaeSource(
        str(path),
        vae.config.z_dim,
        stride(vae),
        _count(vae),
        lambda dtype, device: load_vae(path, dtype).to(device),
    )


def read_tiny_source(path: Path) -> VaeSource:
    """The source for a tiny decoder. Raises AptError as `load_tiny_decoder` does."""
    tiny = read_tiny_decoder(path)
    side = 8 * tiny.patch
    return VaeSource(
        str(path),
        tiny.z_dim,
        (4, side, side),
        _count(tiny),
        lambda dtype, device: load_tiny_decoder(path, dtype, device),
        True,
    )


@dataclass(frozen=True)
class TextSource:
    """facts: see TextFacts; load(length, device): the encoder, for prompts of up to `length` tokens."""

    name: str
    facts: TextFacts
    load: Callable[[int, torch.device], TextEncoder]

    def check(self, texts: Sequence[str], length: int) -> None:
        """Raise AptError for a text with more than `length` tokens or more than the encoder takes. Reads only
        the tokenizer.
        """
        if self.facts.tokenizer is not None:
            most = min(length, self.facts.length or length)
            Tokenizer(read_spiece(self.facts.tokenizer)).check(texts, most)


def read_text_source(path: Path, tokenizer: str | Path | None) -> TextSource:
    """The source for a text encoder. Raises AptError as `read_text_encoder` does."""
    facts = read_text_encoder(path, tokenizer)
    return TextSource(
        str(path), facts, lambda length, device: load_text_encoder(path, tokenizer, length).to(device)
    )


@dataclass(frozen=True)
class Sources:
    """The three parts of a pipeline. Raises AptError when they do not fit together."""

    transformer: TransformerSource
    vae: VaeSource
    text: TextSource

    def __post_init__(self) -> None:
        config = self.transformer.config
        check_text_to_video(self.transformer.name, config)
        if self.vae.channels != config["in_channels"]:
            raise AptError(
                f"vae {self.vae.name} has {self.vae.channels} channels, but {self.transformer.name} makes "
                f"latents of {config['in_channels']}: "
                "give that model's VAE."
            )
        if self.text.facts.width != config["text_dim"]:
            raise AptError(
                f"text_encoder {self.text.name} has width {self.text.facts.width}, "
                f"but {self.transformer.name} wants {config['text_dim']}: "
                "give that model's text encoder."
            )


def check_text_to_video(name: object, config: Mapping) -> None:
    """Raise AptError for a transformer that has other inputs than noise and text."""
    made = config.get("out_channels") or config["in_channels"]
    if made != config["in_channels"] or config.get("image_dim"):
        raise AptError(
            f"{name} takes {config['in_channels']} channels and makes {made}: "
            "it wants an image or a control video beside the noise, which "
            "is not given here; give a text-to-video model."
        )


def read_sources(
    checkpoint: str | Path | TransformerSource,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    tiny_decoder: str | Path | None = None,
) -> Sources:
    """Find all three parts from paths. For a checkpoint of the miniature, parts that are not given are those
    that come with the project. tiny_decoder: replaces the VAE.

    Raises AptError for parts that are missing, have damaged headers, or do not fit together. Reads no weight.
    """
    transformer = (
        checkpoint
        if isinstance(checkpoint, TransformerSource)
        else read_transformer(locate("checkpoint", checkpoint), base)
    )
    shipped = MINI if transformer.metadata.get("base") == MINI else None
    if tiny_decoder:
        decoder = read_tiny_source(locate("tiny_decoder", tiny_decoder))
    else:
        decoder = read_vae_source(locate("vae", vae or shipped))
    return Sources(
        transformer, decoder, read_text_source(locate("text_encoder", text_encoder or shipped), tokenizer)
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
