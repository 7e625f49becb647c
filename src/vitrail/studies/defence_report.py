"""One self-contained page about a defence: the paper's table, the sweep, and pictures before and after.

Table 2 of "Steering CLIP's vision transformer with sparse autoencoders" has a row a defence (none, the prefix, latents,
both) and a column a benchmark; here a column is a kind of attack, and each cell has its interval.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitrail.files import replacing
from vitrail.studies.report import STYLE, heat_map

PAPER_TABLE = (
    ("No Defense", 0.66, 0.63, 0.54),
    ("DP", 0.73, 0.66, 0.83),
    ("SAE (Ours)", 0.72, 0.67, 0.79),
    ("DP + Ours", 0.73, 0.67, 0.88),
)
WIDTH, HEIGHT, MARGIN = 420, 220, 36


@dataclass(frozen=True, eq=False)
class Example:
    """`picture`: what the model saw. `heat`: (h, w), the removed latents' sum at each patch."""

    picture: Image.Image
    heat: np.ndarray
    truth: str
    word: str
    before: str
    after: str


def write_defence_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]],
    clean_loss: float,
    examples: Sequence[Example],
) -> Path:
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts = [f"<h1>{escape(title)}</h1>", f"<dl>{told}</dl>"]
    parts += ["<h2>Accuracy</h2>", accuracy_table(rows)]
    parts.append(
        '<p class="caption">Accuracy, with Wilson intervals of 95 %. Back: the share of what the words took that the '
        "defence gives back, with a paired bootstrap interval. Said: answers that are the written word. Random "
        "latents: as many as the defence removes, mean of all draws.</p>"
    )
    parts += ["<h2>The sweep</h2>", sweep_plot(sweeps, clean_loss)]
    parts.append(
        '<p class="caption">Validation pictures. Each point is a set of latents or another edit; right of the line it '
        "costs more clean accuracy than is allowed. Of those left of it the highest is taken.</p>"
    )
    if examples:
        parts += ["<h2>Before and after</h2>", f'<div class="pictures">{"".join(map(example_card, examples))}</div>']
        parts.append(
            '<p class="caption">Bright: where the removed latents fire. Point at a picture to see it bare.</p>'
        )
    parts += ["<h2>The paper's Table 2</h2>", paper_table()]
    parts.append(
        '<p class="caption">CLIP ViT-B/32, the last residual layer, photographs of things with labels on them: other '
        "pictures, words and models than above. To be read beside it, not as its target.</p>"
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a defence, a column a condition; clean first."""
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    cells = {(row["defence"], row["condition"]): row for row in rows}
    sizes = {row["condition"]: row["n"] for row in rows}
    head = "".join(f"<th>{escape(one)}<small>{sizes[one]} pictures</small></th>" for one in conditions)
    lines = []
    for defence in dict.fromkeys(row["defence"] for row in rows):
        kind = "control" if defence.startswith("random") else "coder" if "latents" in defence else ""
        shown = "".join(_cell(cells.get((defence, condition))) for condition in conditions)
        lines.append(f'<tr class="{kind}"><th>{escape(defence)}</th>{shown}</tr>')
    body = "".join(lines)
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "<td>–</td>"
    lines = []
    if row["low"] is not None:
        lines.append(f"{100 * row['low']:.1f} to {100 * row['high']:.1f}")
    elif row.get("sd") is not None:
        lines.append(f"sd {100 * row['sd']:.1f} of {row['draws']} draws")
    back, change = row.get("back"), row.get("change")
    if row["defence"] != "none" and back is not None and back["value"] is not None:
        span = "" if back["low"] is None else f" ({100 * back['low']:.0f} to {100 * back['high']:.0f})"
        lines.append(f"back {100 * back['value']:.0f} %{span}")
    elif row["defence"] != "none" and row["condition"] == "clean" and change is not None:
        span = "" if change["low"] is None else f" ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
        lines.append(f"change {100 * change['value']:+.1f}{span}")
    if row.get("said_word") is not None:
        lines.append(f"said {100 * row['said_word']:.0f} %")
    small = "".join(f"<small>{escape(line)}</small>" for line in lines)
    return f"<td>{100 * row['accuracy']:.1f}{small}</td>"


def sweep_plot(sweeps: Mapping[str, Sequence[Mapping[str, Any]]], clean_loss: float) -> str:
    """Clean loss across (cut at ten points), accuracy under attack up, a colour a kind."""
    colours = ("#d99a00", "#2f6fde", "#888888", "#1f9e6e", "#b04fc0", "#d1495b", "#444444")
    most, everything = 0.10, [one["attacked"] for some in sweeps.values() for one in some]
    if not everything:
        return "<p>Nothing was tried.</p>"
    low, high = min(everything) - 0.02, max(everything) + 0.02

    def at(loss: float, attacked: float) -> tuple[float, float]:
        across = (min(max(loss, -0.02), most) + 0.02) / (most + 0.02)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - (attacked - low) / (high - low) * (
            HEIGHT - 2 * MARGIN
        )

    edge = at(clean_loss, low)[0]
    marks = [f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{MARGIN}" y2="{HEIGHT - MARGIN}" stroke="#888"/>']
    for value in (low, high):
        y = at(0, value)[1]
        marks.append(f'<text x="{MARGIN - 4}" y="{y:.1f}" font-size="9" text-anchor="end">{100 * value:.0f}</text>')
    for loss in (0.0, clean_loss, 0.05, most):
        x = at(loss, low)[0]
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" font-size="9" text-anchor="middle">{100 * loss:.0f}</text>')
    marks.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" font-size="9" text-anchor="middle">clean loss, points</text>')
    legend = []
    for place, (kind, some) in enumerate(sweeps.items()):
        colour = colours[place % len(colours)]
        for one in some:
            x, y = at(one["clean_loss"], one["attacked"])
            marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity=".65"/>')
        legend.append(f'<span style="color:{colour}">&#9679;</span> {escape(kind)}')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(marks)}</svg>'
    return f'<div>{svg}</div><p class="caption">{" &nbsp; ".join(legend)}</p>'


def example_card(one: Example) -> str:
    heat = heat_map(one.heat.astype(np.float32), float(one.heat.max()) or 1.0)
    buffer = io.BytesIO()
    one.picture.save(buffer, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    told = f"{one.truth}; written: {one.word}. Said {one.before}, then {one.after}."
    return (
        f'<figure><div class="stack"><img src="{picture}" alt=""><img class="heat" src="{heat}" alt=""></div>'
        f"<figcaption>{escape(told)}</figcaption></figure>"
    )


def paper_table() -> str:
    head = "".join(f"<th>{name}</th>" for name in ("RTA-100", "PAINT", "Materzyńska et al."))
    body = "".join(
        f"<tr><th>{escape(str(name))}</th>{''.join(f'<td>{value:.2f}</td>' for value in values)}</tr>"
        for name, *values in PAPER_TABLE
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
