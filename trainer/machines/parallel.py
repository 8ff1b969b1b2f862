"""How one network lies on the processes of a run: FSDP2 over its blocks, fp32 masters under bf16 compute,
activation checkpointing.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from apt_core.engine.context_parallel import enable
from apt_core.engine.fast import check_compile, keep_compiled
from apt_core.engine.text_cache import cache_folder
from apt_core.errors import AptError
from apt_core.method.discriminator import Discriminator
from apt_core.models.attention import Backend, choose_backend
from apt_core.models.precision import stays_fp32
from trainer.config import Preset
from trainer.machines.checkpointing import offloaded
from trainer.machines.distributed import World

# Said of every output that is a view; nobody here changes one in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class Parallel:
    """How a run uses its processes; none of it changes what is learned beyond rounding.

    microbatch: samples that one process takes at once; the rest of a batch is accumulated. None: its whole
    share.
    compute: what matrix products run in; weights, gradients, optimizer state and averages are fp32 either
    way.
    generator_zero, discriminator_zero: 3 gathers each block when it is needed (least memory); 2 keeps the
    gathered weights for the whole update, 2 bytes a parameter, and gathers once.
    sync_every_microbatch: reduce gradients after each microbatch, where one unsharded fp32 gradient of a
    network does not fit; else once an update.
    checkpointing: recompute each block in the backward pass; "offload" also keeps what it starts from in the
    CPU's memory.
    compile: torch.compile the blocks with this backend ("inductor").
    context_parallel: how many processes share one sample's tokens.
    attention: diffusers' name of the attention backend, of the discriminator's backbone as of all others;
    None: the one set for the process.
    """

    microbatch: int | None = None
    compute: Literal["fp32", "bf16"] = "fp32"
    generator_zero: Literal[2, 3] = 3
    discriminator_zero: Literal[2, 3] = 3
    sync_every_microbatch: bool = False
    checkpointing: Literal["none", "blocks", "offload"] = "none"
    compile: str | None = None
    context_parallel: int = 1
    attention: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether even a single process needs FSDP2's bookkeeping."""
        return self.compute != "fp32"


def parallel_of(preset: Preset, device: str) -> tuple[Parallel, Backend]:
    """What a preset says of it, and the attention backend that it is on `device`. Raises AptError as
    `choose_backend` does.
    """
    backend = attention_of(preset, device)
    settings = {field.name: getattr(preset.train, field.name) for field in fields(Parallel)}
    return Parallel(**settings | {"attention": backend.name}), backend


def attention_of(preset: Preset, device: str) -> Backend:
    """The attention backend of a training on `device`. Raises AptError as `choose_backend` does, and for a
    compiler that cannot be used.
    """
    if preset.train.compile:
        if preset.train.compile not in (known := torch._dynamo.list_backends()):
            raise AptError(
                f"compile={preset.train.compile} is no compiler of torch's: use {', '.join(known)}."
            )
        check_compile(torch.device(device))
    dtype = torch.bfloat16 if preset.train.compute == "bf16" else torch.float32
    return choose_backend(preset.train.attention, device, dtype, preset.model.head_dim, training=True)


def place(
    make: Callable[[torch.device], nn.Module], world: World, parallel: Parallel, zero: int = 3
) -> nn.Module:
    """A network on its device, sharded over the world where there is one.

    make(device) builds it with its weights, or on "meta" without any. With sharding only the main process
    builds it whole, on the CPU, and sends each other one its part; nobody else reads weights.
    """
    if world.everyone is None:
        return _prepare(make(world.device), world, parallel)
    whole = make(torch.device("cpu")) if world.main else None
    with torch.device("meta"):
        model = _prepare(make(torch.device("meta")), world, parallel)
    shard(model, world, parallel, zero)
    model.to_empty(device=world.device)
    state = whole.state_dict() if world.main else {}
    set_model_state_dict(
        model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
    # Tables like RoPE's are in no state dict.
    tables = dict(whole.named_buffers()) if world.main else {}
    for name, buffer in model.named_buffers():
        if world.main:
            buffer.copy_(tables[name])
        dist.broadcast(buffer, 0, group=world.everyone.get_group())
    return model


def shard(model: nn.Module, world: World, parallel: Parallel, zero: int) -> None:
    """FSDP2 in place: each block and each head on its own, then the rest.

    Inputs are not cast here (`cast_forward_inputs` would turn timestep 701 into 700): the networks cast
    latents and text themselves. The time embedder and the discriminator's heads, last norm and logit compute
    in fp32 (at sigma 0.01 rounding is half of aR1 with heads in bf16, and three tenths with them in fp32: the
    miniature's base after 40 updates, objectives.penalty_floor); so do the modulation tables and norms of a
    frozen base in 16 bits, which each process has whole. Gradients are averaged over all processes in fp32.
    """
    mixed, exact, options = _policies(world, parallel, zero)
    options["ignored_params"] = _kept_whole(model)
    for name, part in list(model.named_modules()):
        if name.endswith("time_embedder"):
            fully_shard(part, mp_policy=exact, **options)
    for block in blocks(model):
        fully_shard(block, mp_policy=mixed, **options)
    if not isinstance(model, Discriminator):
        fully_shard(model, mp_policy=mixed, **options)
        return
    for head in model.heads:
        fully_shard(head, mp_policy=exact, **options)
    fully_shard(model.backbone, mp_policy=mixed, **options)
    fully_shard(model, mp_policy=exact, **options)


def shard_heads(model: Discriminator, world: World, parallel: Parallel) -> None:
    """FSDP2 for what a discriminator adds to a role of a shared base, which is sharded already. Its weights
    are the same everywhere.
    """
    if world.everyone is None:
        return
    if world.cp > 1:
        enable(model, world.cp_group)
    _, exact, options = _policies(world, parallel, parallel.discriminator_zero)
    for head in model.heads:
        fully_shard(head, mp_policy=exact, **options)
    fully_shard(model, mp_policy=exact, ignored_params=set(model.backbone.parameters()), **options)


def _kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Frozen weights in fp32 among 16-bit ones, other than the time embedder's: their block's group would
    round them to its own dtype.
    """
    backbone = model.backbone if isinstance(model, Discriminator) else model
    if backbone.patch_embedding.weight.dtype == torch.float32:
        return set()
    named = (
        (name, p)
        for name, p in backbone.named_parameters()
        if not p.requires_grad and "time_embedder" not in name
    )
    return {p for name, p in named if p.dtype == torch.float32 and stays_fp32(backbone, name)}


def _policies(
    world: World, parallel: Parallel, zero: int
) -> tuple[MixedPrecisionPolicy, MixedPrecisionPolicy, dict]:
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    mixed = replace(exact, param_dtype=torch.bfloat16) if parallel.compute == "bf16" else exact
    return mixed, exact, {"mesh": world.everyone, "reshard_after_forward": zero == 3}


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The transformer blocks of a generator or a discriminator."""
    return model.backbone.blocks if isinstance(model, Discriminator) else model.blocks


def reshard(*models: nn.Module) -> None:
    """Forget gathered weights. Needed wherever weights or `requires_grad` change outside of a backward pass:
    gathered copies would go stale.
    """
    for model in models:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def whole_state(state: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """A sharded state dict as plain tensors on the CPU of the main process; {} elsewhere. All processes must
    call.
    """
    out = {}
    for name, value in state.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if world.main:
            out[name] = value.detach().cpu()
    return out


def _prepare(model: nn.Module, world: World, parallel: Parallel) -> nn.Module:
    if world.cp > 1:
        enable(model, world.cp_group)
    backbone = model.backbone if isinstance(model, Discriminator) else model
    if parallel.attention:
        backbone.use_attention(parallel.attention)
    if parallel.checkpointing != "none":
        backbone.enable_gradient_checkpointing(offloaded if parallel.checkpointing == "offload" else None)
    if parallel.compile:
        keep_compiled(cache_folder() / "compiled")
        for block in blocks(model):
            block.compile(backend=parallel.compile)
    return model
