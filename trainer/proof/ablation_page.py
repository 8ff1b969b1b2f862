"""Show an ablation's results: one self-contained HTML page with a table and a chart."""

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

from apt_core.files.atomic import replacing
from trainer.run.plot import BLACK, BLUE, RED

from .variants import REFERENCE
from .verdict import CANNOT_TELL, DOES_NOT, HOLDS, NO_CLAIM

CHARTED = ("fd", "patch_fd", "sharpness", "structure")
GREY = "#595959"
# The markers differ in shape as well as in colour.
MARKS = {
    HOLDS: (BLUE, "o", "\u25cf"),
    DOES_NOT: (RED, "X", "\u2716"),
    CANNOT_TELL: (GREY, "D", "\u25c7"),
    NO_CLAIM: (BLACK, ".", "\u00b7"),
}
LOG_FROM = 20.0  # log scale when the largest figure is this many times the smallest
STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
p {{ max-width: 60rem; }}
.wide {{ overflow-x: auto; }} img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .45rem .7rem; border-bottom: 1px solid #ddd; }}
thead th {{ border-bottom: 2px solid #444; white-space: nowrap; }}
td.n {{ text-align: right; white-space: nowrap; }}
tbody th {{ position: sticky; left: 0; background: #fff; }}
td.claim {{ min-width: 17rem; }} td.verdict {{ min-width: 12rem; }}
small {{ color: {GREY}; font-weight: normal; }} tr.reference th, tr.reference td {{ background: #f3f3f3; }}
.holds {{ color: {BLUE}; font-weight: 600; }} .not {{ color: #a84a00; font-weight: 600; }}
.open {{ color: {GREY}; }} code {{ font-size: .9em; overflow-wrap: anywhere; }}
"""
CLASSES = {HOLDS: "holds", DOES_NOT: "not", CANNOT_TELL: "open", NO_CLAIM: "open"}


def write_page(out: Path, result: Mapping) -> None:
    """Write ablations.png, and ablations.html with the picture in it, from the content of ablations.json."""
    picture = chart(result)
    with replacing(out / "ablations.png") as part:
        part.write_bytes(picture)
    with replacing(out / "ablations.html") as part:
        part.write_text(page(result, picture), encoding="utf-8")


def title(result: Mapping) -> str:
    """What was compared, in one line."""
    settings, seeds = result["settings"], result["seeds"]
    many = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    return (
        f"Ablations of the {settings['phase']} phase: recipe {settings['recipe']} of "
        f"{settings['preset']['name']}, {many}, {settings['samples']} samples each"
    )


def chart(result: Mapping) -> bytes:
    """The chart as a PNG, with one panel per figure.

    Each variant is a dot with its interval; the reference is a line, and its interval a band.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, names = result["rows"], list(result["rows"])
    figure = Figure(figsize=(15, 2.0 + 0.34 * len(names)), layout="constrained")
    figure.suptitle(title(result), fontsize=13)
    panels = figure.subplots(1, len(CHARTED), sharey=True)
    for axes, name in zip(panels, CHARTED):
        found = {variant: rows[variant]["figures"].get(name) for variant in names}
        means = [one["mean"] for one in found.values() if one]
        if means and min(means) > 0 and max(means) > LOG_FROM * min(means):
            axes.set_xscale("log")
            axes.set_xlim(left=0.6 * min(means))  # a log axis cannot show an interval that reaches 0
        if reference := found[REFERENCE]:
            axes.axvline(reference["mean"], color=BLACK, linewidth=1, linestyle="--", zorder=1)
            half = reference["half"] or 0.0
            axes.axvspan(
                max(reference["mean"] - half, 1e-3 * reference["mean"]),
                reference["mean"] + half,
                color="0.9",
                zorder=0,
            )
        for place, variant in enumerate(names):
            if one := found[variant]:
                color, mark, _ = MARKS[rows[variant]["verdict"]]
                half = one["half"] or 0.0
                below = min(half, one["mean"] * 0.999) if axes.get_xscale() == "log" else half
                axes.errorbar(
                    one["mean"],
                    place,
                    xerr=[[below], [half]],
                    color=color,
                    marker=mark,
                    markersize=8,
                    capsize=3,
                    linewidth=1.4,
                    markerfacecolor="white" if mark == "D" else color,
                    zorder=3,
                )
        axes.set_title(result["figures"][name].replace(", ", "\n"), fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.grid(axis="y", alpha=0.15)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    keys = [
        Line2D(
            [],
            [],
            color=color,
            marker=mark,
            linestyle="",
            markersize=8,
            markerfacecolor="white" if mark == "D" else color,
            label=word,
        )
        for word, (color, mark, _) in MARKS.items()
    ]
    keys.append(
        Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label=f"{REFERENCE}, its interval shaded")
    )
    legend = figure.legend(
        handles=keys, loc="outside lower center", ncols=len(keys), fontsize=10, frameon=False
    )
    legend.set_title(
        f"The paper's claim ... (bars: {result['confidence']:.0%} intervals over seeds)", prop={"size": 10}
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(result: Mapping, picture: bytes) -> str:
    """The HTML page; it loads nothing from outside."""
    rows = result["rows"]
    shown = [name for name in result["figures"] if any(row["figures"].get(name) for row in rows.values())]
    head = "".join(
        f'<th scope="col" title="{escape(result["figures"][name])}">{escape(name)}</th>' for name in shown
    )
    body = "".join(_row(name, row, shown) for name, row in rows.items())
    counts = ", ".join(f"{sum(row['verdict'] == word for row in rows.values())} {word}" for word in MARKS)
    legend = "".join(f"<li><b>{escape(name)}</b>: {escape(result['figures'][name])}</li>" for name in shown)
    facts = {
        "command": result["command"],
        "seeds": result["seeds"],
        **result["machine"],
        **result["versions"],
    }
    about = "".join(
        f"<tr><th>{escape(str(name))}</th><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in facts.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title(result))}</title><style>{STYLE}</style></head>
<body><h1>{escape(title(result))}</h1>
<p>Each row changes one thing of <b>{REFERENCE}</b>, the first row. Claims and sections are those of
arXiv 2501.08316. Verdicts: {escape(counts)}.</p>
<p><small>{escape(result["rule"])}</small></p>
<img alt="{escape(title(result))}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<h2>All figures</h2>
<p><small>Mean \u00b1 half of the {result["confidence"]:.0%} interval over seeds; below it the difference to
{REFERENCE}.</small></p>
<div class="wide"><table><thead><tr><th scope="col">variant</th><th scope="col">the paper's claim</th>
<th scope="col">verdict</th>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
<ul>{legend}</ul><h2>How it was made</h2><table><tbody>{about}</tbody></table></body></html>
"""


def _row(name: str, row: Mapping, shown: list[str]) -> str:
    word = row["verdict"]
    claim = (
        f"{escape(row['claim'])} <small>({escape(row['section'])})</small>"
        if row["claim"]
        else "<small>none</small>"
    )
    tests = "".join(
        f"<br><small>{escape(test['figure'])} {test['claimed']} than {escape(test['against'])}: "
        f"{_cell(test['difference'], sign=True)}, {test['outcome']}</small>"
        for test in row["tests"]
    )
    failed = "".join(
        f"<br><small>seed {escape(seed)} broke off: {escape(why)}</small>"
        for seed, why in row["failed"].items()
    )
    cells = ""
    for figure in shown:
        apart = row["difference"].get(figure) if name != REFERENCE else None
        cells += (
            f'<td class="n">{_cell(row["figures"].get(figure))}'
            + (f"<br><small>{_cell(apart, sign=True)}</small>" if apart else "")
            + "</td>"
        )
    return (
        f"<tr{' class=reference' if name == REFERENCE else ''}><th "
        f'scope="row">{escape(name)}<br><small>{escape(row["what"])}</small></th>'
        f'<td class="claim">{claim}</td><td class="verdict"><span class="{CLASSES[word]}">{MARKS[word][2]} '
        f"{word}</span>{tests}{failed}</td>{cells}</tr>"
    )


def _cell(found: Mapping | None, sign: bool = False) -> str:
    if found is None:
        return "\u2013"
    mean = f"{found['mean']:+.3g}" if sign else f"{found['mean']:.3g}"
    return mean if found["half"] is None else f"{mean}\u00a0\u00b1\u00a0{found['half']:.2g}"
