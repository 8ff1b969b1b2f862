"""The paper's ablations on the miniature: train every variant of stage 2 with several seeds and judge it.

All variants are judged in the same way. The tables show each variant's figures beside the paper's claim.
An ablation's folder holds `runs/seed-N` (data and stage 1, for seeds without a finished demo),
`trainings/VARIANT/seed-N` (states, log, weights), `results/VARIANT-seed-N.json`, and the tables:
ablations.json, ablations.html, ablations.png.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from apt_core.errors import AptError, NotFinite
from apt_core.files.atomic import make_folder
from apt_core.files.jsonfile import write_json
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.vae import load_vae
from trainer.checkpoints.export import export
from trainer.checkpoints.starting_models import describe_state
from trainer.config import Preset, check_phase, load_preset
from trainer.data.batches import Batches
from trainer.jobs.plan import LATENTS, final_file
from trainer.jobs.plan import metadata as stage_metadata
from trainer.jobs.training import run_adversarial, run_distill
from trainer.machines.distributed import World
from trainer.machines.machine import versions
from trainer.mini import ASSETS, VAE
from trainer.mini.features import load_features
from trainer.proof.demo import Demo
from trainer.run.folders import DISTILLED, newest_state
from trainer.run.identity import differing
from trainer.run.monitor import Monitor
from trainer.run.progress import say, stage_bar
from trainer.run.state import Keep, Preempted
from trainer.stages.adversarial import adversarial
from trainer.stages.setup import Setup

from .ablation_page import write_page
from .ablation_rows import Rows, plain, read, settings_of
from .ablation_table import FIGURES, table
from .evaluate import Models, Sampler
from .measure import SAMPLE_SEED, read_run, results
from .report import Prompts, drawn_prompts, evaluate
from .variants import REFERENCE, Variant, all_variants, choose

BASE = ASSETS / "transformer.safetensors"


@dataclass(frozen=True)
class Source:
    """What all variants of one seed share.

    shards: the folder of its samples; distilled: the result of stage 1.
    start: the generator's first weights, from the stage before the phase.
    """

    seed: int
    batches: Batches
    shards: Path
    distilled: Path
    start: Path
    prompts: Prompts

    def fingerprint(self) -> str:
        """Changes with the data and with the weights."""
        digests = [
            hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in dict.fromkeys((self.distilled, self.start))
        ]
        return "-".join([self.batches.fingerprint, *digests])


@dataclass(frozen=True)
class Ablation:
    """An ablation of one phase of stage 2 ("image" or "video").

    samples: how many samples each row is judged on, for each seed.
    runs: finished demos to start from, one per seed; seeds without one get their own data and stage 1.
    tables: ablations.json files of earlier ablations; their rows are taken over.
    """

    out: Path
    preset: Preset
    recipe: str
    phase: str = "image"
    samples: int = 1024
    runs: tuple[Path, ...] = ()
    device: str = "cpu"
    tables: tuple[Path, ...] = ()

    @property
    def finished(self) -> Rows:
        return Rows(self.out, self.recipe)

    def run(self, seeds: int = 3, only: Sequence[str] = (), command: str = "") -> dict:
        """Train and judge what is missing, and write the tables after each seed.

        Returns what it writes to ablations.json. only: see `choose`.
        Raises AptError for an unknown variant, for two runs with the same seed, for more runs than seeds, for
        a run with other settings, and for an `out` that holds another ablation.
        """
        variants = choose(all_variants(self.preset, self.recipe, self.phase), only)
        given = self._given(seeds)
        make_folder(self.out)
        identity = {
            "phase": self.phase,
            "recipe": self.recipe,
            "samples": self.samples,
            "preset": plain(self.preset),
        }
        self.finished.agree_on_settings(identity)
        for path in self.tables:
            self.finished.adopt(path, identity, variants)
        net, vae = load_features(ASSETS / "features.safetensors"), load_vae(VAE).to(self.device)
        rest = (seed for seed in range(seeds) if seed not in given)
        numbers = sorted([*given, *(next(rest) for _ in range(seeds - len(given)))])
        rows: dict[str, dict[int, dict]] = {name: {} for name in variants}
        result = {}
        for seed in numbers:
            source = None
            for variant in variants.values():
                row = self.finished.made(variant, seed)
                if row is None and source is None:
                    source = self._source(seed, given.get(seed))
                    self.finished.agree_on_source(seed, source.fingerprint())
                rows[variant.name][seed] = row or self._row(variant, source, net, vae)
            facts = {
                "command": command,
                "settings": identity,
                "seeds": [n for n in numbers if n <= seed],
                "runs": [str(run) for run in self.runs],
                "sources": self.finished.sources([n for n in numbers if n <= seed]),
                "versions": versions(),
                "machine": {"device": self.device, "system": platform.platform(), "cpus": os.cpu_count()},
            }
            result = json.loads(json.dumps(facts | table(variants, rows, self.samples)))
            write_json(self.out / "ablations.json", result)
            write_page(self.out, result)
        say(
            f"{self.out / 'ablations.html'}, ablations.png and ablations.json hold the table.",
        )
        return result

    def _given(self, seeds: int) -> dict[int, Path]:
        found: dict[int, Path] = {}
        for run in self.runs:
            preset, settings = read_run(run)
            seed = settings["seed"]
            if seed in found:
                raise AptError(
                    f"{found[seed]} and {run} are both of seed {seed}: give runs of different seeds."
                )
            mine, own = (
                self.preset.model_dump(exclude={"stage2", "train"}),
                preset.model_dump(exclude={"stage2", "train"}),
            )
            if other := differing(own, mine):
                raise AptError(
                    f"{run} was made with another {other[0]} than recipe {self.recipe} of {self.preset.name} "
                    "has: give a run of that recipe."
                )
            if self.phase == "video" and preset.stage2 != self.preset.stage2:
                raise AptError(
                    f"{run} was made with another stage2 than {self.preset.name} has, "
                    "and videos start from its images: give a run of that preset."
                )
            found[seed] = run
        if len(found) > seeds:
            raise AptError(f"{len(found)} runs are given, but --seeds is {seeds}: give --seeds {len(found)}.")
        return found

    def _source(self, seed: int, run: Path | None) -> Source:
        if run:
            text = load_text_encoder(ASSETS / "text_encoder.safetensors")
            shards = run / LATENTS
            batches = Batches(shards, text, seed, self.preset.data.held_out)
            names = {"distill": run / DISTILLED} | results(run, self.preset)
        else:
            demo = Demo(
                self.out / "runs" / f"seed-{seed}", self.preset, self.recipe, seed=seed, device=self.device
            )
            shards = demo.out / LATENTS
            _, batches, names = demo.train("distill" if self.phase == "image" else "image")
        start = names["distill" if self.phase == "image" else "image"]
        prompts = drawn_prompts(
            batches, self.phase, self.samples, SAMPLE_SEED + seed, self.preset.data.frames
        )
        return Source(seed, batches, shards, names["distill"], start, prompts)

    def _row(self, variant: Variant, source: Source, net, vae) -> dict:
        """Train and judge one variant with one seed, and store its figures."""
        started, row = (
            time.perf_counter(),
            {
                "variant": variant.name,
                "seed": source.seed,
                **settings_of(variant),
                "failed": None,
                "figures": {},
            },
        )
        try:
            source = self._own_stage1(variant, source) if variant.stage1 else source
            weights, figures = self._trained(variant, source) if variant.settings else (source.distilled, {})
        except NotFinite as error:
            row["failed"] = str(error)
            say(f"{variant.name}, seed {source.seed}: {error}")
        else:
            row["figures"] = self._judged(variant, source, weights, net, vae) | figures
        write_json(
            self.finished.path(variant, source.seed),
            row | {"seconds": round(time.perf_counter() - started, 2)},
        )
        return row

    def _own_stage1(self, variant: Variant, source: Source) -> Source:
        """The source with the variant's own stage 1 on the same samples; trains it if it is missing.

        For the video phase this includes the image phase.
        """
        machine = {"train.device": self.device, "train.keep_last": 1, "train.keep_best": 0}
        preset = self.preset.changed(variant.stage1 | machine, variant.name)
        folder = self.out / "trainings" / f"distilled_{preset.distill.method}" / f"seed-{source.seed}"
        files = {stage: final_file(folder, preset, stage) for stage in ("distill", "image")}
        options = {"seed": source.seed, "shards": source.shards}
        make_folder(folder)
        self.finished.agree(folder / "identity.json", {"stage1": dict(variant.stage1)})
        if not files["distill"].exists():
            run_distill(preset, folder, **options)
        if self.phase == "video" and variant.settings and not files["image"].exists():
            run_adversarial(preset, "image", folder, recipe=self.recipe, **options)
        start = files["distill" if self.phase == "image" else "image"]
        return replace(source, distilled=files["distill"], start=start)

    def _judged(self, variant: Variant, source: Source, weights: Path, net, vae) -> dict:
        sampling, batches = self.preset.sampling, source.batches
        shape = tuple(batches.datasets[self.phase].batch([0])[0].shape[1:])
        negative = batches.embed([sampling.negative_prompt])
        models = Models(BASE, source.distilled, weights)
        sampler = Sampler(
            models,
            sampling,
            self.phase,
            source.prompts.text,
            negative,
            shape,
            SAMPLE_SEED + source.seed,
            self.device,
        )
        done = 0
        with stage_bar(f"Judging {variant.name}, seed {source.seed}") as bar:

            def report(count: int) -> None:
                nonlocal done
                done += count
                bar(done, self.samples)

            rows, _ = evaluate(source.prompts, sampler, vae, net, report, [variant.column])
        return {name: rows[variant.column][name] for name in FIGURES if name in rows[variant.column]}

    def _trained(self, variant: Variant, source: Source) -> tuple[Path, dict]:
        """The weights to judge, and the discriminator's loss over the last tenth of the updates.

        Trains whatever is missing.
        """
        folder = self.out / "trainings" / variant.course / f"seed-{source.seed}"
        files = [folder / f"updates-{updates:06d}.safetensors" for updates in variant.points]
        for updates, file in zip(variant.points, files):
            if not (file.exists() and file.with_suffix(".json").exists()):
                self._train(variant, updates, source, folder, file)
        weights = files[-1]
        if variant.raw:
            weights = folder / "raw.safetensors"
            if not weights.exists() and not _newest(folder):
                raise AptError(
                    f"{folder} has no training state any more, and raw weights are nowhere else: "
                    "delete it to train it again."
                )
            if not weights.exists():
                export(_newest(folder), weights, "file", "fp32", ema=0.0)
        if variant.course not in (REFERENCE, "long"):  # no other row continues from these states
            shutil.rmtree(folder / "states", ignore_errors=True)
        return weights, read(files[-1].with_suffix(".json"))

    def _train(self, variant: Variant, updates: int, source: Source, folder: Path, file: Path) -> None:
        settings, train, states = (
            variant.settings.model_copy(update={"updates": updates}),
            self.preset.train,
            folder / "states",
        )
        if (newest := _newest(folder)) and newest.name > f"step-{settings.warmup + updates:06d}":
            raise AptError(
                f"{file} is gone, and its training went on from there: delete {folder} to train it again."
            )
        metadata = stage_metadata(self.preset, self.phase, self.phase, self.recipe, source.seed)
        describe_state(states, BASE, metadata, None)
        title = f"{variant.course}, seed {source.seed}"
        try:
            with (
                stage_bar(title) as bar,
                Monitor(
                    folder / "log" / self.phase, relativistic=settings.relativistic, forward=bar
                ) as report,
            ):
                rows = adversarial(
                    self.phase,
                    BASE if variant.from_base else source.start,
                    BASE,
                    settings,
                    Setup(
                        batches=source.batches,
                        out=file,
                        seed=source.seed,
                        metadata=metadata,
                        report=report,
                        world=World(torch.device(self.device)),
                        keep=Keep(states, train.save_every or 50, last=1, best=0),
                    ),
                    watch_every=train.watch_every,
                )
        except Preempted as stop:
            print(stop.message, file=sys.stderr)
            raise
        losses = [row["d_adversarial"] for row in rows[-max(1, len(rows) // 10) :]]
        write_json(file.with_suffix(".json"), {"d_adversarial": round(sum(losses) / len(losses), 6)})


def _newest(folder: Path) -> Path | None:
    return newest_state(folder / "states")


def ablation(
    out: Path,
    preset: str | None,
    recipe: str | None,
    phase: str,
    samples: int,
    runs: Sequence[Path],
    device: str,
    tables: Sequence[Path] = (),
) -> Ablation:
    """Set up an ablation. preset: a name or a file; preset and recipe are by default those of the runs.

    Raises AptError for a run that is not a finished demo, and as `load_preset` and `Preset.with_recipe` do.
    """
    check_phase(phase)
    found = [read_run(run) for run in runs]
    if found and preset is None:
        loaded, settings = found[0]
        recipe = recipe or settings["recipe"]
    else:
        loaded = load_preset(preset or "mini")
        recipe = recipe or loaded.default_recipe
    return Ablation(
        out, loaded.with_recipe(recipe), recipe, phase, samples, tuple(runs), device, tuple(tables)
    )
