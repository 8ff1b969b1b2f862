"""Where the discriminator looks: the attention of its heads' tokens over the frame, for real and for generated samples (3.3, fig. 1)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.discriminator import Discriminator
from apt_core.errors import AptError
from apt_core.flow import shift
from apt_core.pipeline import OneStepPipeline
from trainer.batches import held_out
from trainer.files import write_json
from trainer.inside.opening import embed_all, frames_of, save_figure, show_frame
from trainer.places import STATE
from trainer.precompute_places import LATENTS
from trainer.shards import ShardDataset
from trainer.weights import open_discriminator

TIMES = 8
"""Of t's distribution, so many equally likely values: eq. 6 asks for the mean over t."""
HEADS = 12


def find_state(path: Path, phase: str | None = None) -> Path:
    """The training state that a path stands for: a state itself, the newest of a stage's folder, or of a run's folder that of its last phase.

    Raises AptError when there is none.
    """
    if phase not in (None, "image", "video"):
        raise AptError(f"--phase {phase} is not known: it is image or video.")
    if (path / STATE).is_file():
        return path
    folders = [path, *(path / "states" / name for name in ([phase] if phase else ["video", "image"]))]
    for folder in folders:
        if states := sorted(state for state in folder.glob("step-*") if (state / STATE).is_file() and not state.suffix):
            return states[-1]
    raise AptError(f"{path} holds no training state of stage 2{f', phase {phase}' if phase else ''}: give states/PHASE/step-..., or the folder of a run that saved one.")


@torch.no_grad()
def look(discriminator: Discriminator, x: Tensor, text: Tensor, s: float) -> tuple[list[Tensor], float]:
    """Means over t of the heads' weights by depth, `[heads, f, h, w]` each (patches), and of the logit, for one sample `[1, C, f, h, w]`.

    t goes through the middles of TIMES equal shares of `shift(U(0, 1), s)` (eq. 6, 7). The weights of a head sum to 1.
    """
    t = shift((torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES, s).float().to(x.device)
    grid = [n // p for n, p in zip(x.shape[2:], discriminator.backbone.config.patch_size)]
    weights, logit = None, 0.0
    for time in t:
        found = discriminator.weights(x, time[None], text)
        weights = found if weights is None else [a + b for a, b in zip(weights, found)]
        logit += float(discriminator(x, time[None], text)) / TIMES
    return [(depth[0] / TIMES).unflatten(1, grid).cpu() for depth in weights], logit


def run_attention(state: Path, pipe: OneStepPipeline, out: Path | None = None, *, samples: int = 3, shards: Path | None = None, seed: int = 0) -> list[Path]:
    """Write attention.png (mean over attention heads), attention-heads.png (each of them) and attention.json into `out`; returns their paths.

    state: see find_state; pipe: with its generator. The real samples are ones that no update saw, where the run held some out. shards: where they lie, by
    default in the run's folder. Raises AptError for a state without a discriminator, and where there are no real samples.
    """
    discriminator, identity = open_discriminator(state)
    run = state.parent.parent.parent
    kind, out = identity["phase"], out or run
    data = ShardDataset(shards or run / LATENTS, kind)
    if not len(data):
        raise AptError(f"{data.folder} holds no {kind}s: give the shards of the run with --data.")
    held = held_out(data, samples)
    places = [*held, *(place for place in range(len(data)) if place not in held)][:samples]
    discriminator.to(pipe.device)
    rows = []
    for number, place in enumerate(places):
        x, text, [caption] = data.batch([place])
        frames, height, width = ((n - 1) * s + 1 if axis == 0 else n * s for axis, (n, s) in enumerate(zip(x.shape[2:], pipe.sources.vae.stride)))
        request = pipe.request(caption, frames=frames, height=height, width=width, seed=seed)
        z = pipe_noise(request, number, pipe)
        fake = pipe.latents(request, 0, embed_all(pipe, request)[0], z)
        for source, latent in (("real", x), ("generated", fake)):
            weights, logit = look(discriminator, latent.to(pipe.device), text.to(pipe.device), identity["shift"])
            rows.append((source, caption, latent, weights, logit))
    return []
