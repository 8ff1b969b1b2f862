"""The paper's linear probe (5.5, fig. 10): how much of the final sample each generator block holds."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.files.jsonfile import write_json
from apt_core.method.generator import one_step
from apt_core.method.linear_probe import Ridge, band_energies
from apt_core.method.noise import draw
from apt_core.models.patches import from_patches, to_patches
from trainer.inside.opening import embed_all, find_captions, frames_of, show_frame
from trainer.run.plot import BLACK, BLUE, ORANGE, save_figure
from trainer.run.progress import stage_bar

Sample = Callable[[int], tuple[Tensor, Tensor]]
"""A function from a sample's number to its noise `[1, C, f, h, w]` and text `[1, L, d]`."""
BANDS = ("all", "low", "high")
ROWS, COLUMNS = 4, 8


@torch.no_grad()
def observe(model: nn.Module, z: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Run the generator on a batch and record its tokens.

    Returns the final latent `x_hat = G(z, c)`, and tokens `[B, S, d]`: the patches of the noise, then the
    output of each block.
    """
    t = torch.full((len(z),), 1000.0, device=z.device)
    inner = model(z, t, text, taps=range(1, model.config.num_layers + 1))
    return one_step(model, z, text), [to_patches(z, model.config.patch_size), *inner]


def fit(
    model: nn.Module,
    sample: Sample,
    numbers: Sequence[int],
    penalty: float,
    report: Callable = lambda *_: None,
) -> list[tuple[Tensor, Tensor]]:
    """Fit a linear layer from each block's tokens to the final latent's patches, over the samples `numbers`.

    Returns (weight, bias) in fp64 for each; entry 0 reads the noise, entry k reads block k. penalty: see
    Ridge.solve.
    """
    probes = [Ridge() for _ in range(model.config.num_layers + 1)]
    for done, number in enumerate(numbers, start=1):
        x, tokens = observe(model, *sample(number))
        target = to_patches(x, model.config.patch_size).flatten(0, 1)
        for ridge, features in zip(probes, tokens):
            ridge.add(features.flatten(0, 1), target)
        report(done, len(numbers))
    return [ridge.solve(penalty) for ridge in probes]


def read(
    model: nn.Module, probes: Sequence[tuple[Tensor, Tensor]], z: Tensor, text: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """A batch's final latents, and each probe's prediction of them, all `[B, C, f, h, w]` in fp32."""
    x, tokens = observe(model, z, text)
    patch = model.config.patch_size
    return x, [
        from_patches(features.double() @ weight + bias, patch, x.shape[2:]).float()
        for features, (weight, bias) in zip(tokens, probes)
    ]


def judge(
    model: nn.Module,
    probes: Sequence[tuple[Tensor, Tensor]],
    sample: Sample,
    numbers: Sequence[int],
    cut: float,
    report: Callable = lambda *_: None,
) -> dict[str, list[float]]:
    """The squared error of each probe over the samples `numbers`, as a share of the samples' variance.

    1 is no better than predicting the samples' mean at each place. The errors are over all spatial
    frequencies, over the low and over the high ones (see band_energies).
    """
    errors, squares, total = np.zeros((len(probes), 2)), np.zeros(2), 0.0
    for done, number in enumerate(numbers, start=1):
        x, guesses = read(model, probes, *sample(number))
        errors += [band_energies(guess - x, cut) for guess in guesses]
        squares += band_energies(x, cut)
        total = total + x.double()
        report(done, len(numbers))
    variance = squares - len(numbers) * np.array(band_energies(total / len(numbers), cut))
    low, high = (errors / variance).T.tolist()
    return {"all": (errors.sum(1) / variance.sum()).tolist(), "low": low, "high": high}


def run_probe(
    pipe: OneStepPipeline,
    out: Path,
    *,
    samples: int = 512,
    held_out: int = 128,
    prompts: Sequence[str] = (),
    shards: Path | None = None,
    seed: int = 0,
    penalty: float = 1e-6,
    cut: float = 1 / 3,
    **sizes,
) -> dict:
    """Fit a probe to every block and write probe.png and probe.json into `out`.

    samples: how many to fit on; held_out: how many others to judge on.
    sizes: height, width, frames; by default those that the checkpoint was trained for.
    Memory must hold the tokens of all blocks for one sample.
    Raises AptError when there are no captions to sample, and for sizes that the model cannot make.
    """
    total = samples + held_out
    first = pipe.request("", **sizes)
    captions = find_captions(pipe, total, first.frames > 1, prompts, shards)
    request = pipe.request(captions, **sizes)
    texts = embed_all(pipe, request)
    shape = request.latents(pipe.sources)
    model = pipe.sources.transformer.load(pipe.dtype, pipe.device).eval().requires_grad_(False)

    def sample(number: int) -> tuple[Tensor, Tensor]:
        return draw("apt", seed, number, shape)[None].to(pipe.device), texts[number].to(pipe.device)

    held = range(samples, total)
    with stage_bar("Probes") as report:
        probes = fit(model, sample, range(samples), penalty, report)
    with stage_bar("Held-out samples") as report:
        errors = judge(model, probes, sample, held, cut, report)
    rows = [read(model, probes, *sample(number)) for number in held[:ROWS]]
    blocks = model.config.num_layers
    result = {
        "checkpoint": pipe.sources.transformer.name,
        "blocks": blocks,
        "samples": samples,
        "held_out": held_out,
        "latent": list(shape),
        "seed": seed,
        "penalty": penalty,
        "cut": cut,
        "error": {band: [round(value, 6) for value in errors[band]] for band in BANDS},
    }
    del model
    shown = sorted({round(place) for place in np.linspace(0, blocks, min(COLUMNS, blocks + 1))})
    pictures = [
        [_middle(frames_of(pipe, latent)) for latent in (*(guesses[block] for block in shown), x)]
        for x, guesses in rows
    ]
    _draw(out / "probe.png", captions[samples : samples + ROWS], shown, pictures, result)
    write_json(out / "probe.json", result)
    return result


def _middle(frames: np.ndarray) -> np.ndarray:
    return frames[len(frames) // 2]


def _draw(
    path: Path, captions: list[str], shown: list[int], pictures: list[list[np.ndarray]], result: dict
) -> None:
    from matplotlib.figure import Figure

    error, columns = result["error"], len(shown) + 1
    figure = Figure(figsize=(1.45 * columns + 2.2, 1.5 * len(pictures) + 4), layout="constrained")
    figure.suptitle(
        "What a linear layer reads of the final sample behind each block of the one-step generator",
        fontsize=12,
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.5 * len(pictures) + 0.4, 3.2))
    grid = top.subplots(len(pictures), columns, squeeze=False)
    names = ["noise" if block == 0 else f"block {block}" for block in shown]
    titles = [f"{name}\nerror {error['all'][block]:.2f}" for name, block in zip(names, shown)] + [
        "final sample\n"
    ]
    for row, (caption, line) in enumerate(zip(captions, pictures)):
        for column, frame in enumerate(line):
            label = (
                textwrap.fill(textwrap.shorten(caption, 90, placeholder="\u2026"), 20) if column == 0 else ""
            )
            show_frame(grid[row][column], frame, titles[column] if row == 0 else "", label)
    axes = bottom.subplots()
    places = range(result["blocks"] + 1)
    low = f"low frequencies, below {result['cut']:.2f} of the highest (layout)"
    for band, label, color, style, marker in (
        ("all", "all frequencies", BLACK, "-", "o"),
        ("low", low, BLUE, "--", "s"),
        ("high", "high frequencies (detail)", ORANGE, ":", "^"),
    ):
        axes.plot(
            places,
            error[band],
            color=color,
            linestyle=style,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            label=label,
        )
    axes.axhline(1, color="0.6", linewidth=1, zorder=0)
    axes.set_ylim(0, max(1.05, min(1.5, max(max(error[band]) for band in BANDS) * 1.05)))
    axes.set_xticks([place for place in places if result["blocks"] <= 12 or place % 5 == 0])
    axes.set_xlabel("block (0: the noise itself)")
    axes.set_ylabel("squared error / variance")
    axes.set_title(
        f"{result['held_out']} held-out samples; 1 is no better than the samples' mean", fontsize=10
    )
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    save_figure(figure, path)
