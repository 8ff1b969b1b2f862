"""`export`: write a trained generator as a file for ComfyUI, as a LoRA file or as a diffusers folder."""

import json
from pathlib import Path

import torch
from torch import Tensor

from apt_core.errors import AptError
from apt_core.files import keys
from apt_core.files.checkpoint_header import read_checkpoint
from apt_core.files.contract import as_whole, metadata_strings
from apt_core.files.tensorfile import write_tensors
from apt_core.loading.backbones import kind_of
from apt_core.loading.checkpoint import save_diffusers_folder, save_generator
from apt_core.loading.wan_config import comfy_config
from apt_core.models.lora import merged_state, save_lora
from apt_core.models.wan import WanBackbone
from trainer.checkpoints.trained_models import ROLE, Generator, cast, open_generator
from trainer.run.folders import earlier_note, resolve
from trainer.run.progress import say

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = ("file", "lora", "diffusers")
FP8 = torch.float8_e4m3fn
SCALED_FP8 = "scaled_fp8"
"""The entry by which ComfyUI recognises scaled fp8. Two elements mean: store in 8 bits, compute in 16.
"""


def export(
    source: Path,
    out: Path,
    form: str = "file",
    dtype: str = "bf16",
    base: str | None = None,
    ema: float | None = None,
) -> str:
    """Write the generator at `source` (see `open_generator`) to `out`. Returns a line on what was written.

    form: "file", "lora" (only for a generator trained as a LoRA) or "diffusers".
    dtype: "fp32", "fp16", "bf16" or, only with "file", "fp8" (see `save_fp8`).
    Raises AptError for combinations that do not work, and as `open_generator` and the writers of
    apt_core.loading.checkpoint do.
    """
    if form not in FORMS or dtype not in (*DTYPES, "fp8"):
        raise AptError(
            f"--form {form} --dtype {dtype} is not possible: forms are {', '.join(FORMS)}, "
            f"dtypes {', '.join(DTYPES)} and fp8."
        )
    if dtype == "fp8" and form != "file":
        raise AptError(f"fp8 is for single files: use --form file, or --dtype bf16 with --form {form}.")
    if form != "diffusers" and out.suffix != ".safetensors":
        out = out.with_name(out.name + ".safetensors")  # ComfyUI lists only these
    if out.exists() and out.resolve() in (resolve(source).resolve(), base and Path(base).resolve()):
        raise AptError(f"{out} is the model to export, or one that it was trained from: give another --out.")
    if note := earlier_note(source):
        say(note)
    generator = open_generator(source, base, ema)
    kind = kind_of(generator.base or generator.model)
    if not kind.public:
        raise AptError(
            f"{source} is {kind.words}, which neither ComfyUI nor diffusers know: "
            "use the file as it is, with this trainer."
        )
    metadata = as_whole(generator.metadata)
    if form == "lora":
        if generator.base is None:
            if read_checkpoint(resolve(source)).is_lora:
                raise AptError(
                    f"{source} is a LoRA already, of another form than this trainer's: "
                    "use it as it is, or --form file."
                )
            raise AptError(f"{source} was trained whole, not as a LoRA: use --form file or diffusers.")
        save_lora(out, generator.base, ROLE, generator.metadata, DTYPES[dtype])
    elif form == "diffusers":
        save_diffusers_folder(out, cast(whole(generator), torch.device("cpu"), DTYPES[dtype]), metadata)
    elif dtype == "fp8":
        model = whole(generator)
        save_fp8(out, model, metadata)
    else:
        model = whole(generator)
        save_generator(out, model, model.config, metadata, DTYPES[dtype])
    over = f", over {generator.metadata['over']}" if form == "lora" and "over" in generator.metadata else ""
    return f"{out}: {form} in {dtype} of {source}{over}"


def whole(generator: Generator) -> WanBackbone:
    """The generator as one network. Adapters, if it has any, are merged into the weights."""
    if generator.base is None:
        return generator.model
    names = {name: value for name, value in generator.base.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model = WanBackbone(**names)
    model.load_state_dict(merged_state(generator.base, ROLE), assign=True)
    return model


def save_fp8(path: Path, model: WanBackbone, metadata: dict) -> None:
    """Write one file in ComfyUI's scaled fp8.

    Every linear layer of the blocks has `X.weight` in float8_e4m3fn and `X.scale_weight`; everything else is
    bf16. Raises AptError as `save_generator` does.
    """
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")
    }
    tensors: dict[str, Tensor] = {SCALED_FP8: torch.zeros(2, dtype=FP8)}
    for key, value in model.state_dict().items():
        official, (layer, _, leaf) = keys.transformer_to_official(key), key.rpartition(".")
        if leaf != "weight" or layer not in linears:
            tensors[official] = value.bfloat16()
            continue
        scale = (value.float().abs().max() / torch.finfo(FP8).max).clamp(min=1e-12)
        tensors[official] = (value.float() / scale).to(FP8)
        tensors[official.removesuffix("weight") + "scale_weight"] = scale
    strings = metadata_strings(path, {**metadata, "dtype": "fp8"})
    if comfy := comfy_config(model.config):
        strings["config"] = json.dumps({"transformer": comfy})
    write_tensors(path, tensors, strings)
