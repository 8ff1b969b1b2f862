"""Save APT Checkpoint: a MODEL with its LoRAs and merges as one file that still says how it was trained."""

import json
import logging
import os

import folder_paths
import torch
from comfy import model_management
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io
from torch import Tensor

from ..apt_core.errors import AptError
from ..apt_core.files.contract import as_whole, claims_lora, metadata_strings
from ..apt_core.files.tensorfile import write_tensors
from ..apt_core.loading.checkpoint import cast_tensors
from ..apt_core.loading.wan_config import ASSUMED, unguessed
from . import folders
from .wan_model import apt_of, read_model
from .warn import show

NAME = "Save APT Checkpoint"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREFIX = "diffusion_model."
"""The prefix of the network's keys in a MODEL."""


class APTSaveCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTSaveCheckpoint",
            display_name=NAME,
            category="APT",
            description="Saves a model with its LoRAs and merges as one APT checkpoint. Stock Save Model "
            "drops what the file says of its training, such as sizes, frame rate and second time; "
            "this node keeps it.",
            search_aliases=["save model", "export model", "bake lora", "merge", "checkpoint save", "apt"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model, with the LoRAs and merges that are to be part of the file."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/apt",
                    tooltip="Folder and beginning of the file's name, in ComfyUI's output folder; a number "
                    "follows. Default diffusion_models/apt: what is in diffusion_models there, "
                    "the loaders list.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["default", *DTYPES],
                    default="default",
                    tooltip="How the weights are stored. Default: as the model holds them, so that the file "
                    "gives the same pictures to the last bit.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix: str, dtype: str) -> io.NodeOutput:
        read_model(NAME, model)
        _check_patches(model)
        path = _new_path(filename_prefix)
        strings = _strings(path, model, cls.hidden)
        try:
            state = baked_weights(model, dequantized=dtype in DTYPES)
            dtypes = {key: DTYPES.get(dtype, value.dtype) for key, value in state.items()}
            write_tensors(path, cast_tensors(path, state, dtypes), strings)
        except AptError as error:
            raise AptError(f"{NAME}: {error}") from None
        name = os.path.relpath(path, folder_paths.get_output_directory())
        text = f"Saved {name}"
        if not _listed(path):
            text += ", which the loaders do not list: begin the prefix with diffusion_models/, "
            text += "or move the file to models/diffusion_models."
        logging.info(f"{NAME}: {text}")
        return io.NodeOutput(ui=show(text, cls.hidden))


def baked_weights(model: ModelPatcher, dequantized: bool = False) -> dict[str, Tensor]:
    """The network's weights on the CPU in official names, with patches computed and rounded by ComfyUI's
    code.

    Modulation tables stay unpatched, as they do in memory: ComfyUI only patches modules without submodules.
    dequantized: give weights of quantised layers as plain numbers, and not as ComfyUI stores them, with
    scales.
    """
    # Patches apply to the weights of the file. A loaded model already contains them, so unload it first.
    model_management.unload_model_and_clones(model, all_devices=True)
    network = model.model.diffusion_model
    state = network.state_dict()
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if len(own) != len(list(module.parameters())):
            continue
        for leaf, weight in own.items():
            key = f"{name}.{leaf}" if name else leaf
            patched = PREFIX + key in model.patches
            if patched:
                weight = model.patch_weight_to_device(
                    PREFIX + key, device_to=model.load_device, return_weight=True
                )
            if isinstance(weight, QuantizedTensor) and dequantized:
                for piece in (*weight.state_dict(key), f"{name}.comfy_quant", f"{name}.input_scale"):
                    state.pop(piece, None)
                state[key] = weight.dequantize().cpu()
            elif isinstance(weight, QuantizedTensor):
                state.update({piece: value.cpu() for piece, value in weight.state_dict(key).items()})
            elif patched:
                state[key] = weight.cpu()
            model_management.throw_exception_if_processing_interrupted()
    return {key: value.detach() for key, value in state.items()}


def _check_patches(model: ModelPatcher) -> None:
    """Raise AptError for changes of the network that are not in its weights and thus not in the file."""
    for what, found in (
        ("a bypass LoRA", model.injections),
        ("weight wrappers", model.weight_wrapper_patches),
        ("hooks", model.forced_hooks),
    ):
        if found:
            raise AptError(
                f"{NAME}: the model has {what}, which a file of weights cannot hold: "
                "add the LoRA with Load LoRA (Model Only) instead."
            )


def _strings(path: str, model: ModelPatcher, hidden) -> dict[str, str]:
    """The file's metadata. Raises AptError for a model whose training is unknown."""
    apt = apt_of(NAME, model)
    if not apt:
        raise AptError(
            f"{NAME}: the model's file has no `apt` metadata, so nothing tells how it was trained: "
            "save it with stock Save Model, or start from a checkpoint or a LoRA that the trainer exported."
        )
    if claims_lora(apt):
        apt = as_whole(apt)
    if model.patches:
        apt = apt | {"edited": "ComfyUI"}
    network = model.model.diffusion_model
    values = {name: getattr(network, name) for name in ASSUMED}
    strings = metadata_strings(path, apt)
    if config := unguessed(network.num_heads, network.dim // network.num_heads, values, network.out_dim):
        strings["config"] = json.dumps({"transformer": config})
    # As stock Save Model does, so that the file opens as the graph that made it.
    if hidden and not args.disable_metadata:
        graph = {"prompt": hidden.prompt} | (hidden.extra_pnginfo or {})
        strings |= {
            name: json.dumps(value)
            for name, value in graph.items()
            if value is not None and name not in strings
        }
    return strings


def _new_path(prefix: str) -> str:
    """The path of a new file. Raises AptError for a prefix that is empty or leads out of ComfyUI's output
    folder.
    """
    output = folder_paths.get_output_directory()
    folder = os.path.join(output, os.path.dirname(os.path.normpath(prefix)))
    if os.path.basename(os.path.normpath(prefix)) in ("", ".", "..") or prefix.endswith(("/", os.sep)):
        raise AptError(
            f'{NAME}: filename_prefix is "{prefix}", which contains no file name: '
            "give one such as diffusion_models/apt."
        )
    if not folder_paths.is_within_directory(output, folder):
        raise AptError(
            f'{NAME}: filename_prefix is "{prefix}", which leads out of ComfyUI\'s output folder: '
            "give one such as diffusion_models/apt."
        )
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, output)
    except OSError as error:
        raise AptError(
            f"{NAME}: {folder} cannot be made ({error.strerror}): choose another filename_prefix, "
            "or start ComfyUI with --output-directory."
        ) from None
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def _listed(path: str) -> bool:
    places = [place for kind in folders.CHECKPOINTS for place in folder_paths.get_folder_paths(kind)]
    return any(folder_paths.is_within_directory(place, path) for place in places)
