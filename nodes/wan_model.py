"""What a MODEL says about itself: whether it is Wan, and which sizes it supports."""

from dataclasses import dataclass

import comfy.sd
from comfy.model_base import WAN21
from comfy.model_patcher import ModelPatcher

from ..apt_core.errors import AptError
from ..apt_core.files import contract
from ..apt_core.files.checkpoint_header import read_metadata
from ..apt_core.files.contract import metadata_json
from ..apt_core.loading.wan_config import ASSUMED

ATTACHMENT = "apt"
"""The name under which a MODEL carries the `apt` metadata of its file."""


@dataclass(frozen=True)
class WanModel:
    """Sizes of a Wan MODEL. `spatial` and `temporal`: pixels and frames per latent; `patch`: latents per side
    of a token; `native`: the {width, height, frames, fps} that it was trained for, in pixels and frames;
    `second_time`: see apt_core.files.contract; `text_length`: the most rows of a prompt in training, None
    when unknown; `guessed`: whether `native` is a guess from the released Wan models.
    """

    channels: int
    spatial: int
    temporal: int
    patch: int
    text_dim: int
    native: dict
    second_time: float
    text_length: int | None
    guessed: bool

    @property
    def multiple(self) -> int:
        """Width and height in pixels must be multiples of this."""
        return self.spatial * self.patch


def read_model(node: str, model: ModelPatcher) -> WanModel:
    """The sizes of a MODEL. Raises AptError, which begins with the node's display name, if it is not a
    Wan.
    """
    if not isinstance(model.model, WAN21):
        kind = type(model.model).__name__
        raise AptError(
            f"{node}: the model is {kind}, but APT is for Wan: "
            "connect Load APT Checkpoint, or a loader with a Wan model."
        )
    format, network, apt = model.model.latent_format, model.model.diffusion_model, apt_of(node, model)
    released = network.text_dim == ASSUMED["text_dim"]
    native, text_length = contract.native(node, apt), contract.text_length(node, apt)
    return WanModel(
        channels=format.latent_channels,
        spatial=format.spacial_downscale_ratio,
        temporal=format.temporal_downscale_ratio,
        patch=network.patch_size[-1],
        text_dim=network.text_dim,
        native=native or contract.released(format.latent_channels),
        second_time=contract.second_time(node, apt),
        text_length=text_length or (contract.TEXT_LENGTH if released else None),
        guessed=native is None and not released,
    )


def left_out(model: ModelPatcher) -> list[str]:
    """Keys of the patches, of LoRAs or merges, that ComfyUI takes for loaded and never applies: of the own
    weights of a module that has layers inside, in Wan the tables named modulation
    (`ModelPatcher._load_list`).
    """
    modules = dict(model.model.named_modules())
    inner = {
        name
        for name in {key.rpartition(".")[0] for key in model.patches}
        if name in modules and any("." in leaf for leaf, _ in modules[name].named_parameters())
    }
    return [key for key in model.patches if key.rpartition(".")[0] in inner]


def apt_of(node: str, model: ModelPatcher) -> dict:
    """What the MODEL's file says about its training, or what an APT LoRA on a base says; {} when unknown.

    Do not change the result: clones share it. Raises AptError for broken metadata.
    """
    file = model.get_attachment(ATTACHMENT)
    if file is None:
        file = _of_stock_loader(model)
    if contract.is_few_step(file):
        return file
    # With a LoRA on a base, the LoRA says what the model has become.
    what = f"{node}: the LoRA"
    lora = metadata_json(what, model.get_attachment("lora_metadata") or {}, "apt")
    contract.check_sizes(what, lora)
    return {**file, **lora}


def _of_stock_loader(model: ModelPatcher) -> dict:
    """What the file of Load Diffusion Model says. That node drops the metadata, but the MODEL remembers how
    to make it again.
    """
    match model.cached_patcher_init:
        case (comfy.sd.load_diffusion_model, (path, *_)):
            try:
                apt = read_metadata(path)
                contract.check_sizes(path, apt)
            except AptError:  # the file was replaced or removed, or is not safetensors: it says nothing
                return {}
            return apt
    return {}
