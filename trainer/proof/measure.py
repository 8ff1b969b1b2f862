"""Judge finished demo runs on many new samples; this makes the README's table."""

from pathlib import Path

import numpy as np

from apt_core.errors import AptError
from apt_core.files.jsonfile import read_object, write_json
from apt_core.loading.text_files import load_text_encoder
from apt_core.models.vae import load_vae
from trainer.config import Preset
from trainer.data.batches import Embedder
from trainer.digest import file_digest
from trainer.jobs.plan import final_file
from trainer.mini import ASSETS, VAE
from trainer.mini.features import load_features
from trainer.run.folders import DISTILLED
from trainer.run.progress import columns_table, console, criteria_table, stage_bar

from .criteria import check
from .demo import STATE_FILE, read_state
from .evaluate import ALL_COLUMNS, Models, Sampler
from .report import drawn_prompts, evaluate
from .verdict import half_width

PHASES = ("image", "video")
SAMPLE_SEED = 1_000_000  # no demo uses these scenes or this noise


def measure_runs(runs: list[Path], samples: int, out: Path | None = None, fp8: bool = False) -> dict:
    """Measure each run on `samples` images and clips of its own.

    Prints the means over the runs and whether the criteria hold. Returns both, with intervals and each run's
    figures, and also writes them to `out`, if given.
    Measurements are stored in the run's folder and not repeated. fp8: run the blocks of the APT model in 8
    bits, as `generate --fp8` does.
    Raises AptError before anything is measured, for a folder without a finished run on drawn clips.
    """
    found = [read_run(run) for run in runs]
    by_run = [
        _measure(run, preset, settings["seed"], samples, fp8) for run, (preset, settings) in zip(runs, found)
    ]
    result = {"runs": [str(run) for run in runs], "samples": samples, "fp8": fp8}
    for kind, name, title in (("image", "image_columns", "Images"), ("video", "columns", "Video")):
        rows = [figures[kind] for figures in by_run]
        result[name] = {column: _mean([row[column] for row in rows]) for column in ALL_COLUMNS}
        result[f"{name}_interval"] = {
            column: interval([row[column] for row in rows]) for column in ALL_COLUMNS
        }
        result[f"{name}_by_run"] = rows
        result[f"{name}_criteria"] = check(rows)
        console.print(
            columns_table(f"{title}: mean of {len(runs)} runs, {samples} samples each", result[name])
        )
        console.print(criteria_table(result[f"{name}_criteria"]))
    if out:
        write_json(out, result)
    return result


def _measure(run: Path, preset: Preset, seed: int, samples: int, fp8: bool) -> dict[str, dict]:
    """One run's figures by kind and column. Its seed determines the scenes and the noise."""
    files = [
        ASSETS / "transformer.safetensors",
        VAE,
        ASSETS / "features.safetensors",
        run / DISTILLED,
        *results(run, preset).values(),
    ]
    identity = {
        "samples": samples,
        "fp8": fp8,
        "columns": list(ALL_COLUMNS),
        "files": {path.name: file_digest(path) for path in files},
    }
    kept = run / f"measured-{samples}{'-fp8' if fp8 else ''}.json"
    figures = _kept(kept, identity)
    if len(figures) == len(PHASES):
        return figures
    vae, net = load_vae(VAE), load_features(ASSETS / "features.safetensors")
    text = Embedder(load_text_encoder(ASSETS / "text_encoder.safetensors"))
    negative = text.embed([preset.sampling.negative_prompt])
    for kind, file in results(run, preset).items():
        if kind in figures:
            continue
        prompts = drawn_prompts(text, kind, samples, SAMPLE_SEED + seed, preset.data.frames)
        models = Models(ASSETS / "transformer.safetensors", run / DISTILLED, file)
        shape = (16, (prompts.real.shape[1] - 1) // 4 + 1, preset.data.height // 8, preset.data.width // 8)
        sampler = Sampler(
            models, preset.sampling, kind, prompts.text, negative, shape, SAMPLE_SEED + seed, fp8=fp8
        )
        with stage_bar(f"{run.name}: {kind}s") as bar:
            done = 0

            def report(n: int) -> None:
                nonlocal done
                done += n
                bar(done, samples * (len(ALL_COLUMNS) - 2))

            figures[kind] = evaluate(prompts, sampler, vae, net, report, ALL_COLUMNS)[0]
        write_json(kept, {"identity": identity, "figures": figures})
    return figures


def _kept(path: Path, identity: dict) -> dict[str, dict]:
    """Earlier measurements of the same files with the same settings."""
    try:
        kept = read_object(path, "measure again")
        return dict(kept["figures"]) if kept["identity"] == identity else {}
    except (ValueError, KeyError, TypeError):
        return {}


def results(run: Path, preset: Preset) -> dict[str, Path]:
    """The generator files of a finished run, by phase."""
    return {phase: final_file(run, preset, phase) for phase in PHASES}


def read_run(run: Path) -> tuple[Preset, dict]:
    """The preset of a finished demo run, and its other settings (seed, recipe, ...).

    Raises AptError for a folder that holds no demo run, for a run on clips that were not drawn, and for a run
    that is not finished.
    """
    try:
        settings = read_state(run / STATE_FILE)["settings"]
        data, preset = settings["data"], Preset.model_validate(settings["preset"])
    except (ValueError, KeyError):
        raise AptError(f"{run} holds no run of the demo: give the folders that `demo --out` made.") from None
    if data:
        raise AptError(
            f"{run} was trained on the clips in {data}, but only drawn clips can be judged: "
            "give runs without --data."
        )
    for file in (run / DISTILLED, *results(run, preset).values()):
        if not file.is_file():
            raise AptError(f"{run} has no {file.name}; let the demo finish there first.")
    return preset, settings


def _mean(rows: list[dict]) -> dict:
    """Means over runs. Counts stay whole numbers; a figure that a column does not have is None."""
    return {
        key: rows[0][key]
        if key in ("calls", "samples") or rows[0][key] is None
        else round(float(np.mean([row[key] for row in rows])), 4)
        for key in rows[0]
    }


def interval(rows: list[dict]) -> dict:
    """For each figure, half the width of the 95% confidence interval of the mean over runs (Student's t).

    None for a single run.
    """
    out = {}
    for key, value in rows[0].items():
        if key in ("calls", "samples") or value is None:
            continue
        half = half_width([row[key] for row in rows])
        out[key] = None if half is None else round(half, 4)
    return out
