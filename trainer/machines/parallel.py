"""How a network is spread over the processes of a run: FSDP2 over its blocks, fp32 masters with bf16 compute,
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

# FSDP2 warns of every output that is a view; nothing here changes one in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class Parallel:
    """How a run uses its processes. Nothing here changes the training, apart from rounding.

    microbatch: samples that a process computes at once; gradients are accumulated over the rest of its share
        of the batch. None: the whole share at once.
    compute: dtype of the matrix products. Weights, gradients, optimizer state and averages are always fp32.
    generator_zero, discriminator_zero: the ZeRO stage. 3 gathers each block when it is needed and takes the
        least memory; 2 gathers once per update and keeps the gathered weights, 2 bytes per parameter.
    sync_every_microbatch: reduce gradients after each microbatch, for a network whose unsharded fp32 gradient
        does not fit in memory; otherwise they are reduced once per update.
    checkpointing: "blocks" recomputes each block in the backward pass; "offload" does too, and keeps the
        blocks' inputs in the CPU's memory.
    compile: torch.compile the blocks with this backend ("inductor").
    context_parallel: how many processes divide the tokens of one sample.
    attention: the attention backend of all networks, by its name in diffusers. None: the one that is set for
        the process.
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
        """Whether even a single process needs FSDP2."""
        return self.compute != "fp32"


def parallel_of(preset: Preset, device: str) -> tuple[Parallel, Backend]:
    """The preset's parallel settings, and the attention backend that they mean on `device`. Raises AptError
    as `attention_of` does.
    """
    backend = attention_of(preset, device)
    settings = {field.name: getattr(preset.train, field.name) for field in fields(Parallel)}
    return Parallel(**settings | {"attention": backend.name}), backend


def attention_of(preset: Preset, device: str) -> Backend:
    """The attention backend that training uses on `device`. Raises AptError as `choose_backend` does, and for
    a torch.compile backend that cannot be used.
    """
    if preset.train.compile:
        if preset.train.compile not in (known := torch._dynamo.list_backends()):
            raise AptError(
                f"compile={preset.train.compile} is not a backend of torch.compile: use one of "
                f"{', '.join(known)}."
            )
        check_compile(torch.device(device))
    dtype = torch.bfloat16 if preset.train.compute == "bf16" else torch.float32
    return choose_backend(preset.train.attention, device, dtype, preset.model.head_dim, training=True)


def place(
    make: Callable[[torch.device], nn.Module], world: World, parallel: Parallel, zero: int = 3
) -> nn.Module:
    """A network on this process's device, sharded over all processes if the run is sharded.

    make(device): builds the network with its weights, or without weights on device "meta". In a sharded run
    only the main process reads weights: it builds the whole network on the CPU and sends every other process
    its part. zero: the ZeRO stage, see Parallel.
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
    # Buffers such as RoPE's tables are not in the state dict.
    tables = dict(whole.named_buffers()) if world.main else {}
    for name, buffer in model.named_buffers():
        if world.main:
            buffer.copy_(tables[name])
        dist.broadcast(buffer, 0, group=world.everyone.get_group())
    return model


def shard(model: nn.Module, world: World, parallel: Parallel, zero: int) -> None:
    """Apply FSDP2 in place: to each block and each head separately, then to the rest.

    FSDP2 does not cast inputs here: `cast_forward_inputs` would turn timestep 701 into 700, so the networks
    cast latents and text themselves. The time embedder and the discriminator's heads, last norm and logit
    compute in fp32. So do the modulation tables and norms of a frozen 16-bit base, which are not sharded.
    Gradients are averaged over all processes in fp32.

    Why the heads are fp32: at sigma 0.01 rounding makes up half of aR1 with the heads in bf16 and three
    tenths with them in fp32 (the miniature's base after 40 updates, measured with objectives.penalty_floor).
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
    """Apply FSDP2 to what a discriminator adds to a shared base: the heads, the norm and the logit. The base
    is sharded already, and the new weights must be the same on all processes.
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
    """The frozen fp32 weights of a 16-bit base, except the time embedder's. They are not sharded, because
    FSDP2 would round them to the dtype of their block.
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
    """Drop gathered copies of sharded weights. Call it whenever weights or `requires_grad` change outside a
    backward pass, because the copies would be outdated.
    """
    for model in models:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def whole_state(state: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """A sharded state dict, gathered as plain CPU tensors in the main process; {} in all others. All
    processes must call this together.
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
