"""Show where the discriminator looks: its heads' attention over real and generated samples (3.3, fig. 1)."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.jsonfile import write_json
from apt_core.method.discriminator import Discriminator
from apt_core.method.flow import shift
from apt_core.method.noise import APT, draw
from trainer.checkpoints.trained_models import open_discriminator
from trainer.config import check_phase
from trainer.data.batches import held_positions
from trainer.data.shards import ShardDataset
from trainer.inside.opening import embed_all, frames_of, show_frame
from trainer.jobs.plan import LATENTS
from trainer.run.folders import is_state, whole_states
from trainer.run.plot import BLACK, BLUE, GREEN, ORANGE, RED, save_figure

TIMES = 8
"""How many timesteps to average over, spaced evenly in probability; eq. 6 is a mean over t."""
HEADS, NUMBERED = 12, 16


def find_state(path: Path, phase: str | None = None) -> Path:
    """Find the training state that a path means.

    It may be a state itself, a stage's folder (its newest state), or a run's folder (that of its last phase).
    Raises AptError when there is none.
    """
    if phase is not None:
        check_phase(phase)
    if is_state(path):
        return path
    folders = [path, *(path / "states" / name for name in ([phase] if phase else ["video", "image"]))]
    for folder in folders:
        if states := whole_states(folder):
            return states[-1]
    which = f", phase {phase}" if phase else ""
    raise AptError(
        f"{path} holds no training state of stage 2{which}: "
        "give states/PHASE/step-..., or the folder of a run that saved one."
    )


@torch.no_grad()
def look(
    discriminator: Discriminator, x: Tensor, text: Tensor, s: float, fixed: float | None = None
) -> tuple[list[Tensor], float]:
    """The attention weights and the logit of one sample `[1, C, f, h, w]`, averaged over t.

    Returns the weights by depth, `[heads, f, h, w]` in patches, and the logit. A head's weights sum to 1.
    t takes TIMES values of `shift(U(0, 1), s)`, spaced evenly in probability (eq. 6, 7), unless the
    discriminator was trained with a `fixed` one.
    """
    t = shift((torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES, s).float().to(x.device)
    if fixed is not None:
        t = torch.full_like(t, fixed)
    grid = [n // p for n, p in zip(x.shape[2:], discriminator.backbone.config.patch_size)]
    weights, logit = None, 0.0
    for time in t:
        found = discriminator.weights(x, time[None], text)
        weights = found if weights is None else [a + b for a, b in zip(weights, found)]
        logit += float(discriminator(x, time[None], text)) / TIMES
    return [(depth[0] / TIMES).unflatten(1, grid).cpu() for depth in weights], logit


@dataclass(frozen=True)
class Seen:
    """One sample and what the discriminator makes of it.

    frame: pixels `[H, W, 3]` of the middle latent frame; weights, logit: see `look`.
    """

    source: str
    caption: str
    frame: np.ndarray
    weights: list[Tensor]
    logit: float

    def map(self, depth: int, head: int | None = None) -> np.ndarray:
        """Attention over the middle frame, `[h, w]`, of one head, or by default the mean over heads.

        1 is what every patch would get from uniform attention.
        """
        weights = self.weights[depth] if head is None else self.weights[depth][head : head + 1]
        return (weights.mean(0)[weights.shape[1] // 2] * weights[0].numel()).numpy()

    def by_frame(self, depth: int) -> np.ndarray:
        """The share of the attention that each latent frame gets."""
        return self.weights[depth].mean(0).sum((1, 2)).numpy()

    def spread(self, depth: int) -> list[float]:
        """The share of the patches that each head looks at: exp(entropy) / number of patches.

        1 is uniform attention; 1 / number is attention to a single patch.
        """
        weights = self.weights[depth].flatten(1).double()
        return (-(weights * weights.clamp_min(1e-300).log()).sum(1)).exp().div(weights.shape[1]).tolist()


def run_attention(
    state: Path,
    pipe: OneStepPipeline,
    out: Path | None = None,
    *,
    samples: int = 3,
    shards: Path | None = None,
    seed: int = 0,
    base: str = "",
) -> list[Path]:
    """Write attention.png (mean over heads), attention-heads.png (each head) and attention.json into `out`.

    Returns their paths. Real samples are held-out ones first, if the run held some out.
    state: a training state, see find_state; pipe: a pipeline with the same run's generator.
    shards: folder of real samples, by default the run's own; base: the state's base transformer, if it moved.
    Raises AptError for a state without a discriminator, and when there are no real samples.
    """
    discriminator, identity = open_discriminator(state, base or None)
    run = state.parent.parent.parent
    kind, out = identity["phase"], out or run
    data = ShardDataset(shards or run / LATENTS, kind)
    if not len(data):
        raise AptError(f"{data.folder} holds no {kind}s: give the shards of the run with --data.")
    held = held_positions(data, samples)
    places = [*held, *(place for place in range(len(data)) if place not in held)][:samples]
    time, down, across = pipe.sources.vae.stride
    cases = []
    for number, place in enumerate(places):
        x, text, [caption] = data.batch([place])
        f, h, w = x.shape[2:]
        request = pipe.request(caption, frames=(f - 1) * time + 1, height=h * down, width=w * across)
        z = draw(APT, seed, number, request.latents(pipe.sources))
        fake = pipe.latents(request, 0, embed_all(pipe, request)[0], z)
        cases += [("real", caption, x, text), ("generated", caption, fake.cpu(), text)]
    frames = [frames_of(pipe, latent)[_pixel_frame(latent.shape[2] // 2, time)] for _, _, latent, _ in cases]
    discriminator.to(pipe.device)
    seen = []
    for (source, caption, latent, text), frame in zip(cases, frames):
        weights, logit = look(
            discriminator,
            latent.to(pipe.device),
            text.to(pipe.device),
            identity["shift"],
            identity.get("discriminator_time"),
        )
        seen.append(Seen(source, caption, frame, weights, logit))
    paths = [out / "attention.png", out / "attention-heads.png", out / "attention.json"]
    taps = discriminator.taps
    _draw_depths(paths[0], seen, taps)
    _draw_heads(paths[1], seen[:2], taps)
    facts = {
        "state": str(state),
        "phase": kind,
        "taps": list(taps),
        "times": TIMES,
        "shift": identity["shift"],
        "seed": seed,
    }
    write_json(paths[2], facts | {"samples": [_facts(one, taps) for one in seen]})
    return paths


def _facts(one: Seen, taps: tuple[int, ...]) -> dict:
    depths = {}
    for depth, tap in enumerate(taps):
        depths[f"block {tap}"] = {
            "spread_by_head": [round(value, 4) for value in one.spread(depth)],
            "share_by_latent_frame": [round(float(value), 4) for value in one.by_frame(depth)],
        }
    return {"source": one.source, "caption": one.caption, "logit": round(one.logit, 4), "depths": depths}


def _pixel_frame(latent_frame: int, stride: int) -> int:
    """The middle one of the pixel frames in a latent frame. The first holds one, every other one `stride`."""
    return latent_frame * stride - stride // 2 if latent_frame else 0


def _overlay(axes, frame: np.ndarray, heat: np.ndarray, top: float):
    """Draw the attention over the grey frame, with numbers if there are few patches.

    Returns the drawn map, for a colour bar.
    """
    height, width = frame.shape[:2]
    rows, columns = heat.shape
    grey = frame @ np.array([0.299, 0.587, 0.114]) / 255
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    # viridis gets lighter evenly, which works for colour-blind readers too
    drawn = axes.imshow(
        heat,
        cmap="viridis",
        vmin=0,
        vmax=top,
        alpha=0.7,
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    if heat.size <= NUMBERED:
        for (row, column), value in np.ndenumerate(heat):
            place = (column + 0.5) * width / columns - 0.5, (row + 0.5) * height / rows - 0.5
            axes.text(
                *place,
                f"{value:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if value > 0.55 * top else "white",
            )
    return drawn


def _draw_depths(path: Path, seen: list[Seen], taps: tuple[int, ...]) -> None:
    from matplotlib.figure import Figure

    clips = seen[0].weights[0].shape[1] > 1
    figure = Figure(
        figsize=(2.0 * (len(taps) + 1) + 2, 1.75 * len(seen) + 1 + 3 * clips), layout="constrained"
    )
    figure.suptitle("Where the discriminator looks", fontsize=13)
    parts = figure.subfigures(2, 1, height_ratios=(1.75 * len(seen) + 0.5, 3)) if clips else [figure]
    grid = parts[0].subplots(len(seen), len(taps) + 1, squeeze=False)
    for row, one in enumerate(seen):
        caption = textwrap.fill(textwrap.shorten(one.caption, 90, placeholder="\u2026"), 20)
        show_frame(
            grid[row][0],
            one.frame,
            "sample" if row == 0 else "",
            f"{one.source}, logit {one.logit:.2f}\n{caption}",
        )
    for depth, tap in enumerate(taps):
        column = [line[depth + 1] for line in grid]
        top = max(one.map(depth).max() for one in seen)
        for axes, one in zip(column, seen):
            heat = _overlay(axes, one.frame, one.map(depth), top)
        column[0].set_title(f"behind block {tap}", fontsize=9)
        bar = parts[0].colorbar(heat, ax=column, location="bottom", shrink=0.85, pad=0.02)
        bar.set_label("times an even look", fontsize=8)
    if clips:
        axes = parts[1].subplots()
        for depth, (tap, color, marker) in enumerate(zip(taps, (BLUE, ORANGE, BLACK, GREEN, RED), "os^vD")):
            for source, style in (("real", "-"), ("generated", "--")):
                share = np.mean([one.by_frame(depth) for one in seen if one.source == source], axis=0)
                axes.plot(
                    range(len(share)),
                    share,
                    style,
                    color=color,
                    marker=marker,
                    label=f"block {tap}, {source}",
                )
        axes.axhline(1 / len(share), color="0.6", linewidth=1, zorder=0, label="even")
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(share)))
        axes.set_xlabel("latent frame")
        axes.set_ylabel("share of the attention")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2)
    save_figure(figure, path)


def _draw_heads(path: Path, seen: list[Seen], taps: tuple[int, ...]) -> None:
    from matplotlib.figure import Figure

    heads = min(HEADS, len(seen[0].weights[0]))
    rows = [(depth, tap, one) for depth, tap in enumerate(taps) for one in seen]
    figure = Figure(figsize=(1.45 * (heads + 1) + 2, 1.5 * len(rows) + 1), layout="constrained")
    figure.suptitle(f"Each attention head: \u201c{seen[0].caption}\u201d", fontsize=12)
    grid = figure.subplots(len(rows), heads + 1, squeeze=False)
    for line, (depth, tap, one) in zip(grid, rows):
        show_frame(line[0], one.frame, "", f"behind block {tap},\n{one.source}")
        top = max(other.map(depth, head).max() for other in seen for head in range(heads))
        for head, axes in enumerate(line[1:]):
            heat = _overlay(axes, one.frame, one.map(depth, head), top)
            if depth == 0 and one is seen[0]:
                axes.set_title(f"head {head + 1}", fontsize=9)
        bar = figure.colorbar(heat, ax=list(line), location="right", shrink=0.9)
        bar.set_label("times even", fontsize=7)
    save_figure(figure, path)
