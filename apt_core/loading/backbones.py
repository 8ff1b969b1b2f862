"""The one list of kinds of backbone: how to recognise, load, save and build each. `register` adds to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from ..errors import AptError
from ..files.checkpoint_header import read_header
from ..files.tensorfile import Header
from ..models.lora import Role


@dataclass(frozen=True)
class Kind:
    """One kind of backbone.

    words: its name in messages, "a Wan transformer". is_model(object), is_file(header): whether the object or
    the file with this header is of this kind. config(path, header): the arguments of the model in a file or
    folder, without reading a weight; header: the file's, None for a folder. load(path, dtype, device);
    save(path, state or model, config, metadata, dtype). build(layers, heads, head_dim, ffn, channels,
    text_dim): an untrained model. public: whether ComfyUI and diffusers read its files.
    """

    name: str
    words: str
    is_model: Callable[[object], bool]
    is_file: Callable[[Header], bool]
    config: Callable[[Path, Header | None], Mapping]
    load: Callable[..., nn.Module]
    save: Callable[..., None]
    build: Callable[[int, int, int, int, int, int], nn.Module]
    public: bool = False


WAN = "wan"
_TARGETS: dict[str, str | Kind] = {
    WAN: ".checkpoint:WAN_KIND",
    "mmdit": ".mmdit_files:MMDIT_KIND",
}


def register(kind: Kind) -> None:
    """Make a kind known to loading, training, export and presets (`model.kind`). Its class may be a subclass
    of another kind's. Raises AptError for a name that is already in use.
    """
    if kind.name in _TARGETS and _TARGETS[kind.name] is not kind:
        raise AptError(f"a backbone named {kind.name!r} exists already: give the new one another name.")
    _TARGETS[kind.name] = kind


def kinds() -> list[str]:
    """The names that `kind_named` accepts."""
    return list(_TARGETS)


def kind_named(name: str) -> Kind:
    """The kind with this name. Raises AptError for a name that is not registered."""
    if name not in _TARGETS:
        raise AptError(f"there is no backbone named {name!r}: use one of {', '.join(_TARGETS)}.")
    target = _TARGETS[name]
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = _TARGETS[name] = getattr(import_module(module, __package__), attribute)
    return target


def kind_of_file(path: str | Path, header: Header | None = None) -> Kind:
    """The kind of a file; Wan when no other kind recognises it, and for a folder. header: the file's, if it
    has been read. Raises AptError as `read_header` does.
    """
    if header is None and Path(path).is_file():
        header = read_header(path)
    others = (kind_named(name) for name in _TARGETS if name != WAN)
    return next((kind for kind in others if header and kind.is_file(header)), kind_named(WAN))


def kind_of(model: object) -> Kind:
    """The kind of a model, also when FSDP wraps it, and of the base under a role. Raises AptError for an
    object that is not a backbone.
    """
    model = model.base if isinstance(model, Role) else model
    for kind in map(kind_named, reversed(_TARGETS)):  # the newest first: it may be a subclass of an older one
        if kind.is_model(model):
            return kind
    raise AptError(
        f"{type(model).__name__} is not a registered backbone: "
        "add it with apt_core.loading.backbones.register."
    )


def load_backbone(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> nn.Module:
    """The transformer at `path`, of the kind that its file names. Raises AptError as the kind's own
    `load`.
    """
    return kind_of_file(path).load(path, dtype=dtype, device=device)
