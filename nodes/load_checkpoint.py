"""Load APT Checkpoint: a stock MODEL from one safetensors file, with what its metadata says."""

from textwrap import shorten

import comfy.sd
import comfy.utils
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..apt_core.errors import AptError, and_more
from ..apt_core.files import keys
from ..apt_core.files.checkpoint_header import read_header
from ..apt_core.files.contract import (
    check_sizes,
    is_adversarial,
    is_distilled,
    is_lora_file,
    metadata_json,
    read_apt,
)
from ..apt_core.files.tensorfile import FLOATS, Header
from ..apt_core.loading.wan_config import ASSUMED, transformer_config_from
from . import folders
from .wan_model import ATTACHMENT
from .warn import warn

NAME = "Load APT Checkpoint"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}


class APTLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTLoadCheckpoint",
            display_name=NAME,
            category="APT",
            description=(
                "Loads a Wan model after Adversarial Post-Training: "
                "a MODEL like any other, for LoRAs, offloading, fp8 and compiling, that also knows the "
                "sizes it was trained for. Says so when a file was never adversarially trained."
            ),
            search_aliases=["load diffusion model", "unet loader", "wan", "one step", "apt"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=folders.checkpoints(),
                    default="apt_mini.safetensors",
                    tooltip=(
                        "A whole model from models/diffusion_models or models/apt; a LoRA goes through Load "
                        "LoRA. Default apt_mini.safetensors, the miniature that comes with the pack."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", *DTYPES],
                    default="default",
                    tooltip=(
                        "How the weights are held. Default: as in the file, and computed so where the "
                        "device can. fp8_e4m3fn halves the memory of bf16 at some loss of quality."
                    ),
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, for the nodes of this pack and all stock ones.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        try:
            model = load(folders.find(checkpoint, *folders.CHECKPOINTS), weight_dtype)
        except AptError as error:
            raise AptError(f"{NAME}: {error}") from None
        warnings = _untrained(checkpoint, model.get_attachment(ATTACHMENT))
        return io.NodeOutput(model, ui=warn(NAME, cls.hidden, warnings))

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, weight_dtype: str | None) -> str:
        return folders.fingerprint(folders.path(checkpoint, *folders.CHECKPOINTS))


def load(path: str, weight_dtype: str = "default", disable_dynamic: bool = False) -> ModelPatcher:
    """A patcher with every weight of its model from `path`. Raises AptError for anything that is not a whole
    Wan transformer.
    """
    header = read_header(path)
    apt = read_apt(path, header.metadata)
    prefix, diffusers = _check(path, header, apt)
    state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    if diffusers:
        state = {keys.transformer_to_official(key): value for key, value in state.items()}
    names = set(state)
    options = {"dtype": DTYPES.get(weight_dtype) or _own_dtype(state)}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(
            state, options, metadata=metadata, disable_dynamic=disable_dynamic
        )
    except (TypeError, RuntimeError) as error:  # a foreign name in `config`, a weight of another shape
        if model_management.is_oom(error):
            raise
        reason = shorten(str(error), 300)
        raise AptError(
            f"{path}: ComfyUI cannot build its transformer ({reason}): export or download it again."
        ) from error
    if model is None:
        raise AptError(
            f"{path} is of a kind of Wan that ComfyUI does not know: update ComfyUI, or choose another file."
        )
    # ComfyUI only logs missing weights, and computes with whatever was in memory.
    leaves = ("weight", "bias", "modulation", "emb_pos")
    expected = [
        name
        for name, _ in model.model.diffusion_model.named_parameters()
        if name.rpartition(".")[2] in leaves
    ]
    missing = [name for name in expected if name not in names]
    if missing:
        raise AptError(
            f"{path}: {and_more(missing)} missing: the file is not a whole Wan transformer, "
            "export or download it again."
        )
    model.set_attachments(ATTACHMENT, apt)
    model.cached_patcher_init = (load, (path, weight_dtype))
    return model


def _check(path: str, header: Header, apt: dict) -> tuple[str, bool]:
    """The prefix of the keys, and whether they are diffusers' names. Raises AptError for a file that ComfyUI
    would load incorrectly.
    """
    if is_lora_file(apt, header.shapes):
        raise AptError(
            f"{path} is a LoRA, not a whole model: load the model that it belongs to, "
            "and the LoRA with Load LoRA (Model Only)."
        )
    try:
        layout, prefix = keys.detect_layout(header.shapes)
    except AptError as error:
        raise AptError(f"{path}: {error}") from None
    check_sizes(path, apt)
    if set(header.dtypes.values()) <= FLOATS:
        config = transformer_config_from(header.shapes, header.metadata, path)
        given = ASSUMED | metadata_json(path, header.metadata, "config").get("transformer", {})
        for name in ("text_dim", "freq_dim"):
            if config[name] != given[name]:
                raise AptError(
                    f"{path}: its {name} is {config[name]}, but its metadata entry `config` does not say so "
                    f"and ComfyUI takes {given[name]}: "
                    "use the file that the trainer wrote, or save the model with Save APT Checkpoint, "
                    "which keeps the metadata."
                )
    return prefix, layout == "diffusers"


def _own_dtype(state: dict) -> torch.dtype | None:
    """The dtype of the file if the device supports it. For quantised weights None, which lets ComfyUI choose.

    ComfyUI by itself prefers fp16 for Wan on most devices, even for weights that were trained and stored in
    bf16.
    """
    stored = comfy.utils.weight_dtype(state)
    if stored not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=[stored, torch.float32],
        weight_dtype=stored,
    )


def _untrained(checkpoint: str, apt: dict) -> list[str]:
    """A warning for a model that makes bad pictures in one step; an empty list for a good one."""
    if is_adversarial(apt):
        return []
    what = (
        "was distilled but not adversarially trained"
        if is_distilled(apt)
        else "is a base model, not adversarially trained"
    )
    if not apt:
        what = "has no metadata that tells of adversarial training"
    return [
        f"{checkpoint} {what}: one step of such a model is blurred. "
        "Choose an APT checkpoint, or add the APT LoRA of this model."
    ]
