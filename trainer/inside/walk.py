"""The noise walk (5.7, fig. 11): with one prompt, move the noise from seed to seed, find the jumps."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apt_core.engine.pipeline import OneStepPipeline
from apt_core.errors import AptError
from apt_core.files.jsonfile import write_json
from apt_core.files.media_write import write_video
from apt_core.method.noise import draw, walk
from trainer.inside.opening import embed_all, find_captions, frames_of, show_frame
from trainer.run.pictures import enlarge
from trainer.run.plot import BLACK, BLUE, ORANGE, save_figure
from trainer.run.progress import stage_bar

COLUMNS = 13
SMALL = 256
"""If a video has shorter sides, its pixels are enlarged by a whole factor."""


def read_seeds(text: str) -> list[int]:
    """Read whole numbers separated by commas. Raises AptError for anything else, and for fewer than two."""
    words = [word.strip() for word in text.split(",")]
    if len(words) < 2 or not all(word.isdecimal() and int(word) < 2**64 for word in words):
        raise AptError(
            f"--seeds {text} cannot be walked through: give two or more whole numbers from 0 with commas in "
            "between, such as 1,2,3."
        )
    return [int(word) for word in words]


def run_walk(
    pipe: OneStepPipeline,
    prompt: str | None,
    seeds: Sequence[int],
    count: int,
    out: Path,
    *,
    closed: bool = False,
    noise: str = "apt",
    rate: float = 12,
    **sizes,
) -> list[Path]:
    """Make `count` one-step samples from each seed to the next. Returns the paths of the files.

    Writes walk.mp4, walk.png and walk.json into `out`. At each seed, the sample is the first one that
    `generate` makes with that seed. closed: also walk from the last seed to the first.
    The video shows `rate` samples a second (of a clip, its middle frame). It runs forth and back or, if
    `closed`, only forth. The change from sample to sample is the mean absolute difference of their pixels, in
    levels from 0 to 255.
    sizes: height, width, frames. Raises AptError if a seed follows itself or the prompt is missing, and as
    Request does.
    """
    way = [*seeds, seeds[0]] if closed else list(seeds)
    if len(seeds) < 2 or count < 2 or any(a == b for a, b in zip(way, way[1:])):
        raise AptError(
            f"seeds {list(seeds)} in {count} samples each are no walk: "
            "give two or more seeds, neighbours different, and 2 samples or more."
        )
    moving = pipe.request("", **sizes).frames > 1
    if prompt is None:
        prompt = find_captions(pipe, 1, moving, advice="give a prompt")[0]
    request = pipe.request(prompt, **sizes)
    [text] = embed_all(pipe, request)
    stations = [draw(noise, seed, 0, request.latents(pipe.sources)) for seed in seeds]
    items = count * (len(way) - 1) + (not closed)
    pictures, changes, norms, stations_seen, before = [], [], [], [], None
    with stage_bar("Walking") as report:
        for item in range(items):
            z = walk(stations, item, items, closed)
            frames = frames_of(pipe, pipe.latents(request, 0, text, z))
            norms.append(float(z.double().square().mean().sqrt()))
            changes += [] if before is None else [_change(before, frames)]
            pictures.append(frames[len(frames) // 2])
            before = frames
            if item % count == 0:
                stations_seen.append(frames)
            report(item + 1, items)
    if closed:
        changes.append(_change(before, stations_seen[0]))
        stations_seen.append(stations_seen[0])
    at_seeds = {item: seeds[item // count % len(seeds)] for item in range(0, items, count)}
    result = {
        "checkpoint": pipe.sources.transformer.name,
        "prompt": prompt,
        "seeds": list(seeds),
        "noise": noise,
        "closed": closed,
        "samples": items,
        "frames": request.frames,
        "noise_rms": [round(norm, 6) for norm in norms],
        "change": [round(change, 4) for change in changes],
        "per_leg": count,
        "change_of_a_leg": [round(_change(a, b), 4) for a, b in zip(stations_seen, stations_seen[1:])],
        "largest": _largest(changes, count),
    }
    paths = [out / "walk.mp4", out / "walk.png", out / "walk.json"]
    loop = pictures if closed else [*pictures, *pictures[-2:0:-1]]
    factor = max(1, SMALL // min(pictures[0].shape[:2]))
    write_video(paths[0], enlarge(np.stack(loop), factor), rate)
    _draw(paths[1], prompt, pictures, at_seeds, result)
    write_json(paths[2], result)
    return paths


def _change(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def _largest(changes: list[float], count: int) -> list[dict]:
    """For each leg, the step with the largest change, as a multiple of the leg's median change.

    There, samples jump from one mode to the next.
    """
    out = []
    for start in range(0, len(changes), count):
        leg = changes[start : start + count]
        step = int(np.argmax(leg))
        out.append(
            {
                "after_sample": start + step,
                "change": round(leg[step], 4),
                "times_the_median": round(leg[step] / max(float(np.median(leg)), 1e-9), 2),
            }
        )
    return out


def _draw(
    path: Path, prompt: str, pictures: list[np.ndarray], at_seeds: dict[int, int], result: dict
) -> None:
    from matplotlib.figure import Figure

    count, legs = result["per_leg"], len(result["largest"])
    places = sorted({round(place) for place in np.linspace(0, count, min(COLUMNS, count + 1))})
    figure = Figure(figsize=(1.1 * len(places) + 1, 1.35 * legs + 3.8), layout="constrained")
    figure.suptitle(
        textwrap.shorten(f"\u201c{prompt}\u201d: one step from noise that goes from seed to seed", 140),
        fontsize=12,
    )
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.35 * legs + 0.3, 3.3))
    grid = top.subplots(legs, len(places), squeeze=False)
    for leg, (line, largest) in enumerate(zip(grid, result["largest"])):
        for axes, place in zip(line, places):
            item = leg * count + place
            seed = at_seeds.get(item % len(pictures))
            show_frame(axes, pictures[item % len(pictures)], f"{item}" if seed is None else f"seed {seed}")
            if seed is not None:
                axes.title.set_fontweight("bold")
            if item - largest["after_sample"] in (0, 1):
                for side in axes.spines.values():
                    side.set(color=ORANGE, linewidth=3)
    _draw_change(bottom.subplots(), at_seeds, result)
    save_figure(figure, path)


def _draw_change(axes, at_seeds: dict[int, int], result: dict) -> None:
    change = result["change"]
    places = np.arange(len(change)) + 0.5  # a change lies between two samples
    axes.plot(
        places, change, color=BLUE, marker="o", markersize=4, linewidth=1.6, label="change to the next sample"
    )
    worst = [step["after_sample"] for step in result["largest"]]
    axes.plot(
        places[worst],
        [change[step] for step in worst],
        "s",
        color=ORANGE,
        markersize=9,
        markerfacecolor="none",
        markeredgewidth=2,
        label="largest of each leg (framed above)",
    )
    for number, item in enumerate(at_seeds):
        axes.axvline(
            item, color=BLACK, linestyle="--", linewidth=1, label="at a seed" if number == 0 else None
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sample")
    axes.set_ylabel("mean |difference|, 0 to 255")
    ends = ", ".join(f"{value:.0f}" for value in result["change_of_a_leg"])
    axes.set_title(f"change from sample to sample; straight from seed to seed it is {ends}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
