"""What a stage needs, computed from the preset alone, without touching a weight: parameters, FLOPs per
update, and bytes per GPU by kind. What its networks count is in trainer.machines.counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apt_core.errors import AptError
from apt_core.models.wan import tap_blocks
from trainer.config import Model, Preset, Train
from trainer.machines.counts import (
    Sizes,
    adversarial_flops,
    distill_flops,
    head_parameters,
    sizes_of,
    tokens,
)

STAGES = ("distill", "image", "video")
BLOCK_BYTES = (68.0, 4.15)
"""What one block needs in bf16 while it runs forward and backward again from its checkpoint, bytes per token:
so many times the width, and so many times ffn. The two numbers are fitted to measurements of the three Wan
models (92 d, 87 d and 79 d for 1.3B, 5B and 14B) and reproduce them within 1%.
"""
KEPT_BYTES = {"full": (54.0, 4.0), "lora": (41.0, 4.0), "frozen": (35.0, 2.0)}
"""What one block keeps without checkpoints until its backward pass, as above: with its own weights trained,
with adapters trained, and frozen on the way to its input. Counted in tests/trainer/test_live_memory.py, as is
all else that is in memory.
"""
PASS_BYTES = (8.0, 6.0)
"""What one block with adapters holds at most while a pass that keeps nothing goes through it, as above."""


@dataclass(frozen=True)
class Account:
    """What one stage needs.

    samples: (visual tokens of one sample, samples in an update), by kind of sample.
    parameters: the number of parameters, by network.
    flops: FLOPs of one update over the whole batch.
    memory: bytes on each GPU, by kind.
    updates: how many updates the stage has.
    warmup: FLOPs of all warm-up updates together; they come first and train only the discriminator.
    """

    samples: dict[str, tuple[int, int]]
    parameters: dict[str, int]
    flops: float
    memory: dict[str, float]
    updates: int
    warmup: float = 0.0

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    def gpu_hours(self, flops_per_second: float) -> float:
        """GPU-hours of the whole stage, including warm-up, if one GPU computes this many FLOP/s."""
        return (self.flops * self.updates + self.warmup) / flops_per_second / 3600


def base_bytes(sizes: Sizes, compute: str, gpus: int) -> float:
    """Bytes on each GPU of the frozen base in LoRA mode. It is stored in the compute dtype, except for the
    weights that stay fp32.
    """
    if compute == "fp32":
        return 4 * sizes.body / gpus
    return (2 * (sizes.body - sizes.time - sizes.exact) + 4 * sizes.time) / gpus + 4 * sizes.exact


def account(preset: Preset, stage: str, recipe: str | None = None, gpus: int = 1, frozen: int = 0) -> Account:
    """The account of a stage on this many GPUs. stage: "distill", or "image" or "video" of stage 2.

    frozen: bytes of what stage 2's start changes beside the layers that adapters adapt
    (trainer.stages.networks.Start); counted in LoRA mode alone.

    Raises AptError as `check_split` does.
    """
    check_split(preset, stage, recipe, gpus)
    if stage == "distill":
        return _distill(preset, gpus)
    return _adversarial(preset, stage, recipe or preset.default_recipe, gpus, frozen)


def summary(preset: Preset, speed: float = 400e12) -> list[str]:
    """The table at the top of a preset's file: GiB per GPU by mode and number of GPUs, and GPU-hours at this
    speed (FLOP/s of one GPU).
    """
    lines = [f"GiB on each GPU ({preset.default_recipe}):  stage 1  images  videos"]
    for mode in ("full", "lora"):
        for gpus in (1, 8):
            train = preset.train.model_copy(
                update={"mode": mode, "context_parallel": min(preset.train.context_parallel, gpus)}
            )
            changed = preset.model_copy(update={"train": train})
            sizes = [account(changed, stage, None, gpus).bytes / 2**30 for stage in STAGES]
            lines.append(
                f"  {mode}, {gpus} GPU{'s' if gpus > 1 else ' '}" + "".join(f"{size:9.1f}" for size in sizes)
            )
    lines.append(f"GPU-hours at {speed / 1e12:g} TFLOP/s:")
    for recipe in preset.stage2:
        alone = preset.with_recipe(recipe, ("train.context_parallel=1",))
        hours = [account(alone, stage, recipe).gpu_hours(speed) for stage in STAGES]
        lines.append(f"  {recipe:<12}" + "".join(f"{number:9.0f}" for number in hours))
    return lines


def check_split(preset: Preset, stage: str, recipe: str | None, gpus: int) -> None:
    """Raises AptError if `context_parallel` does not divide the attention heads or the GPUs, or if a batch
    does not divide over GPUs and microbatches.
    """
    cp, model = preset.train.context_parallel, preset.model
    kinds = ("image", "video") if stage == "distill" else (stage,)
    if model.heads % cp:
        fitting = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        near = min(fitting, key=lambda n: abs(n - cp))
        raise AptError(
            f"context_parallel={cp} does not divide the {model.heads} attention heads of {preset.name}: use "
            f"{near}."
        )
    if gpus % cp:
        raise AptError(
            f"context_parallel={cp} does not divide {gpus} processes: use a multiple of {cp}, or "
            f"context_parallel={math.gcd(cp, gpus)}."
        )
    for kind in kinds:
        batch, step = batch_of(preset, stage, kind, recipe), gpus // cp * (preset.train.microbatch or 1)
        if batch % step:
            name = f"batch_{kind}" if stage == "distill" else "batch"
            below, above = batch // step * step, (batch // step + 1) * step
            near = f"{below} or {above}" if below else str(above)
            each = (
                f" of {preset.train.microbatch} samples at once" if (preset.train.microbatch or 1) > 1 else ""
            )
            raise AptError(
                f"{name}={batch} does not divide over {gpus // cp} groups of processes{each}: use {near}."
            )


def batch_of(preset: Preset, stage: str, kind: str, recipe: str | None) -> int:
    if stage == "distill":
        return getattr(preset.distill, f"batch_{kind}")
    return preset.phase(stage, recipe).batch


def _adversarial(preset: Preset, stage: str, recipe: str, gpus: int, frozen: int) -> Account:
    settings, train, model = preset.phase(stage, recipe), preset.train, preset.model
    sizes, n, lora = sizes_of(model, train.lora_rank), tokens(preset, stage), train.mode == "lora"
    inner = train.head_width or model.width
    taps = tap_blocks(model.layers, settings.taps)
    heads = head_parameters(model, inner, len(taps))
    of_discriminator, of_generator = adversarial_flops(preset, settings, n, taps)

    micro = _microbatch(train, settings.batch, gpus)
    penalties = [weight > 0 for weight in (settings.r1_weight, settings.r2_weight)]
    most_passes = 2 + sum(penalties) * math.ceil(settings.reg_fraction * micro) / micro
    averages = len({settings.ema_decay, *train.ema_decays})
    shard = 1 / gpus
    if lora:
        body_of_d = sizes.adapter // model.layers * taps[-1]
        counted = {
            "base": sizes.body,
            "generator's LoRA": sizes.adapter,
            "discriminator's LoRA": body_of_d,
            "discriminator's heads": heads,
        }
        trained = sizes.adapter
        memory = {"frozen base": base_bytes(sizes, train.compute, gpus)}
        if frozen:
            starting = 2 if settings.discriminator_start == "start" else 1
            memory["what the start changes beside adapters"] = frozen * starting
    else:
        body_of_d = sizes.body - sizes.output - (model.layers - taps[-1]) * sizes.block
        counted = {"generator": sizes.body, "discriminator": body_of_d, "discriminator's heads": heads}
        trained, memory = sizes.body, {}
    still = 0 if settings.train_backbone else body_of_d
    states = (trained, body_of_d - still + heads)
    accumulates = settings.batch // (gpus // train.context_parallel) > micro
    whole_gradients = gpus > 1 and accumulates and not train.sync_every_microbatch
    largest_layer = max(sizes.block, heads // len(taps) * 4 // _width(train.compute))
    zeros = [train.generator_zero] if lora else [train.generator_zero, train.discriminator_zero]
    memory |= {
        "weights (fp32)": 4 * (sum(states) + still) * shard,
        "optimizer": 4 * sum(states) * shard,
        "averages": 4 * averages * trained * shard,
        "gradients": 4 * max(states) * (1 if whole_gradients else shard),
        "gathered weights": _gathered(sizes, train.compute, gpus, largest_layer, zeros),
    }
    kept, judged, block = _activations(preset, n, micro)
    # The heads compute in fp32, see trainer.machines.parallel.shard. They run behind all blocks, so their
    # backward passes are over before a block is run again.
    at_heads = len(taps) * n / train.context_parallel * micro * 4 * (2 * model.width + 3 * inner)
    largest = max(at_heads, block)
    at_once = {
        "two_pass": kept + largest,
        "batched": most_passes * (kept + largest),
        "separate": most_passes * kept + (most_passes - 1) * at_heads + largest,
    }
    memory["activations"] = max(at_once[settings.discriminator_step], kept + judged + largest)
    flops = settings.batch * (of_discriminator + of_generator)
    warmup = settings.warmup * settings.batch * of_discriminator
    return Account({stage: (n, settings.batch)}, counted, flops, memory, settings.updates, warmup)


def _distill(preset: Preset, gpus: int) -> Account:
    settings, train, model = preset.distill, preset.train, preset.model
    sizes, lora = sizes_of(model, train.lora_rank), train.mode == "lora"
    samples = {
        "image": (tokens(preset, "image"), settings.batch_image),
        "video": (tokens(preset, "video"), settings.batch_video),
    }
    shares = {"image": 1 - settings.video_share, "video": settings.video_share}
    flops = sum(shares[kind] * batch * distill_flops(preset, n) for kind, (n, batch) in samples.items())

    averages, shard = len({settings.ema_decay, *train.ema_decays}), 1 / gpus
    trained = sizes.adapter if lora else sizes.body
    if settings.method == "dmd":
        target, fake, zeros = 0, sizes.adapter, [train.generator_zero] * (1 if lora else 2)
        counted = {"base": sizes.body, "generator's LoRA" if lora else "generator": trained}
        counted |= {"fake score's LoRA": fake}
    else:
        target, fake = (trained if settings.target_decay else 0), 0
        zeros = [train.generator_zero] if lora else [train.generator_zero, train.discriminator_zero]
        counted = {
            "base" if lora else "teacher": sizes.body,
            "student's LoRA" if lora else "student": trained,
        }
    if lora or settings.method == "dmd":
        memory = {"frozen base": base_bytes(sizes, train.compute, gpus)}
    else:
        memory = {"teacher": 4 * sizes.body * shard}
    n, micro, batch = max(
        ((n, _microbatch(train, batch, gpus), batch) for kind, (n, batch) in samples.items() if shares[kind]),
        key=lambda one: one[0] * one[1],
    )
    whole_gradients = (
        gpus > 1 and not train.sync_every_microbatch and batch // (gpus // train.context_parallel) > micro
    )
    kept, _, block = _activations(preset, n, micro)
    if settings.method == "dmd":  # both scores look at the sample while the pass that made it is kept
        block = max(block, _share(train, n, micro) * _of_block(model, *PASS_BYTES))
    memory |= {
        "weights (fp32)": 4 * (trained + target + fake) * shard,
        "optimizer": 8 * (trained + fake) * shard,
        "averages": 4 * (averages * trained + target) * shard,
        "gradients": 4 * max(trained, fake) * (1 if whole_gradients else shard),
        "gathered weights": _gathered(sizes, train.compute, gpus, sizes.block, zeros),
        "activations": kept + block,
    }
    return Account(samples, counted, flops, memory, settings.updates)


def _microbatch(train: Train, batch: int, gpus: int) -> int:
    return train.microbatch or max(1, batch // (gpus // train.context_parallel))


def _activations(preset: Preset, n: int, micro: int) -> tuple[float, float, float]:
    """Activation bytes: (what one pass through a trained network keeps until its backward pass, what one
    through a frozen network does, what one block needs in addition while it is recomputed).
    """
    model, train = preset.model, preset.train
    share = _share(train, n, micro)
    if train.checkpointing == "none":
        trained, frozen = (
            model.layers * share * _of_block(model, *KEPT_BYTES[how]) for how in (train.mode, "frozen")
        )
        return trained, frozen, 0.0
    kept = (2 if train.checkpointing == "offload" else model.layers) * share * 2 * model.width
    return kept, kept, share * _of_block(model, *BLOCK_BYTES)


def _share(train: Train, n: int, micro: int) -> float:
    """Tokens of a microbatch on one GPU, in numbers of 2 bytes."""
    return n / train.context_parallel * micro * _width(train.compute) / 2


def _of_block(model: Model, of_width: float, of_ffn: float) -> float:
    """Bytes per token of a block, see BLOCK_BYTES."""
    return of_width * model.width + of_ffn * model.ffn


def _gathered(sizes: Sizes, compute: str, gpus: int, largest: int, zeros: Sequence[int]) -> float:
    """Bytes of gathered (unsharded) weights in the compute dtype: with ZeRO-3 two blocks at a time and the
    weights outside the blocks, with ZeRO-2 the whole network.

    largest: parameters of the largest block or head. zeros: the ZeRO stage of each network that is not made
    of adapters.
    """
    if gpus == 1 and compute == "fp32":
        return 0.0
    gathered = sum(sizes.body if zero == 2 else sizes.outer for zero in zeros)
    exact = (4 - _width(compute)) * sizes.time * len(zeros)
    return _width(compute) * (gathered + 2 * largest) + exact


def _width(compute: str) -> int:
    return 2 if compute == "bf16" else 4
