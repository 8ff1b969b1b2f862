"""LoRA on ONE frozen base that teacher, generator and discriminator share. Each role has its own adapters.

    add_adapters(base, ["generator", "discriminator"], rank=64)
    generator = role(base, "generator")
    discriminator = Discriminator(role(base, "discriminator"))
    teacher = role(base, None)

A role is a module that is called like the backbone; its parameters and its state dict are its own adapters.
One autograd graph may hold any number of calls of any roles, with or without activation checkpointing: a
block is bound to its role when it is called, so its recomputation in the backward pass, which happens outside
of the call, uses the same role.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AptError
from ..files.checkpoint_header import read_header
from ..files.contract import as_lora, is_lora_file, metadata_json, metadata_strings
from ..files.lora_keys import weight_of
from ..files.tensorfile import write_tensors
from .backbone import as_backbone
from .differences import add, clear_differences, differences, set_differences
from .lora_files import Delta, LoraFile, official_shapes, own_names, read_lora

BASE = "base"
LORA_PREFIX = "diffusion_model."
"""With official names after it, this is the only form of LoRA keys that both ComfyUI and diffusers load."""


class Switch:
    """Which role the adapted layers of a model use at this moment. One switch per model."""

    def __init__(self, roles: Sequence[str]):
        self.roles = tuple(roles)
        self.role: str | None = None

    def run(self, role: str, function: Callable, *args, **kwargs):
        """Run `function(*args, **kwargs)` in a role; the previous role comes back, also after an error."""
        before, self.role = self.role, role
        try:
            return function(*args, **kwargs)
        finally:
            self.role = before


class Adapter(nn.Module):
    """`B A x * scale`, where B starts at zero. The weights are fp32; it computes in the dtype of `x`."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        options = {"bias": False, "device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(linear.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, linear.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out]."""
        return (
            F.linear(F.linear(x, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype)) * self.scale
        )

    def delta(self) -> Tensor:
        """What the adapter adds to its layer's weight, fp32 [out, in]."""
        return _whole(self.lora_B.weight) @ _whole(self.lora_A.weight) * self.scale


class AdaptedLinear(nn.Linear):
    """A frozen linear layer, its weights under their old names, with an adapter for each role that adapts
    it.
    """

    def __init__(self, linear: nn.Linear, switch: Switch, rank: int, scale: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.switch = switch
        self.adapters = nn.ModuleDict({name: Adapter(linear, rank, scale) for name in switch.roles})

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out] for the switch's role."""
        role = self.switch.role
        if role is None:
            raise RuntimeError(
                "a layer with adapters ran outside of a role: call the model through "
                "apt_core.models.lora.role(model, name)."
            )
        y = super().forward(x)
        return y + self.adapters[role](x) if role in self.adapters else y


class _Blocks(nn.ModuleList):
    """A list of blocks. Iterating over it during a role's call gives the blocks bound to that role, so that a
    recomputation uses the same role.
    """

    def __init__(self, blocks: Sequence[nn.Module], switch: Switch):
        super().__init__(blocks)
        self.switch = switch

    def __iter__(self) -> Iterator[Callable]:
        if self.switch.role is None:
            return super().__iter__()
        return (partial(self.switch.run, self.switch.role, block) for block in super().__iter__())

    def __getitem__(self, index: int | slice):
        return (
            _Blocks(list(self._modules.values())[index], self.switch)
            if isinstance(index, slice)
            else super().__getitem__(index)
        )


def add_adapters(
    model: nn.Module,
    roles: Sequence[str],
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
) -> nn.Module:
    """Freeze `model` (a WanBackbone or MMDiTBackbone) and add adapters for each role to its linear layers;
    return the model.

    rank: of every adapter; alpha: scales them by alpha / rank (by default by 1); targets: endings of layer
    names such as "attn1.to_q", by default every linear layer inside the blocks. The model's own keys stay,
    and the adapters are added as `<layer>.adapters.<role>.lora_A.weight` and `lora_B`. A starts with the
    usual uniform numbers from torch's global generator.
    Call this before FSDP2 shards the model, so that each block is sharded with its adapters.

    Raises AptError for a model that already has adapters, unusable role names, a rank below 1, and targets
    that match no linear layer.
    """
    if isinstance(model.blocks, _Blocks):
        raise AptError(
            f"this model has adapters already, for {', '.join(model.blocks.switch.roles)}: "
            "name all roles at once."
        )
    if (
        not roles
        or len(set(roles)) < len(roles)
        or not all(name.isidentifier() and name != BASE for name in roles)
    ):
        raise AptError(f"roles must be different plain names other than {BASE!r}, got {list(roles)}.")
    if rank < 1:
        raise AptError(f"the rank of a LoRA must be at least 1, got {rank}.")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = [
        name
        for name in linears
        if (name.startswith("blocks.") if targets is None else _ends_in(name, targets))
    ]
    if idle := [target for target in targets or () if not any(_ends_in(name, [target]) for name in linears)]:
        known = sorted({name.split(".", 2)[2] for name in linears if name.startswith("blocks.")})
        raise AptError(f"no linear layer's name ends with {idle[0]!r}: the blocks have {', '.join(known)}.")

    model.requires_grad_(False)
    switch = Switch(roles)
    for name in chosen:
        model.set_submodule(
            name, AdaptedLinear(linears[name], switch, rank, 1.0 if alpha is None else alpha / rank)
        )
    model.blocks = _Blocks(list(as_backbone(model).blocks), switch)
    return model


class Role(nn.Module):
    """What `role` returns. `base` is the shared model; the submodules are this role's adapters, under the
    names of their layers.
    """

    base: nn.Module

    def __init__(self, base: nn.Module, name: str):
        super().__init__()
        self.__dict__["base"] = base  # not a submodule: its parameters are not this role's
        self.name = name
        below = as_backbone(base)
        self.config, self.image_conditioned = below.config, below.image_conditioned
        self.has_head = True
        for layer, module in base.named_modules():
            if isinstance(module, AdaptedLinear) and name in module.adapters:
                _attach(self, layer, module.adapters[name])

    def forward(self, *args, taps: Sequence[int] | None = None, **kwargs):
        """Like the backbone's forward pass, with the base's weights plus this role's adapters."""
        if taps is None and not self.has_head:
            raise AptError(
                "this role has no output head any more (drop_output_head): it can only be called with taps."
            )
        return cast(_Blocks, self.base.blocks).switch.run(self.name, self.base, *args, taps=taps, **kwargs)

    def adapters(self) -> dict[str, Adapter]:
        """This role's adapters, by the names of their layers."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Adapter)}

    def drop_output_head(self) -> None:
        """Remove this role's adapters of the output head, which would get no gradient. The shared base keeps
        its head.
        """
        self.has_head, head = False, tuple(as_backbone(self.base).output_head)
        self._drop([name for name in self.adapters() if name.startswith(head)])

    def keep_blocks(self, count: int) -> None:
        """Remove this role's adapters after the first `count` blocks, and those of the last block that would
        get no gradient.
        """
        base = as_backbone(self.base)
        idle = [f"blocks.{i}." for i in range(count, len(base.blocks))] + [
            f"blocks.{count - 1}.{layer}" for layer in base.text_only
        ]
        self._drop([name for name in self.adapters() if name.startswith(tuple(idle))])
        self.config = type(self.config)({**self.config, "num_layers": count})

    def _drop(self, layers: Sequence[str]) -> None:
        for layer in layers:
            del cast(AdaptedLinear, self.base.get_submodule(layer)).adapters[self.name]
            parent, _, leaf = layer.rpartition(".")
            delattr(self.get_submodule(parent), leaf)

    def enable_gradient_checkpointing(self, function: Callable | None = None) -> None:
        """Recompute blocks in the backward pass, for all roles of the base."""
        as_backbone(self.base).enable_gradient_checkpointing(function)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations again, for all roles of the base."""
        as_backbone(self.base).disable_gradient_checkpointing()


def role(model: nn.Module, name: str | None) -> Role:
    """The model in one of its roles; None or "base" is the frozen base alone. It only holds references, so it
    costs no memory.

    Raises AptError for a model without adapters and for a role that it does not have.
    """
    roles = model.blocks.switch.roles if isinstance(model.blocks, _Blocks) else ()
    if not roles or name not in (None, BASE, *roles):
        raise AptError(
            f"the model has no role {name!r}, only {', '.join((BASE, *roles))}: name it in add_adapters."
        )
    return Role(model, name or BASE)


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The role's weights, `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank], fp32.
    They are the live tensors (DTensors when sharded).
    """
    return role(model, name).state_dict()


@torch.no_grad()
def merged_state(model: nn.Module, name: str | None) -> dict[str, Tensor]:
    """State dict of a model without adapters that computes the same as the role: `W + B A alpha / rank` and
    the role's differences, summed in fp32.

    Keys, shapes and dtypes are the base's. A sharded model gives whole tensors, and all ranks must call.
    Raises AptError as `role` does.
    """
    adapters, others = role(model, name).adapters(), differences(model, name or BASE)
    state = {}
    for key, value in model.state_dict().items():
        if ".adapters." in key:
            continue
        layer = key.removesuffix(".weight")
        changes = [adapters[layer].delta()] if layer in adapters else []
        state[key] = add(_whole(value), *changes, *([others[key]] if key in others else []))
    return state


@torch.no_grad()
def fold(model: nn.Module, name: str) -> nn.Module:
    """Remove the adapters from `model` and add the role's to its weights, in place; return the model. Sums in
    fp32, as `merged_state`.
    """
    adapters, others = role(model, name).adapters(), differences(model, name)
    parameters = dict(model.named_parameters())
    for key, change in others.items():
        parameters[key].copy_(add(parameters[key], change))
    clear_differences(model, name)
    for layer, module in list(model.named_modules()):
        if not isinstance(module, AdaptedLinear):
            continue
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        if layer in adapters:
            plain.weight.copy_(module.weight.float() + adapters[layer].delta())
        model.set_submodule(layer, plain)
    model.blocks = nn.ModuleList(as_backbone(model).blocks)
    return model


@torch.no_grad()
def lora_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The role as the tensors of a LoRA file: `diffusion_model.<official name>.lora_A.weight` and
    `.lora_B.weight`. alpha / rank is multiplied into B, so that strength 1 is right without an alpha. The
    role's differences come with them (see `difference_state`). A sharded model gives whole tensors, and all
    ranks must call.

    An MMDiT has only its own names, and no other program reads them. Raises AptError as `role` does.
    """
    state, official_name = {}, as_backbone(model).official_name
    for layer, adapter in role(model, name).adapters().items():
        official = LORA_PREFIX + official_name(layer)
        state[f"{official}.lora_A.weight"] = _whole(adapter.lora_A.weight)
        state[f"{official}.lora_B.weight"] = _whole(adapter.lora_B.weight) * adapter.scale
    return state | difference_state(model, name)


def difference_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The role's differences as the tensors of a LoRA file, `diffusion_model.<official name>.diff` and
    `.diff_b`; {} where it has none.
    """
    state, official_name = {}, as_backbone(model).official_name
    for key, change in differences(model, name).items():
        official = LORA_PREFIX + official_name(key)
        layer = official.removesuffix(".bias")
        state[f"{layer}.diff_b" if layer != official else f"{official.removesuffix('.weight')}.diff"] = change
    return state


def save_lora(
    path: str | Path, model: nn.Module, name: str, metadata: Mapping, dtype: torch.dtype = torch.float32
) -> None:
    """Write the role as a LoRA file that ComfyUI and diffusers load unchanged. For a sharded model, call
    `lora_state` on all ranks and let rank 0 write.

    metadata: as for `checkpoint.save_generator`, plus {kind: "lora", rank} in `apt`. Raises AptError as
    `lora_state` does, for NaN or infinite weights, and when the file cannot be written; a file that was at
    `path` then stays.
    """
    state = lora_state(model, name)
    rank = next(iter(state.values())).shape[0]
    strings = metadata_strings(path, as_lora(metadata, rank))
    write_tensors(path, {key: value.to(dtype) for key, value in state.items()}, strings)


@torch.no_grad()
def load_lora(lora: str | Path | LoraFile, model: nn.Module, name: str) -> None:
    """Read a LoRA in any form of `lora_files` into the role. It is exact, up to the rounding of the scale.
    lora: the file's path, or what its header said (`lora_files.read_lora`).

    A file of lower rank than the role's fills the first directions of each adapter. The other directions, and
    layers that the file does not change, add zero: B is zero there and A stays as it is, so that they can
    learn. What the file changes beside the layers that the role adapts becomes the role's differences, which
    are not trained. On "meta" only the shapes of these are set, and no weight is read.
    Raises AptError, which says what to do, for a damaged file, a whole model, the LoRA of another model, and
    a higher rank than that of the role's adapters; it then changes nothing.
    """
    lora, on_meta = _open_lora(lora, model, name), next(model.parameters()).is_meta
    official_name, adapters = as_backbone(model).official_name, role(model, name).adapters()
    adapted = {official_name(layer) for layer in adapters}
    deltas = {} if on_meta else lora.load()
    for layer, adapter in ({} if on_meta else adapters).items():
        delta = deltas.get(f"{official_name(layer)}.weight", Delta())
        adapter.lora_B.weight.zero_()
        if delta.up is not None and delta.down is not None:
            rank = len(delta.down)
            adapter.lora_A.weight[:rank] = delta.down.to(adapter.lora_A.weight.dtype)
            adapter.lora_B.weight[:, :rank] = (
                delta.up.to(adapter.lora_B.weight.dtype) * delta.scale / adapter.scale
            )
    parameters = {
        official_name(key): (key, p) for key, p in model.named_parameters() if ".adapters." not in key
    }
    changes = {}
    for layer, parts in lora.parts.items():
        weight = weight_of(layer, lora.own)
        if "diff" in parts or ("down" in parts and layer not in adapted):
            delta = deltas.get(weight, Delta())
            beside = Delta(delta.full) if layer in adapted else delta
            changes[parameters[weight][0]] = beside.change(parameters[weight][1])
        if parts.keys() & {"up_bias", "diff_b"}:
            key, p = parameters[f"{layer}.bias"]
            changes[key] = deltas.get(f"{layer}.bias", Delta()).change(p)
    set_differences(model, cast(_Blocks, model.blocks).switch, name, changes)


def _open_lora(lora: str | Path | LoraFile, model: nn.Module, name: str) -> LoraFile:
    """The LoRA, if the role can hold it exactly. Raises AptError as `load_lora` does."""
    if not isinstance(lora, LoraFile):
        header = read_header(lora)
        if not is_lora_file(metadata_json(lora, header.metadata, "apt"), header.shapes):
            raise AptError(f"{lora} is a whole transformer, not a LoRA: load it as the base.")
        lora = read_lora(lora, own_names(model), header)
    lora.check(official_shapes(model))  # one that is handed on may have been read for another model
    official_name = as_backbone(model).official_name
    adapters = role(model, name).adapters().items()
    ranks = {official_name(layer): len(adapter.lora_A.weight) for layer, adapter in adapters}
    if high := {layer: rank for layer, rank in lora.ranks.items() if rank > ranks.get(layer, rank)}:
        layer, rank = max(high.items(), key=lambda pair: pair[1])
        raise AptError(
            f"{lora.path} has rank {rank} at {layer}, but the adapters have {ranks[layer]}: take rank {rank} "
            f"(lora_rank={rank}) or more, or a LoRA of lower rank."
        )
    return lora


def _whole(value: Tensor) -> Tensor:
    whole = getattr(value, "full_tensor", None)  # a DTensor's
    return value if whole is None else whole()


def _ends_in(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, leaf = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)
