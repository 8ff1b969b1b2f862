"""What the commands do with a preset and a folder: the files of a run, the right start for each stage, and every check before the first step.

A run's folder holds, as the demo's does: `latents` (shards), `distilled.safetensors`, `apt-image.safetensors` and `apt-NAME.safetensors`
(of the video phase), `states/STAGE` with the training states, and `log/STAGE` with history.csv and TensorBoard's files.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from apt_core.errors import AptError
from apt_core.folders import half_note
from apt_core.sources import MINI, load_backbone
from apt_core.text import TextEncoder
from apt_core.vae import decode
from trainer.adversarial import adversarial
from trainer.base import RANDOM, describe_state, find_base, open_text_encoder, open_vae, write_random_base
from trainer.batches import Batches
from trainer.config import Preset
from trainer.demo import draw_files
from trainer.distill import distill
from trainer.distributed import World, connect
from trainer.dry_run import check_fit
from trainer.files import make_folder
from trainer.judge import LatentJudge
from trainer.machine import pick_device, this_machine
from trainer.mini.clips import SIZE
from trainer.monitor import Monitor, Work
from trainer.networks import Lora
from trainer.parallel import parallel_of
from trainer.places import DISTILLED, IMAGE, whole_states
from trainer.precompute import SKIPPED, Report, fingerprint, precompute
from trainer.progress import console, stage_bar
from trainer.prompts import PROMPTS, Prompts
from trainer.samples import Samples
from trainer.shards import INDEX
from trainer.state import Keep, Preempted, best_state

LATENTS = "latents"


def final_file(out: Path, preset: Preset, stage: str) -> Path:
    """What a stage leaves: "distill", or stage 2's "image" or "video"."""
    return out / {"distill": DISTILLED, "image": IMAGE, "video": f"apt-{preset.name}.safetensors"}[stage]


def run_precompute(
    preset: Preset, data: Path | None, out: Path, *, kinds: Sequence[str] = ("image", "video"), skip_bad=False, truncate_captions=False,
    seed: int = 0,
) -> Report:  # fmt: skip
    """Encode `data` (for the miniature: drawn clips, unless given) into `out`/latents, on all processes of the run."""
    device = pick_device(preset.train.device)
    with connect(device, patience=timedelta(days=30)) as world:
        return _precompute(preset, data, out, kinds, skip_bad, truncate_captions, seed, world)


def _precompute(preset: Preset, data: Path | None, out: Path, kinds, skip_bad: bool, truncate_captions: bool, seed: int, world: World) -> Report:
    size, folder = preset.data, data
    if data is None:
        if preset.files.base != MINI or (size.height, size.width) != (SIZE, SIZE):
            raise AptError(f"data is not given, and only the miniature ({SIZE}x{SIZE}) draws its own: add --data FOLDER of captioned clips and images.")
        folder = out / "data"
        if world.main:
            with stage_bar("Drawing clips") as report:
                draw_files(folder, size, seed, report)
        world.barrier()
    vae = open_vae(preset.files).to(world.device)
    text = open_text_encoder(preset.files, preset.model.text_length).to(world.device)
    check_parts(preset, vae, text)
    large = preset.files.base != MINI
    with _progress("Encoding", world) as report:
        made = precompute(
            folder, out / LATENTS, vae, text, height=size.height, width=size.width, frames=size.frames, fps=size.fps, kinds=kinds,
            image_height=size.image_height, image_width=size.image_width, aspects=size.aspects, shorter=size.shorter,
            clips_per_file=size.clips_per_file, skip_bad=skip_bad, truncate_captions=truncate_captions, progress=report, world=world,
            batch=1 if large else 8, dtype=torch.bfloat16 if large else torch.float32,
            prompts=(preset.sampling.negative_prompt, *preset.sampling.prompts),
        )  # fmt: skip
    if world.main:
        _tell_report(made, out)
    return made


def check_parts(preset: Preset, vae, text: TextEncoder) -> None:
    """Raises AptError when the VAE or the text encoder does not belong to the preset's model."""
    model = preset.model
    if vae.config.z_dim != model.channels:
        raise AptError(f"vae {preset.files.vae} has {vae.config.z_dim} channels, but {preset.name} needs {model.channels} (Wan {model.vae}'s VAE).")
    if text.dim != model.text_dim:
        raise AptError(f"text_encoder {preset.files.text_encoder} has width {text.dim}, but {preset.name} needs {model.text_dim}: give the one of this model.")


def run_distill(preset: Preset, out: Path, *, seed: int = 0, shards: Path | None = None) -> list[dict]:
    """Stage 1 on a run's shards; returns the history."""
    with _ready(preset, "distill", None, out, seed, shards) as (world, base, batches, common, _):
        with _progress("Stage 1: distill", world) as bar, _monitor(preset, out / "log" / "distill", world, bar) as report:
            return distill(base, batches, preset, final_file(out, preset, "distill"), seed=seed, world=world, report=report, **common)


def run_adversarial(
    preset: Preset, phase: str, out: Path, *, variant: str | None = None, start: Path | None = None, seed: int = 0, shards: Path | None = None
) -> list[dict]:
    """One phase of stage 2: the generator goes on from `start`, by default the stage before it, the discriminator from the base."""
    settings = getattr(preset.phases(variant or preset.variant), phase)
    with _ready(preset, phase, variant, out, seed, shards) as (world, base, batches, common, power):
        if phase not in batches.datasets:
            raise AptError(f"the shards hold no {phase}s: run precompute on some, or train the other phase.")
        begin = start or find_start(preset, phase, out, base, world)
        work, common = Work(settings.batch, *power), common | {"watch_every": preset.train.watch_every}
        with _progress(f"Stage 2: {phase}s", world) as bar, _monitor(preset, out / "log" / phase, world, bar, work, settings.relativistic) as report:
            return adversarial(
                phase, begin, base, batches, settings, final_file(out, preset, phase), seed=seed, world=world,
                head_width=preset.train.head_width, report=report, **common,
            )  # fmt: skip


def find_start(preset: Preset, phase: str, out: Path, base: Path, world: World) -> Path:
    """The generator's first weights: what the stage before left in `out`; the miniature may also start from its base.

    Raises AptError when no stage before has been run.
    """
    before = [final_file(out, preset, stage) for stage in (("image", "distill") if phase == "video" else ("distill",))]
    if found := next((path for path in before if path.exists()), None):
        return found
    if preset.files.base != MINI:
        raise AptError(f"{out} holds no {before[-1].name}: run `distill {preset.name} --out {out}` first, or add --start-from FILE.")
    if world.main:
        _say(f"{before[-1].name} is not there: the generator starts from the base itself, which is worse; run distill first.")
    return base


@contextmanager
def _ready(preset: Preset, stage: str, variant: str | None, out: Path, seed: int, shards: Path | None) -> Iterator[tuple]:
    """The processes, the base, the data and the common arguments of both trainings, all checked."""
    train, device = preset.train, pick_device(preset.train.device)
    parallel, attention = parallel_of(preset, device)
    base = out / "base.safetensors" if preset.files.base == RANDOM else find_base(preset)
    machine = this_machine(device, train.compute)
    power = check_fit(preset, stage, variant, machine).flops, machine.peak * machine.gpus
    with connect(device, context_parallel=train.context_parallel, sharded=parallel.sharded) as world:
        if preset.files.base == RANDOM and not base.exists():
            if world.main:
                write_random_base(base, preset)
            world.barrier()
        folder = shards or out / LATENTS
        if shards is None and preset.files.base == MINI and not (folder / INDEX).exists():
            _precompute(preset, None, out, ("image", "video"), False, False, seed, world)
        batches = Batches(folder, _embedder(preset, folder), seed, preset.data.held_out)
        check_shards(batches, preset, folder, world)
        if world.main:
            make_folder(out)
            _say(f"attention: {attention}")
            if note := half_note(base):
                _say(note)
        about = _metadata(preset, stage, batches.available("video" if stage == "distill" else stage), variant or preset.variant, seed)
        states = out / "states" / stage
        lora = (train.lora_rank, train.lora_alpha) if train.mode == "lora" else None
        describe = partial(describe_state, states, base, about, lora)  # not before the folder is known to be this run's
        common = {
            "metadata": about,
            "parallel": parallel,
            "lora": Lora(train.lora_rank, train.lora_alpha) if train.mode == "lora" else None,
            "ema_decays": [decay for decay in train.ema_decays if decay != _first_decay(preset, stage, variant)],
            "keep": _keep(preset, stage, batches, states, seed, world, describe) if train.save_every else None,
            "samples": _samples(preset, stage, batches, out, world, seed) if train.sample_every else None,
            "load": load_backbone,
        }
        try:
            yield world, base, batches, common, power
        except Preempted as stop:
            if world.main:
                print(stop.message, file=sys.stderr)
            raise
        if world.main:
            _tell_result(final_file(out, preset, stage), states)


def _keep(preset: Preset, stage: str, batches: Batches, states: Path, seed: int, world: World, describe: Callable[[], None]) -> Keep:
    train, kind = preset.train, batches.available("video" if stage == "distill" else stage)
    judge = LatentJudge(batches, kind, train.judge_samples, seed, world) if train.keep_best and train.judge_samples else None
    return Keep(states, train.save_every, train.keep_last, train.keep_best, judge, describe)


def check_shards(batches: Batches, preset: Preset, folder: Path, world: World) -> None:
    """Raises AptError when shards were made for another model, or with another VAE or text encoder than the ones that are given."""
    model, data = preset.model, next(iter(batches.datasets.values()))
    facts = {
        "latent channels": (data.vae["channels"], model.channels), "VAE stride": (tuple(data.vae["stride"]), model.stride),
        "text width": (data.text_dim, model.text_dim), "text length": (data.text_length, model.text_length),
    }  # fmt: skip
    for what, (found, wanted) in facts.items():
        if found != wanted:
            raise AptError(f"{folder} has {what} {found}, but {preset.name} needs {wanted}: precompute the shards for this model.")
    for kind, dataset in batches.datasets.items():
        if odd := [bucket for bucket in dataset.buckets if bucket[2] % 2 or bucket[3] % 2]:
            raise AptError(f"{folder} has {kind}s with latents of {odd[0][3]}x{odd[0][2]}, which patches of 2x2 do not fill: precompute them again.")
    made = {"vae": lambda: open_vae(preset.files), "text_encoder": lambda: open_text_encoder(preset.files, model.text_length)}
    other = ""
    if world.main:  # eight text encoders at once would not fit a machine's memory
        wrong = (part for part in made if getattr(preset.files, part) and fingerprint(made[part]()) != data.settings[part.replace("_", " ")])
        other = next(wrong, "")
    if other := world.gather(other)[0]:
        raise AptError(f"{folder} was made with another {other} than {getattr(preset.files, other)}: precompute again with this one, or give that one.")


def _embedder(preset: Preset, folder: Path):
    """For prompts: those encoded with the shards; the miniature's text encoder is at hand anyway."""
    stored = (folder / PROMPTS).exists() and preset.files.text_encoder != MINI
    return Prompts(folder) if stored or not preset.files.text_encoder else open_text_encoder(preset.files, preset.model.text_length)


def _samples(preset: Preset, stage: str, batches: Batches, out: Path, world: World, seed: int) -> Samples:
    kind = batches.available("video" if stage == "distill" else stage)
    prompts = list(preset.sampling.prompts) or [sample.caption for sample in batches.datasets[kind].samples[:4]]
    vae = open_vae(preset.files).to(world.device) if world.main else None

    @torch.no_grad()
    def to_video(latents):
        pixels = decode(vae, latents.to(world.device))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()

    buckets = batches.datasets[kind].buckets
    shape = max(buckets, key=lambda bucket: len(buckets[bucket]))
    return Samples(out / "samples" / stage, preset.train.sample_every, batches.embed(prompts), shape, to_video, preset.data.fps, seed)


def _first_decay(preset: Preset, stage: str, variant: str | None) -> float:
    return preset.distill.ema_decay if stage == "distill" else getattr(preset.phases(variant or preset.variant), stage).ema_decay


def _metadata(preset: Preset, stage: str, kind: str, variant: str, seed: int) -> dict:
    model = preset.model
    recipe = preset.name if stage == "distill" else f"{preset.name}/{variant}"
    return {
        "base": preset.name,
        "text_length": model.text_length,
        "vae": {"name": MINI if preset.files.base == MINI else f"wan {model.vae}", "stride": list(model.stride), "channels": model.channels},
        "native": preset.data.native(kind),
        "second_time": preset.sampling.second_time,
        "preset": recipe,
        "seed": seed,
    }


@contextmanager
def _progress(title: str, world: World) -> Iterator:
    if not world.main:
        yield lambda *_: None
        return
    with stage_bar(title) as report:
        yield report


@contextmanager
def _monitor(preset: Preset, folder: Path, world: World, bar: Callable, work: Work | None = None, relativistic: bool = False) -> Iterator[Callable]:
    if not world.main:
        yield bar
        return
    settings = preset.model_dump(mode="json")
    wandb = preset.train.wandb
    with Monitor(folder, work, device=world.device, relativistic=relativistic, wandb=wandb, settings=settings, forward=bar) as monitor:
        yield monitor


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _tell_result(path: Path, states: Path) -> None:
    newest, best = max(whole_states(states), default=None), best_state(states)
    if best is None:
        _say(f"{path} is the result.")
    elif best[0] == newest:
        _say(f"{path} is the result, and the best that was judged ({best[1]:.3g}).")
    else:
        _say(f"{path} is the result; an earlier state was judged better ({best[1]:.3g}): to have that one, export {best[0]}.")


def _tell_report(made: Report, out: Path) -> None:
    for name, done in made.converted.items():
        _say(f"{name}: {', '.join(done)}.")
    for bad in made.skipped:
        _say(f"left out: {bad.reason}")
    if made.skipped:
        _say(f"{len(made.skipped)} left out, listed in {out / LATENTS / SKIPPED}")
    counts = ", ".join(f"{count} {kind}s" for kind, count in made.samples.items())
    _say(f"{counts} in {out / LATENTS}; {made.encoded} encoded now, {made.clips_per_second:.2f} a second.")
