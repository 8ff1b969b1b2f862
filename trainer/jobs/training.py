"""The commands precompute, distill and adversarial, as functions on the folder of a run.

That folder holds `latents` (shards), `distilled.safetensors`, `apt-image.safetensors`,
`apt-NAME.safetensors` (from the video phase), `states/STAGE` (training states) and `log/STAGE` (history.csv
and TensorBoard's files). The demo's folder is one of these too.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.errors import AptError
from apt_core.files.atomic import make_folder
from apt_core.files.folders import half_note
from apt_core.loading.backbones import load_backbone
from apt_core.loading.sources import MINI
from apt_core.models.vae import decode
from trainer.checkpoints.starting_models import (
    RANDOM,
    describe_state,
    open_text_encoder,
    open_vae,
    write_random_base,
)
from trainer.config import Preset
from trainer.data.batches import Batches
from trainer.data.precompute import Report, precompute
from trainer.data.prompts import PROMPTS, Prompts
from trainer.data.shards import INDEX
from trainer.jobs.checks import check_parts, check_shards
from trainer.jobs.plan import LATENTS, Plan, find_start, make_plan
from trainer.jobs.tell import attention_line, monitor, progress, tell_precomputed, tell_result
from trainer.machines.distributed import World, connect
from trainer.machines.machine import pick_device
from trainer.mini.clips import SIZE, is_drawn
from trainer.mini.drawn_files import draw_files
from trainer.mini.judge import travel
from trainer.run.folders import DISTILLED
from trainer.run.judge import LatentJudge, motion
from trainer.run.lock import held
from trainer.run.progress import say, stage_bar
from trainer.run.state import Keep, Preempted
from trainer.stages.adversarial import adversarial
from trainer.stages.distill import distill
from trainer.stages.dmd import match_distributions
from trainer.stages.samples import Samples
from trainer.stages.setup import Setup
from trainer.stages.watch import Measure


def run_precompute(
    preset: Preset,
    data: Path | None,
    out: Path,
    *,
    kinds: Sequence[str] = ("image", "video"),
    skip_bad=False,
    truncate_captions=False,
    seed: int = 0,
) -> Report:
    """Encode `data` into `out`/latents, with all processes of the run; see trainer.data.precompute.

    Without `data`, the miniature draws its own clips and images. Raises AptError as `precompute` does, and
    when there is no data for another preset.
    """
    device = pick_device(preset.train.device)
    with connect(device, patience=timedelta(days=30)) as world:
        return _precompute(preset, data, out, kinds, skip_bad, truncate_captions, seed, world)


def _precompute(
    preset: Preset,
    data: Path | None,
    out: Path,
    kinds,
    skip_bad: bool,
    truncate_captions: bool,
    seed: int,
    world: World,
) -> Report:
    size, folder = preset.data, data
    if data is None:
        if preset.files.base != MINI or (size.height, size.width) != (SIZE, SIZE):
            raise AptError(
                f"data is not given, and only the miniature ({SIZE}x{SIZE}) draws its own: "
                "add --data FOLDER of captioned clips and images."
            )
        folder = out / "data"
        if world.main:
            with stage_bar("Drawing clips") as report:
                draw_files(folder, size, seed, report)
        world.barrier()
    vae = open_vae(preset.files).to(world.device)
    text = open_text_encoder(preset.files, preset.model.text_length).to(world.device)
    check_parts(preset, vae, text)
    large = preset.files.base != MINI
    with held(out / LATENTS, world), progress("Encoding", world) as report:
        made = precompute(
            folder,
            out / LATENTS,
            vae,
            text,
            height=size.height,
            width=size.width,
            frames=size.frames,
            fps=size.fps,
            kinds=kinds,
            image_height=size.image_height,
            image_width=size.image_width,
            aspects=size.aspects,
            shorter=size.shorter,
            clips_per_file=size.clips_per_file,
            skip_bad=skip_bad,
            truncate_captions=truncate_captions,
            progress=report,
            world=world,
            batch=1 if large else 8,
            dtype=torch.bfloat16 if large else torch.float32,
            prompts=(preset.sampling.negative_prompt, *preset.sampling.prompts),
        )
    if world.main:
        tell_precomputed(made, out / LATENTS)
    return made


def run_distill(preset: Preset, out: Path, *, seed: int = 0, shards: Path | None = None) -> list[dict]:
    """Run stage 1 by the preset's method (`distill.method`) on the run's shards. Returns the history.

    Raises AptError as `make_plan` and the method's function (`distill` or `match_distributions`) do.
    """
    plan = make_plan(preset, "distill", out, seed=seed, shards=shards)
    train = {"consistency": distill, "dmd": match_distributions}[preset.distill.method]
    with _ready(plan) as setup:
        with progress("Stage 1: distill", setup.world) as bar, monitor(plan, setup.world, bar) as report:
            return train(plan.base, preset, replace(setup, report=report))


def run_adversarial(
    preset: Preset,
    phase: str,
    out: Path,
    *,
    recipe: str | None = None,
    start: Path | None = None,
    seed: int = 0,
    shards: Path | None = None,
) -> list[dict]:
    """Run one phase of stage 2 ("image" or "video") on the run's shards. Returns the history.

    start: file with the generator's first weights, by default the result of the stage before. The
    discriminator starts from the base, unless the phase's `discriminator_start` says otherwise.
    Raises AptError as `make_plan`, `find_start` and `adversarial` do.
    """
    plan = make_plan(preset, phase, out, recipe=recipe, seed=seed, shards=shards, start=start)
    with _ready(plan) as setup:
        world, batches = setup.world, setup.batches
        if phase not in batches.datasets:
            raise AptError(f"the shards hold no {phase}s: run precompute on some, or train the other phase.")
        begin = find_start(plan)
        if not plan.start and world.main:
            say(
                f"{DISTILLED} does not exist, so the generator starts from the base itself, which is worse: "
                "run `distill` first."
            )
        if plan.start and plan.start.note and world.main:
            say(plan.start.note)
        with progress(f"Stage 2: {phase}s", world) as bar, monitor(plan, world, bar) as report:
            return adversarial(
                phase,
                begin,
                plan.base,
                plan.settings,
                replace(setup, report=report),
                head_width=preset.train.head_width,
                watch_every=preset.train.watch_every,
                measures=_measures(plan, batches, world),
            )


@contextmanager
def _ready(plan: Plan) -> Iterator[Setup]:
    """Connect the processes, open the data, and yield what every stage is given.

    Afterwards it prints how the stage ended.
    """
    preset, train = plan.preset, plan.preset.train
    with connect(
        plan.device, context_parallel=train.context_parallel, sharded=plan.parallel.sharded
    ) as world:
        if preset.files.base == RANDOM and not plan.base.exists():
            if world.main:
                write_random_base(plan.base, preset)
            world.barrier()
        if (
            plan.shards == plan.out / LATENTS
            and preset.files.base == MINI
            and not (plan.shards / INDEX).exists()
        ):
            _precompute(preset, None, plan.out, ("image", "video"), False, False, plan.seed, world)
        batches = Batches(plan.shards, _embedder(preset, plan.shards), plan.seed, preset.data.held_out)
        check_shards(batches, preset, plan.shards, world)
        if world.main:
            make_folder(plan.out)
            say(attention_line(plan))
            if note := half_note(plan.base):
                say(note)
        try:
            yield _setup(plan, batches, world)
        except Preempted as stop:
            if world.main:
                print(stop.message, file=sys.stderr)
            raise
        if world.main:
            tell_result(plan)


def _setup(plan: Plan, batches: Batches, world: World) -> Setup:
    """What the plan's stage is given beside its settings; it reports to nobody yet."""
    train, kind = plan.preset.train, batches.available(plan.kind)
    metadata = plan.metadata(kind)
    lora = (train.lora_rank, train.lora_alpha) if plan.lora else None
    # Called later: only Keep can tell whether the folder belongs to this run.
    describe = partial(describe_state, plan.states, plan.base, metadata, lora)
    judge, keep, samples = None, None, None
    if train.save_every and train.keep_best and train.judge_samples:
        judge = LatentJudge(batches, kind, train.judge_samples, plan.seed, world)
    if train.save_every:
        keep = Keep(plan.states, train.save_every, train.keep_last, train.keep_best, judge, describe)
    if train.sample_every:
        samples = _samples(plan, kind, batches, world)
    return Setup(
        batches=batches,
        out=plan.result,
        seed=plan.seed,
        metadata=metadata,
        report=lambda *_: None,
        world=world,
        parallel=plan.parallel,
        lora=plan.lora,
        ema_decays=plan.ema_decays,
        keep=keep,
        samples=samples,
        load=load_backbone,
    )


def _embedder(preset: Preset, folder: Path):
    """What embeds prompts: the file stored with the shards or, if there is none, the text encoder.

    The miniature always takes its text encoder, which is small and shipped.
    """
    stored = (folder / PROMPTS).exists() and preset.files.text_encoder != MINI
    return (
        Prompts(folder)
        if stored or not preset.files.text_encoder
        else open_text_encoder(preset.files, preset.model.text_length)
    )


def _measures(plan: Plan, batches: Batches, world: World) -> dict[str, Measure]:
    """What to measure on generated clips during training, {} where nothing is: how much they move.

    If the miniature trains on drawn clips, it also decodes some and measures how far their objects travel.
    """
    if plan.kind != "video" or not (plan.preset.train.watch_every and batches.held["video"]):
        return {}
    measures = {"motion": Measure(motion)}
    drawn = all(is_drawn(sample.caption) for sample in batches.datasets["video"].samples)
    if plan.preset.files.vae == MINI and drawn:
        to_video = _to_video(plan.preset, world)
        measures["travel"] = Measure(lambda x: travel(to_video(x)), samples=16, every=3)
    return measures


def _to_video(preset: Preset, world: World) -> Callable[[Tensor], np.ndarray]:
    """A function that decodes latents `[n, C, F, h, w]` to uint8 `[n, F, H, W, 3]` with the preset's VAE."""
    vae = open_vae(preset.files).to(world.device)

    @torch.no_grad()
    def to_video(latents: Tensor) -> np.ndarray:
        pixels = decode(vae, latents.to(world.device))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()

    return to_video


def _samples(plan: Plan, kind: str, batches: Batches, world: World) -> Samples:
    preset = plan.preset
    prompts = list(preset.sampling.prompts) or [
        sample.caption for sample in batches.datasets[kind].samples[:4]
    ]
    to_video = _to_video(preset, world) if world.main else None
    buckets = batches.datasets[kind].buckets
    shape = max(buckets, key=lambda bucket: len(buckets[bucket]))
    folder, every = plan.out / "samples" / plan.stage, preset.train.sample_every
    return Samples(folder, every, batches.embed(prompts), shape, to_video, preset.data.fps, plan.seed)
