"""The whole pipeline in miniature: captioned clips, precompute, stages 1 and 2, samples and a report."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from apt_core.errors import AptError
from apt_core.files.atomic import make_folder, replacing
from apt_core.files.jsonfile import read_object, write_json
from apt_core.loading.checkpoint import load_transformer
from apt_core.loading.text_files import load_text_encoder
from trainer.config import Preset, comparable
from trainer.data.batches import Batches
from trainer.data.shards import INDEX
from trainer.jobs.plan import LATENTS, final_file
from trainer.jobs.training import run_adversarial, run_distill, run_precompute
from trainer.machines.machine import versions
from trainer.mini import ASSETS
from trainer.mini.clips import SIZE
from trainer.proof.report import write_report
from trainer.run.identity import refuse_another
from trainer.run.plot import plot_run
from trainer.run.progress import console, stage_bar

STATE_FILE = "state.json"


@dataclass(frozen=True)
class Demo:
    """One run of the demo.

    preset: with `recipe` applied; data: a folder of captioned clips and pictures, or None to draw
    them; samples: how many samples each column of the report is judged on.
    """

    out: Path
    preset: Preset
    recipe: str = "paper"
    data: Path | None = None
    seed: int = 0
    samples: int = 128
    skip_bad: bool = False
    truncate_captions: bool = False
    device: str = "cpu"

    def run(self) -> dict:
        """Run every stage that is not finished yet. Returns the report.

        Raises AptError as `train` does.
        """
        state, batches, names = self.train()
        kinds = [kind for kind in ("image", "video") if kind in batches.datasets]
        load_transformer(names["video"])  # check the result as a user would load it
        files = {
            kind: {
                "base": ASSETS / "transformer.safetensors",
                "distilled": names["distill"],
                "apt": names[kind],
            }
            for kind in kinds
        }
        with stage_bar("Sampling and judging") as report:
            result = write_report(self, files, batches, state.record(), report)
        plot_run(self.out)
        where = f"[bold]{escape(str(names['video']))}[/] opens in ComfyUI's Load Diffusion Model"
        console.print(f"{where}; see compare.png, sample.mp4 and report.json beside it.", soft_wrap=True)
        return result

    def train(self, last: str = "video") -> tuple["RunState", Batches, dict[str, Path]]:
        """Run the unfinished stages up to `last` ("distill", "image" or "video"), as the commands do.

        Returns the state of the run, the samples, and the result files by stage. Raises AptError for unusable
        data (before any training starts), and for an `out` that cannot be written or that holds a run with
        other settings.
        """
        size = self.preset.data
        for height, width in (size.size("video"), size.size("image")):
            if self.data is None and (height, width) != (SIZE, SIZE):
                raise AptError(
                    f"preset {self.preset.name} asks for {width}x{height} pixels, "
                    f"but drawn clips have {SIZE}x{SIZE}; give --data."
                )
        make_folder(self.out)
        state, latents = RunState(self.out / STATE_FILE, self._identity()), self.out / LATENTS
        # The last state of each stage is enough to resume, and to look into the discriminator.
        machine = {"device": self.device, "keep_last": 1, "keep_best": 0}
        preset = self.preset.model_copy(update={"train": self.preset.train.model_copy(update=machine)})
        names = {stage: final_file(self.out, preset, stage) for stage in ("distill", "image", "video")}
        options = {"skip_bad": self.skip_bad, "truncate_captions": self.truncate_captions, "seed": self.seed}

        def encode() -> list:
            run_precompute(preset, self.data, self.out, **options)
            return []

        state.stage("precompute", encode, latents / INDEX)
        _keep_base(self.out)
        state.stage("distill", lambda: run_distill(preset, self.out, seed=self.seed), names["distill"])
        batches = Batches(
            latents, load_text_encoder(ASSETS / "text_encoder.safetensors"), self.seed, size.held_out
        )
        kinds = [kind for kind in ("image", "video") if kind in batches.datasets]
        for kind in kinds[: {"distill": 0, "image": 1}.get(last)]:

            def train(kind: str = kind) -> list:
                return run_adversarial(preset, kind, self.out, recipe=self.recipe, seed=self.seed)

            state.stage(f"adversarial_{kind}", train, names[kind])
        if kinds == ["image"] and last == "video":  # no clips: the image phase gives the result
            with replacing(names["video"]) as path:
                shutil.copyfile(names["image"], path)
        return state, batches, names

    def _identity(self) -> dict:
        """The settings that two runs must share to count as the same run."""
        keys = ("recipe", "seed", "skip_bad", "truncate_captions")
        facts = {key: getattr(self, key) for key in keys} | {
            "data": str(self.data.resolve()) if self.data else None
        }
        return facts | {"preset": self.preset.model_dump()}


def _keep_base(out: Path) -> None:
    """Copy the base into the run's folder, so that all models to compare are in one place."""
    base = out / "base.safetensors"
    if not base.exists():
        with replacing(base) as path:
            shutil.copyfile(ASSETS / "transformer.safetensors", path)


def read_state(path: Path) -> dict:
    """What a run's state.json holds: its `settings`, among them the seed, and its `stages`, each with seconds
    and losses. Earlier versions called the recipe `variant`. Raises AptError for a file that is missing or
    damaged.
    """
    remedy = "delete it to start over, or give another --out"
    state = read_object(path, remedy)
    settings, stages = state.get("settings"), state.get("stages")
    if (
        not isinstance(settings, dict)
        or "seed" not in settings
        or not isinstance(stages, dict)
        or not all(isinstance(one, dict) and {"seconds", "losses"} <= one.keys() for one in stages.values())
    ):
        raise AptError(f"{path} is damaged: {remedy}.")
    if "variant" in settings:
        settings["recipe"] = settings.pop("variant")
    return state


class RunState:
    """A small file that says which stages of a run are finished, with their losses and seconds (wall time).

    Raises AptError if the file is damaged or belongs to a run with another identity.
    """

    def __init__(self, path: Path, identity: dict) -> None:
        self.path = path
        identity = json.loads(json.dumps(identity))
        self.state = {"settings": identity, "stages": {}}
        if path.exists():
            self.state = read_state(path)
            refuse_another(path.parent, "run", _shared(self.state["settings"]), _shared(identity))

    def stage(self, name: str, work: Callable[[], list], made: Path) -> None:
        """Call `work()`, unless the stage is finished and its file `made` still exists.

        What `work` returns is stored as the stage's losses.
        """
        if name in self.state["stages"] and made.exists():
            console.print(f"[dim]{name}: done before, in {self.state['stages'][name]['seconds']:.0f} s[/]")
            return
        started = time.perf_counter()
        losses = work()
        self.state["stages"][name] = {"seconds": round(time.perf_counter() - started, 2), "losses": losses}
        write_json(self.path, self.state)

    def record(self) -> dict:
        """Seconds, losses, settings and versions, for the report."""
        stages = self.state["stages"]
        return {
            "settings": self.state["settings"],
            "seed": self.state["settings"]["seed"],
            "seconds": {name: stage["seconds"] for name, stage in stages.items()},
            "losses": {name: stage["losses"] for name, stage in stages.items() if stage["losses"]},
            "versions": versions(),
        }


def _shared(settings: dict) -> dict:
    """The settings of a run in a form that this version shares with earlier ones."""
    try:
        return settings | {"preset": comparable(settings["preset"], settings["recipe"])}
    except (ValueError, KeyError):  # written by a version with settings that we do not know
        return settings
