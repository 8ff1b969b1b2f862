"""The benchmark's models: true shapes with random weights, made directly on the device."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from apt_core.errors import AptError
from apt_core.loading.sources import SHIPPED, Sources, TextSource, TransformerSource, VaeSource
from apt_core.loading.text_files import TextFacts, load_text_encoder
from apt_core.models.latents import LATENTS_MEAN, LATENTS_STD, stride
from apt_core.models.precision import cast
from apt_core.models.text import TextEncoder
from apt_core.models.vae import load_vae
from trainer.checkpoints.starting_models import build
from trainer.config import Model, Preset, load_recipe

PRESETS = {
    "mini": "mini",
    "wan2.2-5b": "wan2.2-5b",
    "wan2.1-1.3b": "wan2.1-1.3b-720p",
    "wan2.1-14b": "wan2.1-14b",
    "seaweed-8b": "seaweed-8b",
}
UMT5_XXL = dict(
    vocab_size=256384,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)
VAE_CONFIGS = {
    "2.1": {},
    "2.2": dict(
        base_dim=160,
        decoder_base_dim=256,
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=list(LATENTS_MEAN["2.2"]),
        latents_std=list(LATENTS_STD["2.2"]),
    ),
}


@dataclass(frozen=True)
class Shapes:
    """One of the benchmark's models: builds its three networks on any device, including "meta"."""

    name: str
    preset: Preset

    @property
    def mini(self) -> bool:
        return self.name == "mini"

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and frames of the clip, which lasts 2 seconds."""
        data = self.preset.data
        return data.height, data.width, data.frames

    def transformer(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        return build_backbone(self.preset.model, device, dtype)

    def vae(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        if self.mini:
            config = load_vae(SHIPPED["vae"]).config
            return random_weights(lambda: AutoencoderKLWan.from_config(config), device, dtype)
        return random_weights(lambda: AutoencoderKLWan(**VAE_CONFIGS[self.preset.model.vae]), device, dtype)

    def text_encoder(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        shipped = load_text_encoder(SHIPPED["text_encoder"]).model if self.mini else None
        config = shipped.config if shipped else UMT5Config(**UMT5_XXL)
        return random_weights(lambda: UMT5EncoderModel(config), device, dtype)

    def sources(self) -> Sources:
        """The sources for a OneStepPipeline; the tokenizer is the miniature's."""
        model, data = self.preset.model, self.preset.data
        transformer, vae = self.transformer("meta", torch.float32), self.vae("meta", torch.float32)
        about = {
            "kind": "generator",
            "native": data.native("video"),
            "second_time": self.preset.sampling.second_time,
            "text_length": model.text_length,
        }
        spiece = SHIPPED["text_encoder"]

        def load_text(length: int, device: torch.device) -> TextEncoder:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            network = self.text_encoder(device, dtype)
            return TextEncoder(network, _spiece(spiece), length)

        facts = TextFacts(model.text_dim, _count(self.text_encoder("meta", torch.float32)), (spiece,), spiece)
        return Sources(
            TransformerSource(
                self.name,
                dict(transformer.config),
                about,
                _count(transformer),
                lambda dtype, device: self.transformer(device, dtype),
            ),
            VaeSource(
                self.name,
                vae.config.z_dim,
                stride(vae),
                _count(vae),
                lambda dtype, device: self.vae(device, dtype),
            ),
            TextSource(self.name, facts, load_text),
        )


def find_shapes(name: str) -> Shapes:
    """Find a model of the benchmark by name. Raises AptError for a name that is not in PRESETS."""
    if name not in PRESETS:
        raise AptError(f"there is no model {name!r} in the benchmark: use one of {', '.join(PRESETS)}.")
    return Shapes(name, load_recipe(PRESETS[name])[0])


def build_backbone(model: Model, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """An untrained transformer with this shape."""
    built = cast(random_weights(lambda: build(model), device, dtype), dtype)
    if (
        hasattr(built, "rope") and torch.device(device).type != "meta"
    ):  # Wan's rope tables are in no state dict
        config = built.config
        built.rope = type(built.rope)(
            config.attention_head_dim, config.patch_size, config.rope_max_seq_len
        ).to(device)
    return built


@torch.no_grad()
def random_weights(make, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Build a network with `make`, directly on the device, and give it random weights.

    Matrices preserve the scale of their input, norms are 1, biases 0.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # `.to(dtype)` afterwards would print warnings
    try:
        with torch.device("meta"):
            model = make()
    finally:
        torch.set_default_dtype(before)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    if hasattr(model, "shared"):  # UMT5's embedding, which to_empty makes two of
        model.encoder.embed_tokens.weight = model.shared.weight
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        if p.numel() > max(p.shape):
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        else:
            p.zero_()
    for name, p in model.named_parameters():
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            p.fill_(1.0)
    return model


def _spiece(path: Path) -> bytes:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return bytes(file.get_tensor("spiece_model").tolist())


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
