"""The models that a run starts from, from where people have them: a diffusers folder, or the single files of ComfyUI. Never a download."""

import json
from pathlib import Path

import torch
from torch import Tensor

from apt_core.checkpoint import load_transformer, read_config
from apt_core.errors import AptError
from apt_core.mmdit import MMDiTBackbone, load_mmdit, save_mmdit
from apt_core.tensorfile import check_finite, check_shapes, metadata_json, read_header
from apt_core.text import TIED_KEY, TOKENIZER_KEY, TextEncoder, load_text_encoder
from apt_core.vae import load_vae
from trainer.config import Files, Model, Preset
from trainer.files import write_json
from trainer.mini import ASSETS, VAE
from trainer.places import ABOUT, resolve

MINI = "mini"
RANDOM = "random"  # an MMDiT, of which no weights are public, may start from noise
SHIPPED = {"base": ASSETS / "transformer.safetensors", "vae": VAE, "text_encoder": ASSETS / "text_encoder.safetensors"}
WHAT = {
    "base": "the transformer: a diffusers folder or a .safetensors file",
    "vae": "the VAE: a diffusers folder or a .safetensors file",
    "text_encoder": "the UMT5 encoder: a transformers folder or the .safetensors file that ComfyUI takes",
}


def locate(files: Files, part: str) -> Path:
    """Where the `base`, `vae` or `text_encoder` of a preset lies. Raises AptError when it is not given or not there."""
    given = getattr(files, part)
    if not given:
        raise AptError(f"{part} is not given: add {part}=PATH of {WHAT[part]}.")
    path = SHIPPED[part] if given == MINI else Path(given).expanduser()
    if not path.exists():
        raise AptError(f"{part} {given} does not exist: give the path of {WHAT[part]}.")
    return path


def with_defaults(checkpoint: Path, base: str, vae: str, text_encoder: str, tokenizer: str) -> Files:
    """The files as given; for a checkpoint of the miniature, those not given are the shipped ones."""
    checkpoint, metadata = resolve(checkpoint), {}
    if checkpoint.is_file():
        metadata = metadata_json(checkpoint, read_header(checkpoint).metadata, "apt")
    elif (checkpoint.parent / ABOUT).is_file():
        metadata = json.loads((checkpoint.parent / ABOUT).read_text(encoding="utf-8"))["metadata"]
    shipped = MINI if metadata.get("base") == MINI or MINI in (base, vae, text_encoder) else ""
    return Files(base=base or shipped, vae=vae or shipped, text_encoder=text_encoder or shipped, tokenizer=tokenizer)


def find_base(preset: Preset) -> Path:
    """The base transformer of a preset, checked against the preset's shape; no weight is read.

    Raises AptError when it is not given, not there, no Wan transformer, or of another shape.
    """
    path = locate(preset.files, "base")
    check_base(path, preset.model, preset.name)
    return path


def check_base(path: Path, model: Model, name: str) -> None:
    """Raises AptError when the transformer at `path` has not the shape of `model`, which preset `name` is for."""
    if is_mmdit(path) != (model.kind == "mmdit"):
        kind = "an MMDiT" if is_mmdit(path) else "a Wan transformer"
        raise AptError(f"base {path} is {kind}, which preset {name} is not for: give a base of its kind.")
    if model.kind == "mmdit":
        config = load_mmdit(path, device="meta").config
    else:
        config = read_config(path)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    found = {
        "blocks": config["num_layers"], "heads": heads, "width": heads * head_dim, "ffn": config.get("ffn_dim", 4 * heads * head_dim),
        "channels": config["in_channels"], "text width": config["text_dim"],
    }  # fmt: skip
    wanted = {
        "blocks": model.layers, "heads": model.heads, "width": model.width, "ffn": model.ffn,
        "channels": model.channels, "text width": model.text_dim,
    }  # fmt: skip
    if wrong := [f"{key} {found[key]} instead of {wanted[key]}" for key in wanted if found[key] != wanted[key]]:
        raise AptError(f"base {path} is not the model of preset {name} ({', '.join(wrong)}): give that model, or the preset of this one.")


def write_random_base(path: Path, preset: Preset) -> None:
    """An untrained MMDiT of the preset's shape, the same each time. Raises AptError for a preset of another kind."""
    model = preset.model
    if model.kind != "mmdit":
        raise AptError(f"base={RANDOM} is for MMDiTs, and {preset.name} is a Wan: give base=PATH of {WHAT['base']}.")
    side = model.head_dim * 11 // 52 * 2  # 44 of 104 channels for rows and for columns
    axes = (model.head_dim - 2 * side, side, side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MMDiTBackbone(model.layers, model.heads, model.head_dim, model.channels, model.channels, model.text_dim, axes_dims_rope=axes)
    save_mmdit(path, network, network.config, {"kind": "base", "base": preset.name})


def load_backbone(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> torch.nn.Module:
    """The transformer at `path`, a Wan or an MMDiT, as its file says. Raises AptError as apt_core's loaders do."""
    if is_mmdit(Path(path)):
        return load_mmdit(path, dtype, device)
    return load_transformer(path, dtype=dtype, device=device)


def is_mmdit(path: Path) -> bool:
    return path.is_file() and "mmdit" in read_header(path).metadata


def describe_state(folder: Path, base: Path, metadata: dict, lora: tuple[int, float | None] | None) -> None:
    """Write beside the training states of a stage what an export of them needs: the base, the metadata, and (rank, alpha) of a LoRA."""
    write_json(folder / ABOUT, {"base": str(base.resolve()), "metadata": metadata, "lora": lora})


def open_vae(files: Files):
    """The VAE of a preset, fp32 and frozen. Raises AptError as `locate` and `apt_core.vae.load_vae` do."""
    return load_vae(locate(files, "vae"))


def open_text_encoder(files: Files, text_length: int) -> TextEncoder:
    """The text encoder of a preset with its tokenizer, on the CPU.

    Files: one of apt_core.text.save_text_encoder; ComfyUI's (umt5_xxl_fp16, or fp8_e4m3fn_scaled, which is unpacked); a folder of
    transformers or diffusers (text_encoder and tokenizer below it). Weights stored in 16 or 8 bits are kept in bf16, others in fp32.
    Raises AptError for weights that are not a whole UMT5 encoder, and when no tokenizer is found.
    """
    path = locate(files, "text_encoder")
    if path.is_dir():
        model, spiece = _from_folder(path)
    elif "text_length" in read_header(path).metadata:
        return load_text_encoder(path)
    else:
        model, spiece = _from_file(path)
    if files.tokenizer:
        spiece = _read_spiece(Path(files.tokenizer).expanduser())
    if spiece is None:
        raise AptError(f"text_encoder {path} carries no tokenizer: add tokenizer=PATH of its folder, or of its spiece.model.")
    return TextEncoder(model.requires_grad_(False), spiece, text_length)


def _from_folder(path: Path):
    from transformers import UMT5EncoderModel

    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    try:
        model, report = UMT5EncoderModel.from_pretrained(folder, local_files_only=True, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises a dozen types
        raise AptError(f"text_encoder {folder} is not a folder of a UMT5 encoder ({' '.join(str(error).split())}): download it again.") from None
    if missing := sorted(set(report["missing_keys"]) - {TIED_KEY}):
        raise AptError(f"text_encoder {folder}: {missing[0]} missing: it is not a whole UMT5 encoder, download it again.")
    places = (path / "tokenizer" / "spiece.model", folder.parent / "tokenizer" / "spiece.model", folder / "spiece.model")
    found = next((place for place in places if place.is_file()), None)
    return model.to(_compute_dtype(model.dtype)), found and found.read_bytes()


def _from_file(path: Path):
    from safetensors.torch import load_file
    from transformers import UMT5Config, UMT5EncoderModel

    tensors = load_file(path)
    spiece = bytes(tensors.pop(TOKENIZER_KEY).tolist()) if TOKENIZER_KEY in tensors else None
    tensors = {key: value for key, value in unpack_fp8(tensors).items() if key != TIED_KEY}
    check_finite(path, tensors)
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**_umt5_fields(path, shapes), dropout_rate=0.0))
    expected = {key: value.shape for key, value in model.state_dict().items() if key != TIED_KEY}
    check_shapes(path, shapes, expected, "UMT5 encoder")
    dtype = _compute_dtype(tensors["shared.weight"].dtype)
    weights = {key: torch.nn.Parameter(value.to(dtype, copy=True), requires_grad=False) for key, value in tensors.items()}
    model.load_state_dict({**weights, TIED_KEY: weights["shared.weight"]}, assign=True)
    return model, spiece


def unpack_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's scaled fp8 as bf16: `X.weight` times `X.scale_weight` (or `X.weight_scale`), without the entries that only describe it."""
    out = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8"):
            continue
        if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            scale = tensors.get(f"{module}.scale_weight", tensors.get(f"{module}.weight_scale", torch.ones(())))
            value = (value.float() * scale.float()).bfloat16()
        out[key] = value
    return out


def _umt5_fields(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """UMT5Config's arguments, from the shapes."""

    def shape(key: str) -> tuple[int, ...]:
        if len(shapes.get(key, ())) != 2:
            raise AptError(f"text_encoder {path}: {key} missing: it is not a UMT5 encoder, give the file that ComfyUI uses for Wan.")
        return shapes[key]

    first = "encoder.block.0.layer."
    vocabulary, width = shape("shared.weight")
    buckets, heads = shape(f"{first}0.SelfAttention.relative_attention_bias.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(f"{first}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape(f"{first}1.DenseReluDense.wi_0.weight")[0],
        "num_layers": len({key.split(".")[2] for key in shapes if key.startswith("encoder.block.")}),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _read_spiece(path: Path) -> bytes:
    places = (path / "spiece.model", path / "tokenizer" / "spiece.model") if path.is_dir() else (path,)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise AptError(f"tokenizer {path} does not exist or holds no spiece.model: give the folder of the tokenizer, or that file.")
    return found.read_bytes()


def _compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float32 if stored == torch.float32 else torch.bfloat16
