"""The whole way in miniature: captioned clips, precompute, stage 1, both phases of stage 2, export, samples, report."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.markup import escape

from apt_core.atomic import make_folder, replacing
from apt_core.checkpoint import load_transformer
from apt_core.errors import AptError
from apt_core.media_write import write_image, write_video
from apt_core.text import load_text_encoder
from apt_core.vae import load_vae
from trainer.adversarial import adversarial
from trainer.base import describe_state
from trainer.batches import Batches
from trainer.config import Data, Preset
from trainer.distill import distill
from trainer.distributed import World
from trainer.files import write_json
from trainer.mini import ASSETS, VAE
from trainer.mini.clips import SIZE, draw
from trainer.mini.report import write_report
from trainer.monitor import Monitor
from trainer.plot import plot_run
from trainer.precompute import SKIPPED, precompute
from trainer.progress import console, stage_bar
from trainer.shards import INDEX
from trainer.state import Keep

LIBRARIES = ("comfyui-apt", "torch", "diffusers", "transformers", "safetensors", "av", "numpy")


@dataclass(frozen=True)
class Demo:
    """One run of the demo. `data` is a folder of captioned clips and pictures, or None for drawn ones."""

    out: Path
    preset: Preset
    variant: str = "paper"
    data: Path | None = None
    seed: int = 0
    samples: int = 128
    skip_bad: bool = False
    truncate_captions: bool = False
    device: str = "cpu"

    def run(self) -> dict:
        """Run every stage that is not finished yet and return the report.

        Raises AptError as `train`.
        """
        state, batches, names = self.train()
        kinds = [kind for kind in ("image", "video") if kind in batches.datasets]
        state.stage("export", "Checking the export", lambda report: self._check_export(names["video"], report))
        files = {kind: {"base": ASSETS / "transformer.safetensors", "distilled": names["distilled"], "apt": names[kind]} for kind in kinds}
        with stage_bar("Sampling and judging") as report:
            result = write_report(self, files, batches, state.record(), report)
        plot_run(self.out)
        console.print(f"[bold]{escape(str(names['video']))}[/] opens in ComfyUI's Load Diffusion Model; see compare.png, sample.mp4 and report.json beside it.", soft_wrap=True)
        return result

    def train(self, last: str = "video") -> tuple["RunState", Batches, dict[str, Path]]:
        """The stages up to `last` ("distill", "image" or "video"), as far as they are not finished. Returns the state of the run, its samples, and
        its files by stage ("distilled", "image", "video").

        Raises AptError for unusable data, before any training starts, and for an `out` that cannot be written or holds a run with
        other settings.
        """
        size = self.preset.data
        for height, width in (size.size("video"), size.size("image")):
            if self.data is None and (height, width) != (SIZE, SIZE):
                raise AptError(f"preset {self.preset.name} asks for {width}x{height} pixels, but drawn clips have {SIZE}x{SIZE}; give --data.")
        make_folder(self.out)
        state = RunState(self.out / "state.json", self._identity())
        base = ASSETS / "transformer.safetensors"
        folder, latents = self.data or self.out / "data", self.out / "latents"
        names = {"distilled": self.out / "distilled.safetensors", "image": self.out / "apt-image.safetensors", "video": self.out / "apt-mini.safetensors"}

        if self.data is None:
            state.stage("data", "Drawing clips", lambda report: self._draw(folder, report), latents / INDEX, folder)
        text = load_text_encoder(ASSETS / "text_encoder.safetensors")
        state.stage("precompute", "Encoding", lambda report: self._precompute(folder, latents, text, report), latents / INDEX)

        batches = Batches(latents, text, self.seed, size.held_out)
        common = dict(seed=self.seed, world=World(torch.device(self.device)))

        def keep(stage: str, metadata: dict) -> Keep | None:
            if not (every := self.preset.train.save_every):
                return None
            describe_state(self.out / "states" / stage, base, metadata, None)
            return Keep(self.out / "states" / stage, every, last=1, best=0)

        start, metadata = names["distilled"], self.metadata(text, batches.available("video"))
        state.stage("distill", "Stage 1: distill", lambda report: self._distill(base, batches, start, report, metadata=metadata, keep=keep("distill", metadata), **common), start)
        kinds = [kind for kind in ("image", "video") if kind in batches.datasets]
        for kind in kinds[: {"distill": 0, "image": 1}.get(last)]:
            out, metadata = names[kind] if kind != kinds[-1] else names["video"], self.metadata(text, kind)
            state.stage(
                f"adversarial_{kind}",
                f"Stage 2: {kind}s",
                lambda report: self._adversarial(kind, start, base, batches, out, report, metadata=metadata, keep=keep(kind, metadata), **common),
                out,
            )
            start = out
            names[kind] = out
        return state, batches, names

    def _identity(self) -> dict:
        """What makes two runs the same run."""
        keys = ("variant", "seed", "skip_bad", "truncate_captions")
        facts = {key: getattr(self, key) for key in keys} | {"data": str(self.data.resolve()) if self.data else None}
        return facts | {"preset": self.preset.model_dump()}

    def _distill(self, base: Path, batches: Batches, out: Path, report: Callable, **options) -> list:
        with Monitor(self.out / "log" / "distill", forward=report) as monitor:
            return distill(base, batches, self.preset, out, report=monitor, **options)

    def _adversarial(self, kind: str, start: Path, base: Path, batches: Batches, out: Path, report: Callable, **options) -> list:
        settings = getattr(self.preset.phases(self.variant), kind)
        with Monitor(self.out / "log" / kind, relativistic=settings.relativistic, forward=report) as monitor:
            return adversarial(
                kind, start, base, batches, settings, out, watch_every=self.preset.train.watch_every, report=monitor, **options
            )

    def _draw(self, folder: Path, report: Callable) -> list:
        draw_files(folder, self.preset.data, self.seed, report)
        return []

    def _precompute(self, folder: Path, latents: Path, text, report: Callable) -> list:
        data = self.preset.data
        vae = load_vae(VAE).to(self.device)
        made = precompute(
            folder, latents, vae, text, height=data.height, width=data.width, frames=data.frames, fps=data.fps,
            image_height=data.image_height, image_width=data.image_width, skip_bad=self.skip_bad, truncate_captions=self.truncate_captions, progress=report,
        )  # fmt: skip
        for bad in made.skipped:
            console.print(f"left out: {bad.reason}", markup=False, highlight=False, soft_wrap=True)
        if made.skipped:
            console.print(f"{len(made.skipped)} left out, listed in {latents / SKIPPED}", markup=False, highlight=False, soft_wrap=True)
        return []

    def metadata(self, text, kind: str) -> dict:
        return {
            "base": "mini",
            "text_length": text.text_length,
            "vae": {"name": "mini", "stride": [4, 8, 8], "channels": 16},
            "native": self.preset.data.native(kind),
            "second_time": self.preset.sampling.second_time,
            "preset": f"{self.preset.name}/{self.variant}",
            "seed": self.seed,
        }

    def _check_export(self, path: Path, report: Callable) -> list:
        """The file as a user will read it: every key, shape and number."""
        load_transformer(path)
        report(1, 1)
        return []


def draw_files(folder: Path, data: Data, seed: int, report: Callable) -> None:
    """Draw the miniature's own data as real files with sidecar captions: PNG images and near-lossless H.264 clips. What is there and right stays, and
    keeps its age, by which its latents are known."""
    make_folder(folder)
    total = data.images + data.clips
    for moving, count, done in ((False, data.images, 0), (True, data.clips, data.images)):
        for i in range(count):
            pixels, scenes = draw(seed + 5000, [i], moving, data.frames if moving else 1)
            stem = folder / f"{'clip' if moving else 'image'}-{i:05d}"
            if moving:
                write_video(stem.with_suffix(".mp4"), pixels[0], data.fps, crf=8, pixel_format="yuv444p", keep_equal=True)
            else:
                write_image(stem.with_suffix(".png"), pixels[0, 0], keep_equal=True)
            with replacing(stem.with_suffix(".txt"), keep_equal=True) as part:
                part.write_text(scenes[0].caption + "\n", encoding="utf-8")
            report(done + i + 1, total)


class RunState:
    """Which stages of a run are finished, with their wall seconds and losses, in one small file.

    Raises AptError for a file that is damaged or of a run with another identity.
    """

    def __init__(self, path: Path, identity: dict) -> None:
        self.path = path
        identity = json.loads(json.dumps(identity))
        self.state = {"settings": identity, "stages": {}}
        if path.exists():
            try:
                self.state = json.loads(path.read_text(encoding="utf-8"))
                old = dict(self.state["settings"])
                self.record()
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise AptError(f"{path} is damaged; delete it to start over, or give another --out.") from None
            changed = sorted(key for key in identity if old.get(key) != identity[key])
            if changed:
                raise AptError(f"{path.parent} holds a run with another {', '.join(changed)}; give another --out, or the settings of that run.")

    def stage(self, name: str, title: str, work: Callable, *made: Path) -> None:
        """Do `work(report)` unless it is done and one of what it `made` is still there; what it returns is kept as the stage's losses."""
        if name in self.state["stages"] and (not made or any(path.exists() for path in made)):
            console.print(f"[dim]{title}: done before, in {self.state['stages'][name]['seconds']:.0f} s[/]")
            return
        started = time.perf_counter()
        with stage_bar(title) as report:
            losses = work(report)
        self.state["stages"][name] = {"seconds": round(time.perf_counter() - started, 2), "losses": losses}
        write_json(self.path, self.state)

    def record(self) -> dict:
        """Wall seconds, losses, settings and versions, for the report."""
        stages = self.state["stages"]
        return {
            "settings": self.state["settings"],
            "seed": self.state["settings"]["seed"],
            "seconds": {name: stage["seconds"] for name, stage in stages.items()},
            "losses": {name: stage["losses"] for name, stage in stages.items() if stage["losses"]},
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Python, machine and the libraries that matter."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "threads": str(torch.get_num_threads())}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
