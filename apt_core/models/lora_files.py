"""Read LoRA files of any program. The header tells which weights a file changes; the weights then become
`W + up @ down * alpha / rank`.

    lora = read_lora("style.safetensors")  # reads no weight
    lora.check(official_shapes(model), "base.safetensors")
    merge(model, lora.load())
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import AptError, NotFinite, and_more
from ..files.checkpoint_header import read_header
from ..files.contract import metadata_json
from ..files.jsonfile import read_object
from ..files.keys import transformer_to_official
from ..files.lora_keys import find_place, foreign_model, unreadable_kind, weight_of
from ..files.tensorfile import FLOATS, Header, read_tensors
from .backbone import as_backbone

READABLE = FLOATS | {"F64", "F8_E4M3", "F8_E5M2"}
WIDTHS = {
    128: "the miniature's",
    1536: "that of Wan 2.1 1.3B",
    3072: "that of Wan 2.2 5B",
    5120: "that of the 14B models",
}
REMEDY = "merge it into its model with the program that made it, or give a plain LoRA"
MOST = 1e9
"""An upper limit for alpha; larger values are refused as damage."""
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""How PEFT's names of initialisations begin that also change the base's weights."""


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to one weight or bias: `full`, plus `up @ down * scale`. Either may be missing. The
    tensors are as in the file.
    """

    full: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0

    def change(self, like: Tensor) -> Tensor:
        """The sum of both parts, in the shape and on the device of a weight; fp32, or fp64 for fp64
        weights.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        total = torch.zeros(like.shape, dtype=wide, device=like.device)
        if self.up is not None and self.down is not None:
            up, down = (part.to(like.device, wide).flatten(1) for part in (self.up, self.down))
            total += (up @ down * self.scale).view(like.shape)
        if self.full is not None:
            total += self.full.to(like.device, wide).view(like.shape)
        return total

    def add_to(self, weight: Tensor) -> Tensor:
        """The weight plus the change, added in fp32 (fp64 for fp64 weights), in the weight's dtype."""
        change = self.change(weight)
        return (weight.to(change.dtype) + change).to(weight.dtype)


@dataclass(frozen=True)
class LoraFile:
    """What the header of a LoRA file says.

    form: the program whose names it uses, such as "kohya"; metadata: its `apt` object, {} for a file of
    another program; ranks: by official name, for the layers that have factors; changes: (official name of a
    weight or bias, shape) of everything that it changes; alpha: in words, where the scale comes from.
    """

    path: Path
    form: str
    metadata: Mapping
    header: Header = field(repr=False)
    ranks: Mapping[str, int]
    changes: Sequence[tuple[str, tuple[int, ...]]]
    alpha: str
    parts: Mapping[str, Mapping[str, str]] = field(repr=False)
    scales: Mapping[str, float] = field(repr=False)
    own: Sequence[str] = field(repr=False, default=())

    @property
    def targets(self) -> tuple[str, ...]:
        """Official names of the weights and biases that it changes."""
        return tuple(dict.fromkeys(name for name, _ in self.changes))

    def check(self, shapes: Mapping[str, Sequence[int]], base: object = "the base") -> None:
        """Raise AptError unless it was trained on a model of these official names and shapes. base: what the
        message calls that model.
        """
        for name, shape in self.changes:
            if name not in shapes:
                blocks = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
                image = ", an image-to-video model" if "_img" in name or name.startswith("img_emb.") else ""
                raise AptError(
                    f"{self.path} changes {name}, which {base} ({blocks} blocks) does not have: "
                    f"give as the base the model that this LoRA was trained on{image}."
                )
            if _squeezed(shape) != _squeezed(shapes[name]):
                raise AptError(
                    f"{self.path} changes {name} by {tuple(shape)}, "
                    f"but in {base} it is {tuple(shapes[name])}: "
                    f"give as the base the model that this LoRA was trained on{self._width()}."
                )

    def load(self) -> dict[str, Delta]:
        """What is added to each weight and bias, by official name. Raises AptError for NaN and infinite
        weights, and for a file that was replaced by another one since its header was read.
        """
        tensors, header = read_tensors(self.path, floats_only=False)
        if header != self.header:
            raise AptError(f"{self.path} was replaced by another file while it was in use: start again.")
        deltas = {}
        for layer, parts in self.parts.items():
            found = {part: tensors[key] for part, key in parts.items()}
            scale = self._scale(layer, found)
            if "down" in found or "diff" in found:
                deltas[weight_of(layer, self.own)] = Delta(
                    found.get("diff"), found.get("up"), found.get("down"), scale
                )
            if "up_bias" in found:
                deltas[f"{layer}.bias"] = Delta(found["up_bias"].double() * scale)
            elif "diff_b" in found:
                deltas[f"{layer}.bias"] = Delta(found["diff_b"])
        return deltas

    def _scale(self, layer: str, found: Mapping[str, Tensor]) -> float:
        if "alpha" not in found:
            return self.scales.get(layer, 1.0)
        return float(found["alpha"].double()) / self.ranks[layer]

    def _width(self) -> str:
        """The width of the model that it was trained on, in words; "" where the attention layers do not
        tell.
        """
        attention = (shape for name, shape in self.changes if name.endswith("attn.q.weight"))
        width = next((shape[0] for shape in attention if len(set(shape)) == 1), None)
        if width is None:
            return ""
        return f", of width {width}" + (f" ({WIDTHS[width]})" if width in WIDTHS else "")


def read_lora(path: str | Path, own: Sequence[str] = (), header: Header | None = None) -> LoraFile:
    """What a LoRA file changes, from its header alone.

    own: names of the base's weights when the base is not a Wan. header: the file's, if it has been read.
    PEFT's adapter_config.json is read when it lies beside the file. Raises AptError with the first offending
    name for anything that is more than a sum (DoRA, LoKr, LoHa, OFT, ...), for the LoRA of another model, for
    unknown names, for a layer with half of its factors or with two changes, for quantised weights, and as
    `checkpoint_header.read_header` does.
    """
    path = Path(path)
    header = header or read_header(path)
    apt = metadata_json(path, header.metadata, "apt")
    if kind := unreadable_kind(header.shapes):
        raise AptError(
            f"{path} is {kind[1]} ({kind[0]}), but only LoRAs of two factors and plain differences can be "
            f"added: {REMEDY}."
        )
    found = {key: find_place(key, own) for key in header.shapes}
    places = {key: place for key, place in found.items() if place is not None}
    unknown = [key for key in found if key not in places]
    if unknown:
        if model := foreign_model(unknown):
            raise AptError(
                f"{path} is a LoRA of {model[1]} ({model[0]}), not of a Wan transformer alone: "
                "give a LoRA that was trained on this model."
            )
        what = "its base" if own else "a Wan transformer"
        remedy = "give a LoRA of this model, without other weights in it"
        if apt and not own:
            remedy = "add the base that it belongs to, if that is no Wan"
        raise AptError(f"{path}: {and_more(unknown)} cannot be placed in {what}: {remedy}.")
    if not places:
        raise AptError(f"{path} holds no tensors: copy or download it again.")

    parts: dict[str, dict[str, str]] = {}
    for key, place in places.items():
        before = parts.setdefault(place.layer, {}).setdefault(place.part, key)
        if before != key:
            raise AptError(
                f"{path} changes {place.layer} twice ({before}, {key}): give a file with one LoRA."
            )
    names = {place.layer: place.name for place in places.values()}
    ranks, changes = _read_shapes(path, header, parts, own)
    scales, alpha = _read_scales(path, header, parts, ranks, names)
    forms = dict.fromkeys(place.form for place in places.values())
    return LoraFile(path, " and ".join(forms), apt, header, ranks, changes, alpha, parts, scales, tuple(own))


def official_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone's weights by official name, without adapters; the model may be on "meta"."""
    official_name = as_backbone(model).official_name
    return {
        official_name(name): tuple(p.shape)
        for name, p in model.named_parameters()
        if ".adapters." not in name
    }


def own_names(model: nn.Module) -> tuple[str, ...]:
    """The argument `own` of `read_lora` for a backbone; empty for a Wan."""
    if as_backbone(model).official_name is transformer_to_official:
        return ()
    return tuple(name for name, _ in model.named_parameters() if ".adapters." not in name)


def read_lora_for(path: str | Path, model: nn.Module, base: object, header: Header | None = None) -> LoraFile:
    """Read a LoRA and check that it fits the backbone, which may be on "meta".

    base: what the messages call the backbone; header: the file's, if it has been read. Raises AptError as
    `read_lora` and `LoraFile.check`.
    """
    lora = read_lora(path, own_names(model), header)
    lora.check(official_shapes(model), base)
    return lora


@torch.no_grad()
def merge(model: nn.Module, deltas: Mapping[str, Delta]) -> nn.Module:
    """Add a LoRA that fits permanently to a backbone's weights, in place; return the backbone. Raises
    NotFinite for sums that fp16 cannot hold.
    """
    official_name = as_backbone(model).official_name
    for name, p in model.named_parameters():
        official = official_name(name)
        if official in deltas:
            p.copy_(deltas[official].add_to(p))
            if p.dtype == torch.float16 and not torch.isfinite(p).all():
                raise NotFinite(
                    f"with the LoRA added, {official} has weights beyond what fp16 can hold: use bf16 or "
                    f"fp32."
                )
    return model


def _read_shapes(
    path: Path, header: Header, parts: Mapping, own: Sequence[str]
) -> tuple[dict[str, int], list[tuple]]:
    """The ranks, and the shapes of the changes. Raises AptError for layers that lack a factor or whose
    factors do not fit together.
    """
    ranks, changes = {}, []
    for layer, found in parts.items():
        for part, key in found.items():
            dtype = header.dtypes[key]
            if dtype not in READABLE and not (part == "alpha" and dtype in ("I64", "I32")):
                raise AptError(
                    f"{path}: {key} is stored as {dtype}: only fp32, fp16, bf16 and plain fp8 can be read."
                )
        shape = {part: header.shapes[key] for part, key in found.items()}
        if ("down" in found) != ("up" in found) or (
            found.keys() & {"alpha", "up_bias"} and "up" not in found
        ):
            first = next(iter(found.values()))
            raise AptError(
                f"{path}: {layer} has only {first}: the file is incomplete, copy or download it again."
            )
        if "up" in found:
            down, up = shape["down"], shape["up"]
            if len(down) < 2 or len(up) < 2 or down[0] < 1 or up[1] != down[0] or math.prod(up[2:]) != 1:
                raise AptError(
                    f"{path}: the factors of {layer}, {down} and {up}, do not fit: copy or download it again."
                )
            ranks[layer] = down[0]
            changes.append((weight_of(layer, own), (up[0], *down[1:])))
        if math.prod(shape.get("alpha", ())) != 1:
            raise AptError(
                f"{path}: {found['alpha']} has shape {shape['alpha']}, but must be one number: copy or "
                f"download it again."
            )
        if {"up_bias", "diff_b"} <= found.keys():
            both = f"{found['up_bias']}, {found['diff_b']}"
            raise AptError(f"{path} changes the bias of {layer} twice ({both}): give a file with one LoRA.")
        changes += [(weight_of(layer, own), shape["diff"])] if "diff" in found else []
        changes += [(f"{layer}.bias", shape[part]) for part in ("up_bias", "diff_b") if part in found]
    return ranks, changes


def _read_scales(
    path: Path, header: Header, parts: Mapping, ranks: Mapping[str, int], names: Mapping[str, str]
) -> tuple[dict[str, float], str]:
    """The scales of layers without an alpha in the file, and in words where all scales come from."""
    without = [layer for layer in ranks if "alpha" not in parts[layer]]
    if not without:
        return {}, "in the file" if ranks else "none is needed"
    config, where = {}, ""
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in header.metadata:
        where = "lora_adapter_metadata"
        config = {
            name.removeprefix("transformer."): value
            for name, value in metadata_json(path, header.metadata, where).items()
        }
    elif path.name == "adapter_model.safetensors" and beside.is_file():
        where = beside.name
        config = read_object(beside, "copy it again, from beside its adapter_model.safetensors")
    if not where:
        return {}, "none: taken as the rank" if len(without) == len(
            ranks
        ) else "in the file, elsewhere taken as the rank"
    return _peft_scales(path, where, config, without, ranks, names), f"in {where}"


def _peft_scales(
    path: Path,
    where: str,
    config: Mapping,
    layers: Sequence[str],
    ranks: Mapping[str, int],
    names: Mapping[str, str],
) -> dict[str, float]:
    """Scale as PEFT does: alpha / rank, or alpha / sqrt(rank) with use_rslora. Raises AptError for settings
    that a plain LoRA does not have.
    """
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    start = str(config.get("init_lora_weights"))
    odd = {
        f"peft_type {kind}": kind != "LORA",
        "use_dora": config.get("use_dora"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        f"init_lora_weights {start}, which changes the base": start.lower().startswith(CHANGED_BASE),
    }
    for what, is_so in odd.items():
        if is_so:
            raise AptError(f"{path}: {where} says {what}, but only plain LoRAs can be added: {REMEDY}.")
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    numbers = [alpha, *patterns.values()] if isinstance(patterns, dict) else [None]
    if not all(
        isinstance(number, int | float) and type(number) is not bool and abs(number) < MOST
        for number in numbers
    ):
        raise AptError(
            f"{path}: {where} has lora_alpha {alpha!r}, alpha_pattern {json.dumps(patterns)}: they must be "
            f"numbers."
        )
    if wild := [name for name in patterns if not re.fullmatch(r"\^?[\w.]+", name)]:
        raise AptError(
            f"{path}: {where} has the pattern {wild[0]!r}, but only names of layers can be read: {REMEDY}."
        )

    def alpha_of(name: str) -> float:
        fits = (
            end for end in patterns if (name == end[1:] if end[0] == "^" else f".{name}".endswith(f".{end}"))
        )
        return patterns.get(next(fits, None), alpha)

    divisor = math.sqrt if config.get("use_rslora") else float
    return {layer: alpha_of(names[layer]) / divisor(ranks[layer]) for layer in layers}


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
