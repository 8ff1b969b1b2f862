"""Load APT Text Encoder: a stock CLIP from the small UMT5 of the miniature, or from Wan's own UMT5-XXL."""

from types import SimpleNamespace

import comfy.sd
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..apt_core.errors import AptError
from ..apt_core.files.contract import metadata_json
from ..apt_core.files.tensorfile import read_header
from ..apt_core.files.text_keys import has_wan_names, refuse_t5
from ..apt_core.models.text import CONFIG_FIELDS, TOKENIZER_KEY
from . import folders

NAME = "Load APT Text Encoder"
BUILT_IN = "apt_mini_text_encoder"
BUILT_IN_FILE = str(folders.MINI / "text_encoder.safetensors")
# The values that ComfyUI's UMT5 assumes.
FIXED = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
XXL_KEY = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"


class APTLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="APTLoadTextEncoder",
            display_name=NAME,
            category="APT",
            description=(
                "Loads the text encoder that a model was trained with, for CLIP Text Encode: the small one "
                "of the miniature, which comes with the pack, one that the trainer wrote, or Wan's UMT5-XXL."
            ),
            search_aliases=["load clip", "clip loader", "umt5", "t5", "wan", "apt"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=[BUILT_IN, *folders.names("text_encoders")],
                    default=BUILT_IN,
                    tooltip=(
                        f"Default {BUILT_IN}, the miniature's, which comes with the pack. "
                        "Files of models/text_encoders: UMT5-XXL for any Wan."
                    ),
                )
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder with its tokenizer, for CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, text_encoder: str) -> io.NodeOutput:
        try:
            return io.NodeOutput(
                _load(
                    BUILT_IN_FILE if text_encoder == BUILT_IN else folders.find(text_encoder, "text_encoders")
                )
            )
        except AptError as error:
            raise AptError(f"{NAME}: {error}") from None

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str | None) -> str:
        return folders.fingerprint(
            BUILT_IN_FILE if text_encoder == BUILT_IN else folders.path(text_encoder, "text_encoders")
        )


def _load(path: str) -> comfy.sd.CLIP:
    header = read_header(path)
    embeddings = folder_paths.get_folder_paths("embeddings")
    if "text_length" in header.metadata:
        return load_small(path, embeddings)
    refuse_t5(path, header.shapes)
    if XXL_KEY not in header.shapes or TOKENIZER_KEY not in header.shapes:
        if has_wan_names(header.shapes):
            raise AptError(f"{path} has Wan's own names, which ComfyUI does not read: choose umt5_xxl_fp16.")
        raise AptError(
            f"{path} is neither a UMT5-XXL with its tokenizer, as Wan has it, "
            "nor a text encoder that the trainer wrote: "
            f"choose a umt5_xxl file for Wan, or {BUILT_IN} for the miniature."
        )
    return comfy.sd.load_clip([path], embeddings, comfy.sd.CLIPType.WAN)


def load_small(path: str, embeddings: list[str], disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """ComfyUI's UMT5 in the size that the file's metadata states. Prompts are padded to as many rows as the
    transformer was trained with.
    """
    state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    fields, names = metadata_json(path, metadata, "config"), set(state)
    wrong = [
        name for name in CONFIG_FIELDS if name not in fields or fields[name] != FIXED.get(name, fields[name])
    ]
    wrong += [TOKENIZER_KEY] * (TOKENIZER_KEY not in names) + ["text_length"] * (
        not metadata["text_length"].isdecimal()
    )
    _refuse(path, wrong)
    spiece = state.pop(TOKENIZER_KEY)
    # Use the dtype of the file, as ComfyUI does for UMT5-XXL; its default for text encoders is fp16.
    encoder = comfy.text_encoders.wan.te(comfy.utils.weight_dtype(state))
    target = SimpleNamespace(clip=encoder, tokenizer=comfy.text_encoders.wan.WanT5Tokenizer, params={})
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embeddings,
        tokenizer_data={"spiece_model": spiece, "umt5xxl_min_length": int(metadata["text_length"])},
        parameters=comfy.utils.calculate_parameters(state),
        state_dict=[state],
        model_options={"umt5xxl_model_config": {name: fields[name] for name in CONFIG_FIELDS}},
        disable_dynamic=disable_dynamic,
    )
    # ComfyUI only logs missing weights, and computes with whatever was in memory.
    network = clip.cond_stage_model.umt5xxl.transformer
    _refuse(path, [name for name, _ in network.named_parameters() if name not in names])
    clip.patcher.cached_patcher_init = (_load_small_patcher, (path, embeddings))
    return clip


def _refuse(path: str, wrong: list[str]) -> None:
    if wrong:
        raise AptError(
            f"{path}: {wrong[0]} is missing, or ComfyUI's UMT5 cannot take it: "
            "write the file again with the trainer."
        )


def _load_small_patcher(path: str, embeddings: list[str], disable_dynamic: bool = False):
    return load_small(path, embeddings, disable_dynamic).patcher
