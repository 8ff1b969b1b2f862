"""`inspect`: show what a file or folder of a run or model holds, and whether it would load.

It knows checkpoints, adapters, VAEs, text encoders, folders of shards, and training states; `own_files` knows
what else a run leaves.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from apt_core.errors import AptError
from apt_core.files.checkpoint_header import read_checkpoint
from apt_core.files.contract import is_lora_file, metadata_json
from apt_core.files.folders import half_note, refuse_shard, transformer_folder
from apt_core.files.jsonfile import read_object
from apt_core.files.keys import detect_layout, detect_vae_layout
from apt_core.files.origins import origin
from apt_core.files.quantised import BESIDE, form_of, plain_header
from apt_core.files.tensorfile import Header, check_finite, read_header, read_tensors
from apt_core.files.text_keys import is_t5, is_text_encoder
from apt_core.loading.backbones import WAN, kind_of_file, load_backbone
from apt_core.loading.checkpoint import read_config
from apt_core.loading.sources import (
    check_text_to_video,
    locate,
    read_tiny_source,
    read_transformer,
    read_vae_source,
)
from apt_core.loading.text_files import find_text_encoder, read_spiece
from apt_core.loading.wan_config import comfy_config
from apt_core.models.latents import LATENTS_MEAN
from apt_core.models.lora_files import LoraFile, official_shapes, own_names, read_lora
from apt_core.models.text import Tokenizer
from apt_core.models.tiny_decoder import is_tiny_decoder, load_tiny_decoder, other_tiny_decoder
from apt_core.models.vae import load_vae
from trainer.checkpoints.own_files import folder_facts, note_facts, own_facts, own_kind
from trainer.checkpoints.starting_models import times_note
from trainer.checkpoints.trained_models import State, base_of
from trainer.data.shards import INDEX, ShardDataset
from trainer.overrides import plain
from trainer.run.folders import is_state, resolve
from trainer.run.state import score_of

ADAPTED = re.compile(r"blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.[02])")
"""The layers of a Wan that adapters are attached to: the linear layers of its blocks."""
TIMES = "stage 2 calls it once, at timestep 1000, whatever times it was trained for"


def inspect(path: Path, deep: bool = False, base: str | None = None) -> dict[str, str]:
    """Facts about `path` by name, in the order to print them.

    "loads" begins with "yes" (and says for what and with which parts) or "no" (and says why).
    deep: also read every weight, to find NaN and infinity.
    base: for a LoRA, the transformer to compare it with ("mini" is the miniature's).
    Raises AptError when `path` holds nothing that can be inspected, and if `base` is given without a LoRA.
    """
    if base is not None and not (path.is_file() and _what(path, read_header(path)) == "LoRA"):
        raise AptError(f"{path} is not a LoRA file: leave --base out.")
    if path.is_dir() and (path / INDEX).is_file():
        return _shards(path)
    given, path = path, resolve(path)
    if path != given and given.is_dir():
        return {"found": str(path)} | inspect(path, deep)
    if is_state(path):
        return _state(path, deep)
    if path.is_dir():
        return _folder(path, deep)
    try:
        header = read_header(path)
    except AptError:
        if facts := note_facts(path):
            return facts
        raise
    apt = metadata_json(path, header.metadata, "apt")
    made_by = origin(header.shapes)
    facts = {
        "what": _what(path, header),
        **({"of": f"{made_by}, by its names"} if made_by else {}),
        "parameters": (
            f"{sum(math.prod(shape) for shape in header.shapes.values()):,} in {len(header.shapes)} tensors"
        ),
        "dtypes": ", ".join(sorted(set(header.dtypes.values()))),
        "size": _size(path.stat().st_size),
        **{name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in apt.items()},
        **{
            name: value
            for name, value in header.metadata.items()
            if name.startswith("modelspec.") and len(value) < 200
        },
    }
    return facts | _by_kind(path, header, deep, base)


def _size(count: int) -> str:
    return f"{count / 2**30:.3f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def _what(path: Path, header: Header) -> str:
    keys = header.shapes
    if own := own_kind(path, header):
        return own.what
    if is_lora_file(metadata_json(path, header.metadata, "apt"), keys):
        return "LoRA"
    if (kind := kind_of_file(path)).name != WAN:
        return f"{kind.words.partition(' ')[2]} of this trainer"
    form = f", in {form_of(header)}" if form_of(header) else ""
    if is_text_encoder(keys):
        return f"{'T5' if is_t5(keys) else 'UMT5'} text encoder{form}"
    if is_tiny_decoder(header) or other_tiny_decoder(header):
        return f"tiny decoder{form}"
    for name, detect in (("Wan transformer", detect_layout), ("Wan VAE", detect_vae_layout)):
        try:
            layout = detect([key for key in keys if key.rpartition(".")[2] not in BESIDE])
        except AptError:
            continue
        version = f", version {layout[1]}" if detect is detect_vae_layout else ""
        return f"{name}, {layout[0]} keys{version}{form}"
    return f"unknown ({next(iter(keys), 'empty')} is its first key){form}"


def _by_kind(path: Path, header: Header, deep: bool, base: str | None) -> dict[str, str]:
    what = _what(path, header)
    if what.startswith("Wan transformer, "):
        config = _config_or_reason(path)
        if isinstance(config, str):
            return {"loads": config}
        missing = "" if "config" in header.metadata else ", which is missing"
        where = f"the metadata entry config{missing}" if comfy_config(config) else "the tensors' shapes"
        start = {"as a start": _whole_start(path, form_of(header))}
        facts = {**_numbers(config), "ComfyUI reads": f"its settings from {where}", **_note(path)}
        loads = _transformer(path, deep)
        return facts | (start if loads.startswith("yes") else {}) | {"loads": loads}
    if what.startswith("MMDiT"):
        return {"loads": _transformer(path, deep)}
    if what.startswith("Wan VAE"):
        return {"loads": _vae(path, deep)}
    if what.startswith("tiny decoder"):
        return {"loads": _tiny(path, deep)}
    if "text encoder" in what:
        return _text_encoder(path, deep)
    if what == "LoRA":
        return _lora(path, deep, base)
    own = own_kind(path, header)
    facts = own_facts(path, own, header) if own else {}
    try:
        if not own:
            refuse_shard(path)
            plain_header(path, header)
    except AptError as error:
        return {"loads": f"no: {error}"}
    if deep:
        facts["loads"] = _attempt(lambda: check_finite(path, read_tensors(path, floats_only=False)[0]))
    return facts


def _lora(path: Path, deep: bool, base: str | None) -> dict[str, str]:
    facts: dict[str, str] = {}
    try:
        below = None if base is None else locate("base", base)
        model = below and load_backbone(below, device="meta")
        lora = read_lora(path, own_names(model) if model else ())
        facts |= _lora_facts(lora)
        if model:
            lora.check(official_shapes(model), below)
        if deep:
            lora.load()
    except AptError as error:
        return facts | {"loads": f"no: {error}"}
    open_end = "needs its base: --base PATH compares it with one"
    return facts | {"loads": f"yes, over {below}" if below else open_end}


def _lora_facts(lora: LoraFile) -> dict[str, str]:
    where = Counter("blocks" if name.startswith("blocks.") else "others" for name in lora.targets)
    blocks = {name.split(".")[1] for name in lora.targets if name.startswith("blocks.")}
    inside, outside = where["blocks"], where["others"]
    layers = sorted({re.sub(r"^blocks\.\d+\.", "", name).removesuffix(".weight") for name in lora.targets})
    return {
        "form": lora.form,
        "rank": ", ".join(map(str, sorted(set(lora.ranks.values())))) or "none: whole differences",
        "alpha": lora.alpha,
        "changes": f"{inside} weights in {len(blocks)} blocks, {outside} outside: {', '.join(layers)}",
        **({} if lora.own else {"as a start": _as_start(lora)}),
    }


def _as_start(lora: LoraFile) -> str:
    """Whether stage 2's `--start-from` takes this LoRA; see apt_core.models.lora.load_lora."""
    ranks = [rank for layer, rank in lora.ranks.items() if ADAPTED.fullmatch(layer)]
    others = {name for name in lora.targets if not ADAPTED.fullmatch(name.removesuffix(".weight"))}
    others |= {layer for layer, parts in lora.parts.items() if "diff" in parts and ADAPTED.fullmatch(layer)}
    rank = f" and lora_rank={max(ranks)} or more" if ranks else ""
    stay = f" ({len(others)} other changes stay as they are)" if others else ""
    return f"with mode=lora{rank}{stay}, or mode=full; {TIMES}"


def _whole_start(path: Path, form: str) -> str:
    """Whether stage 2's `--start-from` takes this whole transformer; see trainer.jobs.starts."""
    if form:
        return f"no: {form} is too coarse to train from"
    try:
        times = f"; {TIMES}" if times_note(read_checkpoint(path)) else ""
    except AptError as error:
        return f"no: {error}"
    return f"with mode=full; with mode=lora give it as base too, to train a LoRA over it{times}"


def _note(path: Path) -> dict[str, str]:
    return {"note": note} if (note := half_note(path)) else {}


def _config_or_reason(path: Path) -> dict | str:
    try:
        return read_config(path)
    except AptError as error:
        return f"no: {error}"


def _numbers(config: dict) -> dict[str, str]:
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    channels = f"{config['in_channels']} latent channels, text of width {config['text_dim']}"
    return {
        "shape": (
            f"{config['num_layers']} blocks, {heads} heads x {dim} = width {heads * dim}, "
            f"ffn {config['ffn_dim']}, {channels}"
        )
    }


def _folder(path: Path, deep: bool) -> dict[str, str]:
    """Facts about a folder with a transformer, a VAE or a text encoder, which its config.json tells apart.

    For a folder that holds all of them, facts about each part.
    """
    about = _read(path / "config.json")
    if about.get("_class_name") == "AutoencoderKLWan":
        return {"what": "folder of a Wan VAE", "loads": _vae(path, deep)}
    kinds = about.get("architectures") if isinstance(about.get("architectures"), list) else []
    if about.get("model_type") in ("t5", "umt5") or any("T5" in str(kind) for kind in kinds):
        return {"what": "folder of a text encoder"} | _text_encoder(path, deep)
    if not about and (found := folder_facts(path)):
        return found
    facts = {}
    if transformer_folder(path) != path or not (path / "vae").is_dir():
        facts = {"what": "folder of a Wan transformer", **_numbers(read_config(path)), **_note(path)}
        facts["loads"] = _transformer(path, deep)
    if (path / "vae").is_dir():
        facts = {"what": "folder of a VAE and a text encoder"} | facts | {"vae loads": _vae(path, deep)}
    if (path / "text_encoder").is_dir():
        facts |= {f"text {name}": value for name, value in _text_encoder(path, deep).items()}
    return facts


def _read(path: Path) -> dict:
    try:
        return read_object(path, "")
    except AptError:
        return {}


def _transformer(path: Path, deep: bool) -> str:
    """What a transformer can be used for, with the names that the commands use (`checkpoint`, `base`)."""

    def use() -> str:
        source = read_transformer(path)
        check_text_to_video(source.name, source.config)
        if deep:
            source.load(torch.float32, torch.device("cpu"))
        channels, width = source.config["in_channels"], source.config["text_dim"]
        how = "checkpoint, in one step" if source.few_step else "checkpoint, in Euler steps, or as base"
        version = next((f" (Wan {name})" for name, mean in LATENTS_MEAN.items() if len(mean) == channels), "")
        return f"as {how}; needs a vae of {channels} channels{version} and a text_encoder of width {width}"

    return _attempt(use)


def _vae(path: Path, deep: bool) -> str:
    def use() -> str:
        source = read_vae_source(path)
        if deep:
            load_vae(path)
        # Wan's two VAEs differ in their channels, and every other model has a VAE of its own.
        version = next((name for name, mean in LATENTS_MEAN.items() if len(mean) == source.channels), None)
        return f"as the vae of Wan {version} models" if version else f"as a vae of {source.channels} channels"

    return _attempt(use)


def _tiny(path: Path, deep: bool) -> str:
    def use() -> str:
        source = read_tiny_source(path)
        if deep:
            load_tiny_decoder(path)
        version = "2.2" if source.channels == len(LATENTS_MEAN["2.2"]) else "2.1"
        return f"as tiny_decoder, which is approximate, of Wan {version} models' latents"

    return _attempt(use)


def _text_encoder(path: Path, deep: bool) -> dict[str, str]:
    facts = {}

    def use() -> str:
        found = find_text_encoder(path)
        where = "inside" if found.tokenizer == path else str(found.tokenizer)
        facts["tokenizer"] = where if found.tokenizer else "not inside: needs tokenizer=PATH"
        if deep:
            for file in found.weights:
                read_tensors(file, floats_only=False)
        if found.tokenizer:
            Tokenizer(read_spiece(found.tokenizer))
        return f"as text_encoder of width {found.width}{'' if found.tokenizer else '; needs tokenizer=PATH'}"

    loads = _attempt(use)
    return facts | {"loads": loads}


def _attempt(load) -> str:
    """ "yes", with what `load` returns if it returns text; or "no", with the reason."""
    try:
        use = load()
    except AptError as error:
        return f"no: {error}"
    return f"yes, {use}" if use else "yes"


def _shards(path: Path) -> dict[str, str]:
    facts = {"what": "shards of latents and text"}
    for kind in ("image", "video"):
        try:
            data = ShardDataset(path, kind)
        except AptError as error:
            return facts | {"loads": f"no: {error}"}
        buckets = ", ".join(
            f"{len(places)} of {'x'.join(map(str, bucket))}" for bucket, places in data.buckets.items()
        )
        facts |= {f"{kind}s": f"{len(data)}{f' ({buckets})' if buckets else ''}"}
    return facts | {
        "vae": json.dumps(data.vae),
        "text": f"width {data.text_dim}, length {data.text_length}",
        "fps": f"{data.fps:g}",
        "loads": "yes",
    }


def _state(path: Path, deep: bool) -> dict[str, str]:
    what = {"what": "training state"}
    try:
        state = State(path, check=deep)
        base_of(path, state.about)
    except AptError as error:
        return what | {"loads": f"no: {error}"}
    judged = (
        {}
        if (score := score_of(path)) is None
        else {"judged": f"{score:.4g} (the lower the better, within this run)"}
    )
    parts: dict[str, int] = {}
    for name in state.names(""):
        part = name.partition("/")[0]
        parts[part] = parts.get(part, 0) + state.numel(name)
    numbers = {f"numbers in {part}": f"{count:,}" for part, count in sorted(parts.items())}
    return what | {
        "update": str(state.facts["update"]),
        **judged,
        "settings": "\n".join(setting_lines(state.identity)),
        **numbers,
        "loads": "yes",
    }


def setting_lines(settings: Mapping) -> list[str]:
    """One line per setting, `name  value`, in two columns.

    Values are written as on the command line, with `none` for those that are not set; nested settings have
    their full names.
    """

    def flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, plain(value)

    lines = list(flat(settings))
    width = max((len(name) for name, _ in lines), default=0)
    return [f"{name:<{width}}  {value}" for name, value in lines]
