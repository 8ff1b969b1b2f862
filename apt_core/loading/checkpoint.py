"""Checkpoint files: one safetensors file in official Wan keys, which ComfyUI's Load Diffusion Model takes
unchanged.

Its string metadata: `apt`, the JSON object of files/contract.py; `config`, JSON {"transformer": {...}} with
the argument names of ComfyUI's WanModel, written only where ComfyUI would guess wrong from the shapes; and
`modelspec.*`.
The second form is a diffusers folder: transformer and scheduler.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AptError, NotFinite
from ..files import keys
from ..files.atomic import replacing_folder
from ..files.checkpoint_header import read_header
from ..files.contract import is_lora_file, metadata_strings, read_apt
from ..files.folders import pickle_hint, refuse_shard, transformer_folder, weight_files
from ..files.jsonfile import read_object
from ..files.origins import convolution_shapes, sparse_attention
from ..files.quantised import plain_header, restore
from ..files.tensorfile import (
    Header,
    check_count,
    check_finite,
    check_floats,
    check_shapes,
    read_tensors,
    write_tensors,
)
from ..models.backbone import as_backbone
from ..models.precision import cast, weight_dtype
from .backbones import WAN, Kind
from .wan_config import comfy_config, known_arguments, layout_of, transformer_config_from

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_generator(
    path: str | Path,
    model: torch.nn.Module | Mapping[str, Tensor],
    transformer_config: Mapping,
    metadata: Mapping,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one checkpoint file, atomically.

    model: a WanTransformer3DModel or its state dict, in diffusers or official keys; transformer_config: the
    arguments that built it (such as model.config); metadata: JSON values for `apt`, on top of {format: 1,
    kind: "generator", timestep: 1000}. Names that begin with `modelspec.` become entries of their own.
    Raises AptError for missing, extra or wrongly shaped keys, for NaN or infinite weights, for metadata that
    is not JSON or has an unknown kind, and when the file cannot be written; a file that was at `path` then
    stays.
    """
    state = model.state_dict() if isinstance(model, torch.nn.Module) else dict(model)
    config = known_arguments(transformer_config)
    layout, prefix = layout_of(path, state)
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    if layout == "diffusers":
        state = {_renamed(path, key, keys.transformer_to_official): value for key, value in state.items()}
    expected = {
        keys.transformer_to_official(key): value.shape
        for key, value in _meta_transformer(path, None, config).state_dict().items()
    }
    check_shapes(
        path, {key: value.shape for key, value in state.items()}, expected, "Wan transformer of its config"
    )

    strings = metadata_strings(path, metadata)
    if comfy := comfy_config(config):
        strings["config"] = json.dumps({"transformer": comfy})
    check_finite(path, state)
    write_tensors(path, cast_tensors(path, state, dict.fromkeys(state, dtype)), strings)


def read_config(path: str | Path, header: Header | None = None) -> dict:
    """The arguments of the transformer in a file or a diffusers folder; reads no weight. header: the file's,
    if it has been read. Raises AptError as `load_transformer` does.
    """
    return _parts(Path(path), header).config


def load_transformer(
    path: str | Path,
    cls: type | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
):
    """Load a transformer with every weight from `path`, or raise. It is trainable and in train mode, as
    diffusers builds it.

    path: one safetensors file (official or diffusers keys; fp32, fp16, bf16 or fp8, see `quantised`), or a
    folder of diffusers or Wan-AI (the folder itself or one with a subfolder transformer or high_noise_model;
    sharded or not, in any variant).
    cls: a WanTransformer3DModel or a subclass, by default apt_core.models.wan.WanBackbone. dtype: of the
    weights; with 16 bits, those of `precision.stays_fp32` stay in fp32, as in diffusers. device: "meta" gives
    the model without weights, from the header alone.
    Raises AptError, which names the file and the key if there is one: see `read_header` and
    `tensorfile.read_tensors`; missing, extra or wrongly shaped keys; a LoRA; one shard of several; other
    quantised weights. All checks are made before anything is built.
    """
    path = Path(path)
    files, shapes, config = _parts(path)
    layout, prefix = layout_of(path, shapes)
    check_count(path, "num_layers", config.get("num_layers", 1), shapes)
    model = _meta_transformer(path, cls, config)
    official = layout == "official"
    name_in_file = {
        key: prefix + keys.transformer_to_official(key) if official else key for key in model.state_dict()
    }
    expected = {name_in_file[key]: value.shape for key, value in model.state_dict().items()}
    check_shapes(path, shapes, expected, "Wan transformer of its config")
    if torch.device(device).type == "meta":
        return cast(model, dtype)

    tensors, state = {}, {}
    for file in files:
        tensors |= read_tensors(file, floats_only=False)[0]
    for key, name in name_in_file.items():
        # A copy: what safetensors hands out is a window on the file, which someone may write over while we
        # train.
        wanted = {key: weight_dtype(model, key, dtype)}
        value = restore(tensors, name).reshape(expected[name])  # a patch embedding may be linear
        state |= cast_tensors(path, {key: value}, wanted, device, copy=True)
        del tensors[name]
    model.load_state_dict(state, assign=True)
    # Its tables are the one thing that no file holds.
    built = model.config
    model.rope = type(model.rope)(built.attention_head_dim, built.patch_size, built.rope_max_seq_len).to(
        device
    )
    return model


def save_diffusers_folder(path: str | Path, model: torch.nn.Module, metadata: Mapping) -> None:
    """Write `path`/transformer, `path`/scheduler (FlowMatchEulerDiscreteScheduler, shift 5) and
    `path`/apt.json, for stock diffusers.

    The folder appears whole or not at all. An earlier export at `path` is replaced; any other folder is
    refused.
    Raises AptError for such a folder, for NaN or infinite weights and when the folder cannot be written.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    path, state = Path(path), model.state_dict()
    if path.exists() and not ((path / "apt.json").is_file() or (path.is_dir() and not any(path.iterdir()))):
        raise AptError(f"{path} exists and is not an earlier export: give a new folder.")
    stock = _meta_transformer(path, WanTransformer3DModel, known_arguments(as_backbone(model).config))
    expected = {key: value.shape for key, value in stock.state_dict().items()}
    check_shapes(
        path, {key: value.shape for key, value in state.items()}, expected, "Wan transformer of its config"
    )
    apt = json.loads(metadata_strings(path, metadata)["apt"])
    with replacing_folder(path) as new:
        write_tensors(new / "transformer" / WEIGHTS, state, {"apt": json.dumps(apt)})
        stock.save_config(new / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(new / "scheduler")
        (new / "apt.json").write_text(json.dumps(apt, indent=2) + "\n", encoding="utf-8")


class _Parts(NamedTuple):
    """A transformer on disk: its files, the shapes of its weights by their names in the files, and the
    arguments that build it.
    """

    files: list[Path]
    shapes: dict[str, tuple[int, ...]]
    config: dict


def _parts(path: Path, known: Header | None = None) -> _Parts:
    """Read headers and configs alone. known: the header of a single file, if it has been read. Raises
    AptError as `load_transformer` does for what they show.
    """
    files, config, strings = _folder(path) if path.is_dir() else ([path], None, None)
    if not path.is_dir():
        refuse_shard(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = known or read_header(file)
        if is_lora_file(read_apt(file, header.metadata), header.shapes):
            raise AptError(
                f"{file} is a LoRA, not a whole Wan transformer: give a whole model here; "
                "`python -m trainer export LORA --base MODEL` makes one of both."
            )
        strings = header.metadata if strings is None else strings
        header = plain_header(file, header)
        check_floats(file, header)
        if found := sparse_attention(header.shapes):
            raise AptError(
                f"{file} was trained with {found[1]}, and Wan's full attention has no place for its weights "
                f"({found[0]}): "
                "give a model or a LoRA that was trained with full attention."
            )
        shapes |= convolution_shapes(header.shapes)
    return _Parts(files, shapes, config or transformer_config_from(shapes, strings or {}, path))


def _folder(path: Path) -> tuple[list[Path], dict | None, dict | None]:
    """(files, config, None) of diffusers' folder; (files, None, metadata with what no shape tells) of
    Wan-AI's own.
    """
    folder = transformer_folder(path)
    kind = None
    try:
        config = read_object(folder / "config.json", "")
        kind = config.get("_class_name")
    except AptError:
        pass
    if kind in ("WanTransformer3DModel", "WanBackbone"):
        return weight_files(folder), known_arguments(config), None
    if kind == "WanModel":
        known = {name: config[name] for name in ("num_heads", "eps") if name in config}
        return weight_files(folder), None, {"config": json.dumps({"transformer": known})}
    raise AptError(
        f"{folder} is not a folder of a Wan transformer, of diffusers or of Wan-AI{pickle_hint(folder)}: "
        "give one with its config.json, or a .safetensors file."
    )


def _meta_transformer(path, cls: type | None, config: Mapping):
    if cls is None:
        from ..models.wan import WanBackbone as cls
    try:
        with torch.device("meta"):
            return cls(**config)
    except Exception as error:  # whatever a foreign config breaks
        reason = " ".join(str(error).split())
        raise AptError(
            f"{path}: no Wan transformer can be built from its config ({reason}): "
            "export or download it again."
        ) from None


def cast_tensors(
    path: str | Path,
    state: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: str | torch.device = "cpu",
    copy: bool = False,
) -> dict[str, Tensor]:
    """`state` with each key in its dtype. Raises NotFinite, naming the key, for weights that fp16 cannot
    hold.
    """
    out = {}
    for key, value in state.items():
        out[key] = value.to(device, dtypes[key], copy=copy)
        if dtypes[key] == torch.float16 and not torch.isfinite(out[key]).all():
            raise NotFinite(f"{path}: {key} has weights beyond what fp16 can hold: use bf16 or fp32.")
    return out


def _renamed(path, key: str, rename) -> str:
    try:
        return rename(key)
    except AptError as error:
        raise AptError(f"{path}: {error}") from None


def _build(layers: int, heads: int, head_dim: int, ffn: int, channels: int, text_dim: int):
    from ..models.wan import WanBackbone

    return WanBackbone(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=text_dim,
        freq_dim=256,
        ffn_dim=ffn,
        num_layers=layers,
    )


def _is_wan(model: object) -> bool:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    return isinstance(model, WanTransformer3DModel)


WAN_KIND = Kind(
    name=WAN,
    words="a Wan transformer",
    is_model=_is_wan,
    is_file=lambda header: True,
    config=read_config,
    load=load_transformer,
    save=save_generator,
    build=_build,
    public=True,
)
