"""Curves over updates for the page: each figure of the models of one run, with the best of them marked."""

import math
from html import escape

from .metrics import CLIP_SCORE, DISTANCES, JUDGED, WORDS

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 320, 150, 44, 8, 20
"""Of one figure, in the units of its picture: whole, and the room for the labels."""
COLOURS = 4


def curves(result: dict) -> str:
    """Small figures, one per metric, for models that differ in their number of updates; "" where fewer than
    two of one series do. A series is one run's phase with one EMA.
    """
    series: dict[int, list[dict]] = {}
    for model in sorted((m for m in result["models"] if m.get("updates") is not None), key=_updates):
        series.setdefault(model["series"], []).append(model)
    series = {n: models for n, models in series.items() if len(set(map(_updates, models))) > 1}
    if not series:
        return ""
    real = (result["real"] or {}).get("metrics", {})
    names = dict.fromkeys(name for models in series.values() for model in models for name in model["metrics"])
    figures = [_figure(name, list(series.values()), (real.get(name) or {}).get("value")) for name in names]
    key = [
        f'<span><svg viewBox="0 0 24 10"><line class="s{n % COLOURS}" x1="0" y1="5" x2="24" y2="5" '
        f'stroke-width="3"/></svg> {escape(_title(models[0]))}</span>'
        for n, models in enumerate(series.values())
    ]
    return (
        f'<h2>Over updates</h2>\n<p class="key">{"".join(key)}</p>\n<div class="curves">'
        + "\n".join(filter(None, figures))
        + '</div>\n<p class="hint">A ring marks the best: the lowest distance, the highest CLIP score,'
        " structure or alignment, else what is nearest to the real clips (dashed). No ring: "
        "nothing says which is better.</p>"
    )


def best(name: str, models: list[dict], real: float | None) -> dict | None:
    """The model with the best figure: the lowest distance, the highest CLIP score or share of the judge's, of
    other metrics the one whose ratio to the real clips' is nearest to 1; None where nothing says which it is.
    """
    there = [model for model in models if value_of(model, name) is not None]
    if not there:
        return None
    if name in DISTANCES or name not in WORDS:
        return min(there, key=lambda model: value_of(model, name))
    if name == CLIP_SCORE or name in JUDGED:
        return max(there, key=lambda model: value_of(model, name))
    if not real:
        return None
    return min(there, key=lambda model: _far(value_of(model, name) / real))


def value_of(model: dict, name: str) -> float | None:
    return model["metrics"].get(name, {}).get("value")


def _far(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf


def _updates(model: dict) -> int:
    return model["updates"]


def _title(model: dict) -> str:
    average = "" if model["ema"] is None else f", EMA {model['ema']:g}" if model["ema"] else ", raw weights"
    return f"{model['phase'] or 'updates'}{average}"


def _figure(name: str, series: list[list[dict]], real: float | None) -> str:
    drawn = [[model for model in models if value_of(model, name) is not None] for models in series]
    every = [model for models in drawn for model in models]
    if not every:
        return ""
    values = [value_of(model, name) for model in every] + ([real] if real is not None else [])
    low, high = min(values), max(values)
    first, last = (_updates(choice(every, key=_updates)) for choice in (min, max))

    def at(update: float, value: float) -> tuple[float, float]:
        x = (update - first) / (last - first or 1)
        y = (value - low) / (high - low) if high > low else 0.5
        return LEFT + x * (WIDTH - LEFT - 8), HEIGHT - BOTTOM - 6 - y * (HEIGHT - BOTTOM - TOP - 12)

    bottom, parts = HEIGHT - BOTTOM, []
    parts.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{WIDTH}"/>')
    ends = [(high, "hanging"), (low, "auto")] if high > low else [(low, "middle")]
    for value, base in ends:
        y = at(first, value)[1] + (4 if base == "middle" else 8 if base == "hanging" else 0)
        parts.append(f'<text x="{LEFT - 5}" y="{y:.1f}" text-anchor="end">{value:.3g}</text>')
    for update, anchor in ((first, "start"), (last, "end")):
        x = at(update, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{update}</text>')
    if real is not None:
        y = at(first, real)[1]
        parts.append(f'<path class="real" d="M{LEFT} {y:.1f}H{WIDTH}"><title>real: {real:.3g}</title></path>')
    chosen = best(name, every, real)
    for n, models in enumerate(drawn):
        points = [at(_updates(model), value_of(model, name)) for model in models]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="s{n % COLOURS}" style="fill:none" points="{line}"/>')
        for model, (x, y) in zip(models, points):
            words = escape(f"{model['label']}: {value_of(model, name):.3g}")
            ring = f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="7"/>' if model is chosen else ""
            dot = f'<circle class="s{n % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
            parts.append(f"<g>{dot}{ring}<title>{words}</title></g>")
    said = f": best {escape(chosen['label'])}, {value_of(chosen, name):.3g}" if chosen else ""
    title = escape(WORDS[name].title if name in WORDS else name)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}{said}">{"".join(parts)}'
        f"</svg><figcaption><b>{title}</b>{said}</figcaption></figure>"
    )
