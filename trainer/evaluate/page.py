"""The page of an evaluation: one HTML file with the table and, for each prompt, every model's clips."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from apt_core.files.atomic import replacing

from .curves import curves
from .metrics import WORDS
from .protocols import as_html

LIMIT = 200 * 2**20
"""If the clips have more bytes than this together, the page links to the files instead of containing them."""
SMALL = 128
"""A clip whose sides have at most this many pixels is scaled without smoothing."""


def write_page(path: Path, result: dict, limit: int = LIMIT) -> None:
    """Write the page to `path`. result: what `compare.evaluate` returns; the paths of its clips are relative
    to the page's folder. limit: see LIMIT.
    """
    template = files(__package__) / "template"
    total = sum((path.parent / c["file"]).stat().st_size for m in result["models"] for c in m["clips"])
    if result["real"]:
        total += sum((path.parent / clip["file"]).stat().st_size for clip in _beside(result).values())
    parts = {
        "STYLE": _read(template, "page.css"),
        "ABOUT": _about(result),
        "TABLE": _table(result) + as_html(result.get("protocol")),
        "HINT": _hint(result, total > limit),
        "CURVES": curves(result),
        "CLIPS": _clips(path.parent, result, embed=total <= limit),
        "FACTS": _facts(result),
        "SCRIPT": _read(template, "page.js"),
    }
    page = _read(template, "page.html")
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        # The template is split at its marks, not searched and replaced: a prompt may contain such a mark.
        for number, piece in enumerate(page.split("@@")):
            file.write(parts[piece] if number % 2 else piece)


def _read(template, name: str) -> str:
    return (template / name).read_text(encoding="utf-8").rstrip("\n")


def _about(result: dict) -> str:
    size, many = result["size"], len(result["prompts"])
    picture = size["frames"] == 1
    each = "" if result["count"] == 1 else f", {result['count']} samples of each"
    length = "pictures" if picture else f"{size['frames']} frames at {size['fps']:g} fps"
    real = result["real"]
    beside = f" Beside {len(real['clips'])} {real['what']}." if real else ""
    return escape(
        f"{many} prompt{'s' * (many > 1)}{each}, seed {result['seed']}; {size['width']}x{size['height']}, "
        f"{length}.{beside}"
    )


def _table(result: dict) -> str:
    names = list(dict.fromkeys(name for model in result["models"] for name in model["metrics"]))
    sets = [*result["models"], *([{"label": "real"} | result["real"]] if result["real"] else [])]
    head = "".join(f"<th scope=col>{escape(entry['label'])}</th>" for entry in sets)
    lines = [f"<table><thead><tr><th></th>{head}</tr></thead><tbody>"]
    for name in names:
        metric = WORDS.get(name)
        title, words = (
            (metric.title, metric.words) if metric else (name, "Frechet distance to the real clips")
        )
        cells = "".join(f"<td>{cell(entry['metrics'].get(name))}</td>" for entry in sets)
        lines.append(f"<tr><td>{escape(title)}<small>{escape(words)}</small></td>{cells}</tr>")
    seconds = "".join(
        f"<td>{entry['seconds_each']:.3g}</td>" if "seconds_each" in entry else "<td>-</td>" for entry in sets
    )
    lines.append(f"<tr><td>Seconds<small>of one sample, median</small></td>{seconds}</tr></tbody></table>")
    return "\n".join(lines)


def _hint(result: dict, linked: bool) -> str:
    hint = (
        "In brackets: the figure divided by that of the real clips. Near 1 is close to them; more sharpness, "
        "saturation or contrast is not better. "
        if result["real"]
        else "There are no real clips to compare with: the figures show how the models differ, not which "
        "is better. "
    )
    return hint + ("The clips are in the folder clips beside this page. " if linked else "")


def _beside(result: dict) -> dict[str, dict]:
    """For each prompt that is the caption of a real clip, the first such clip."""
    found: dict[str, dict] = {}
    for clip in result["real"]["clips"] if result["real"] else []:
        if clip["caption"] in result["prompts"]:
            found.setdefault(clip["caption"], clip)
    return found


def _clips(folder: Path, result: dict, embed: bool) -> str:
    real, count = _beside(result), result["count"]
    small = " small" if max(result["size"]["height"], result["size"]["width"]) <= SMALL else ""
    lines = []
    for number, prompt in enumerate(p for p in result["prompts"] for _ in range(count)):
        nth = f" ({number % count + 1} of {count})" if count > 1 else ""
        lines.append(f"<h2>{escape(prompt + nth)}</h2>\n<div class='row{small}'>")
        shown = [(model["label"], model["clips"][number]["file"]) for model in result["models"]]
        shown += [("real", real[prompt]["file"])] if prompt in real else []
        lines += [_figure(folder, label, file, f"{label}: {prompt}", embed) for label, file in shown]
        lines.append("</div>")
    return "\n".join(lines)


def _figure(folder: Path, label: str, file: str, words: str, embed: bool) -> str:
    kind, address = "image/png" if file.endswith(".png") else "video/mp4", file
    if embed:
        address = f"data:{kind};base64,{base64.b64encode((folder / file).read_bytes()).decode()}"
    source = f'src="{escape(address)}"'
    media = (
        f'<img {source} alt="{escape(words)}">'
        if kind == "image/png"
        else f'<video {source} aria-label="{escape(words)}" muted playsinline preload="auto"></video>'
    )
    return f"<figure>{media}<figcaption>{escape(label)}</figcaption></figure>"


def _facts(result: dict) -> str:
    def weights(entry: dict) -> Sequence[str]:
        return [
            f"<li>{escape(part)} {escape(file['name'])} <code>{file['sha256']}</code></li>"
            for part, file in entry["weights"].items()
        ]

    lines = []
    for model in result["models"]:
        how = [f"{model['steps']} step{'s' * (model['steps'] > 1)}"]
        how += [f"guidance {model['guidance']:g}, shift {model['shift']:g}"] if "guidance" in model else []
        lines.append(
            f"<h3>{escape(model['label'])}</h3><p>{', '.join(how)}</p><ul>{''.join(weights(model))}</ul>"
        )
    for network in result["features"]:
        lines.append(
            f"<p>{escape(network['name'])}: {escape(network['file'])} <code>{network['sha256']}</code></p>"
        )
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return "\n".join([*lines, f"<p>{escape(versions)}; {escape(result['device'])}</p>"])


def cell(figure: dict | None) -> str:
    """A figure as the tables show it: its value, and in brackets its ratio to that of the real clips."""
    if figure is None or figure["value"] is None:
        return "-"
    ratio = "" if figure["of_real"] is None else f" ({figure['of_real']:.2f}x)"
    return f"{figure['value']:.3g}{ratio}"
