"""Open the models that a run starts from: a diffusers folder or ComfyUI's single files. Downloads nothing."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import Checkpoint, read_checkpoint
from apt_core.files.contract import metadata_json
from apt_core.files.folders import transformer_folder, weight_files
from apt_core.files.jsonfile import read_object, write_json
from apt_core.files.quantised import form_of
from apt_core.files.tensorfile import Header, read_header
from apt_core.loading.backbones import kind_named, kind_of_file
from apt_core.loading.sources import MINI, WHAT
from apt_core.loading.sources import locate as find_part
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.text import TextEncoder
from apt_core.models.vae import load_vae
from trainer.config import Files, Model, Preset
from trainer.run.folders import ABOUT, resolve

RANDOM = "random"  # for backbones without public weights: start from random ones


def locate(files: Files, part: str) -> Path:
    """The path of a preset's `base`, `vae` or `text_encoder`.

    Raises AptError when it is not given or does not exist.
    """
    return find_part(part, getattr(files, part))


def with_defaults(checkpoint: Path, base: str, vae: str, text_encoder: str, tokenizer: str) -> Files:
    """The given files; for a checkpoint of the miniature, with the shipped ones where none is given."""
    checkpoint, metadata = resolve(checkpoint), {}
    if checkpoint.is_file():
        metadata = metadata_json(checkpoint, read_header(checkpoint).metadata, "apt")
    elif (checkpoint.parent / ABOUT).is_file():
        metadata = read_about(checkpoint.parent)["metadata"]
    shipped = MINI if metadata.get("base") == MINI or MINI in (base, vae, text_encoder) else ""
    return Files(
        base=base or shipped, vae=vae or shipped, text_encoder=text_encoder or shipped, tokenizer=tokenizer
    )


def find_base(preset: Preset) -> Path:
    """The path of a preset's base transformer, after checking its shape. No weights are read.

    Raises AptError when it is not given, does not exist, is not a transformer of the preset's kind, or has
    another shape.
    """
    path = locate(preset.files, "base")
    check_base(path, preset.model, preset.name)
    return path


def check_base(path: Path, model: Model, name: str, what: str = "base", header: Header | None = None) -> None:
    """Raise AptError when the transformer at `path` does not have the shape of `model`.

    name: the preset that the shape comes from; what: the option or setting that gave the path; header: the
    file's, if it has been read.
    """
    if path.is_file():
        header = header or read_checkpoint(path).header
    kind = kind_of_file(path, header)
    if kind.name != model.kind:
        raise AptError(
            f"{what} {path} is {kind.words}, but preset {name} is for another kind of model: "
            "give one of that kind."
        )
    if header:
        _refuse_coarse(path, [header], what)
    config = kind.config(path, header)
    if path.is_dir():
        _refuse_coarse(path, map(read_header, weight_files(transformer_folder(path))), what)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    found = {
        "blocks": config["num_layers"],
        "heads": heads,
        "width": heads * head_dim,
        "ffn": config.get("ffn_dim", 4 * heads * head_dim),
        "channels": config["in_channels"],
        "text width": config["text_dim"],
    }
    wanted = {
        "blocks": model.layers,
        "heads": model.heads,
        "width": model.width,
        "ffn": model.ffn,
        "channels": model.channels,
        "text width": model.text_dim,
    }
    if wrong := [
        f"{key} {found[key]} instead of {wanted[key]}" for key in wanted if found[key] != wanted[key]
    ]:
        raise AptError(
            f"{what} {path} is not the model of preset {name} ({', '.join(wrong)}): "
            "give that model, or the preset of this one."
        )


def _refuse_coarse(path: Path, headers: Iterable[Header], what: str) -> None:
    if form := next(filter(None, map(form_of, headers)), ""):
        raise AptError(
            f"{what} {path} is in {form}, too coarse to train from: give the model in fp32, bf16 or fp16."
        )


def times_note(start: Checkpoint) -> str | None:
    """For few-step weights from elsewhere, a sentence on the times they were made for.

    None for files that say that they were made for timestep 1000, as this trainer's own do. Raises AptError
    for a file that names another timestep.
    """
    if "timestep" not in start.apt:
        return (
            f"{start.path} does not say which timesteps it was trained for. "
            "Stage 2 calls it once, at timestep 1000. "
            "A list like 1000, 750, 500, 250 begins there under any shift; "
            "if its own list begins lower, it has "
            "not learned this call: run `distill` with it as the base first."
        )
    if (timestep := start.apt["timestep"]) != 1000:
        raise AptError(
            f"{start.path} is for timestep {timestep}, but one step from noise is a call at 1000: "
            "give weights that were trained there, or run `distill` with these as the base first."
        )
    return None


def write_random_base(path: Path, preset: Preset) -> None:
    """Write an untrained backbone with the preset's shape; its weights are the same each time.

    Raises AptError for a kind of backbone with public weights, because those are the better start.
    """
    model, kind = preset.model, kind_named(preset.model.kind)
    if kind.public:
        raise AptError(
            f"base={RANDOM} is for backbones without public weights, and {preset.name} is {kind.words}: "
            f"give base=PATH of {WHAT['base']}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(model)
    kind.save(path, network, network.config, {"kind": "base", "base": preset.name})


def build(model: Model) -> nn.Module:
    """An untrained backbone with this shape."""
    make = kind_named(model.kind).build
    return make(model.layers, model.heads, model.head_dim, model.ffn, model.channels, model.text_dim)


def describe_state(folder: Path, base: Path, metadata: dict, lora: tuple[int, float | None] | None) -> None:
    """Write what is needed to export a stage's training states into their folder.

    lora: (rank, alpha), or None for a stage that trains all weights.
    """
    write_json(folder / ABOUT, {"base": str(base.resolve()), "metadata": metadata, "lora": lora})


def read_about(folder: Path) -> dict:
    """Read what `describe_state` wrote into `folder`. Raises AptError when it is missing or damaged."""
    remedy = f"give a whole training state that the trainer wrote, with its {ABOUT} beside it"
    about = read_object(folder / ABOUT, remedy)
    lora = about.get("lora")
    if (
        not isinstance(about.get("base"), str)
        or not isinstance(about.get("metadata"), dict)
        or not (lora is None or _is_rank_and_alpha(lora))
    ):
        raise AptError(f"{folder / ABOUT} is damaged: {remedy}.")
    return about


def _is_rank_and_alpha(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], int)
        and isinstance(value[1], float | int | None)
    )


def open_vae(files: Files):
    """Load a preset's VAE, fp32 and frozen.

    Raises AptError as `locate` and `apt_core.models.vae.load_vae` do.
    """
    return load_vae(locate(files, "vae"))


def open_text_encoder(files: Files, text_length: int) -> TextEncoder:
    """Load a preset's text encoder with its tokenizer, on the CPU.

    Raises AptError as `locate` and `apt_core.loading.text_files.load_text_encoder` do.
    """
    return load_text_encoder(locate(files, "text_encoder"), files.tokenizer or None, text_length)
