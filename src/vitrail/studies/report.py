"""One self-contained HTML page: the table with its controls, the training curves, and latents one can look at.

Everything is inside the file: styles, pictures, curves; no script, no network. A patch heat map is laid over what the
model saw (the pre-processed crop); moving the pointer over a picture takes the map away. Latents are chosen by a rule
that the page states.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrail.backbones.preprocess import Preprocess
from vitrail.codes import CodeStore
from vitrail.concepts.table import Concept
from vitrail.files import replacing
from vitrail.images.base import BadImage, ImageSource
from vitrail.index import Index
from vitrail.metrics import COLUMNS, MEASURES
from vitrail.progress import SILENT, Progress
from vitrail.store.read import Store
from vitrail.studies.truth_concepts import is_recovered
from vitrail.tables import Columns

THUMB_PX = 112
SHADE = (8, 12, 24)  # over the patches where a latent is silent; where it fires they keep their own colours
DARKEST = 0.68
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Indexed:
    """One coder's codes and index, with the store they came from."""

    name: str
    store: Store
    codes: CodeStore
    index: Index
    concepts: Mapping[int, Mapping[str, Any]] | None = None  # latent -> what it stands for, where the truth is known
    names: Mapping[int, Concept] | None = None  # latent -> its best valid name, of `vitrail name`


def write_report(
    out: str | Path,
    *,
    title: str,
    rows: Sequence[dict[str, Any]],
    indexed: Sequence[Indexed],
    images: ImageSource | None,
    logs: Mapping[str, Path] | None = None,
    notes: Sequence[str] = (),
    n_latents: int = 12,
    n_images: int = 8,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Path:
    """Write the page to the file `out`. `rows`: what `vitrail eval` wrote. `images=None` leaves the pictures out."""
    sections = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(note)}</p>" for note in notes)]
    sections.append(metric_table(rows))
    if logs:
        sections.append(training_curves(logs))
    with progress.task("report", len(indexed) * n_latents, "latents") as task:
        for one in indexed:
            sections.append(latent_section(one, images, n_latents, n_images, seed, task))
    sections.append(provenance_section(rows))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>"
    )
    out = Path(out)
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def shown_measures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that at least one row has a number for, in the table's order."""
    return [name for name in COLUMNS if any(number(row, name) is not None for row in rows)]


def number(row: dict[str, Any], measure: str) -> float | None:
    return row["measured"].get(measure, {}).get("value")


def metric_table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    measures = shown_measures(rows)
    head = "".join(
        f'<th title="{escape(MEASURES[m].meaning)}">{escape(MEASURES[m].title)}{_arrow(MEASURES[m].better)}</th>'
        for m in measures
    )
    body = []
    for row in rows:
        control = row["control_of"] is not None
        name = row["name"].split(" / ")[-1] if control else row["name"]
        cells = "".join(_cell(row, measure) for measure in measures)
        body.append(f'<tr class="{"control" if control else "coder"}"><th scope="row">{escape(name)}</th>{cells}</tr>')
    first = rows[0]
    caption = (
        f"{first['backbone']}, {first['point']}, tokens: {first['tokens']}; {first['n_images']} evaluation images. "
        "Under each coder, its controls, which may spend as many latents a row as it did on training rows, rounded up. "
        "Small figures: 95 % bootstrap interval over images. Point at a column's name for its definition."
    )
    return (
        f'<section><h2>Measures, each beside its control</h2><p class="caption">{escape(caption)}</p><div class="wide">'
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _arrow(better: str) -> str:
    return {"higher": " ↑", "lower": " ↓"}.get(better, "")


def _cell(row: dict[str, Any], measure: str) -> str:
    measured = row["measured"].get(measure)
    if not measured or measured["value"] is None:
        return "<td>–</td>"
    digits = MEASURES[measure].digits
    interval = ""
    if measured["low"] is not None:
        interval = f"<small>{measured['low']:.{digits}f} to {measured['high']:.{digits}f}</small>"
    about = f"definition {measured['definition']}, n = {measured['n']}"
    return f'<td title="{escape(about)}">{measured["value"]:.{digits}f}{interval}</td>'


def training_curves(logs: Mapping[str, Path]) -> str:
    figures = []
    for name, path in logs.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        series = [(line["rows"], line["fvu"]) for line in lines if line.get("fvu") is not None]
        if len(series) > 1:
            last = lines[-1]
            text = f"{name}: FVU {series[-1][1]:.3f} after {int(series[-1][0]):,} rows, {last.get('dead', '–')} dead"
            figures.append(f"<figure>{curve(series)}<figcaption>{escape(text)}</figcaption></figure>")
    if not figures:
        return ""
    return (
        '<section><h2>Training</h2><p class="caption">FVU of the training batches (log scale) against rows seen.</p>'
        f'<div class="curves">{"".join(figures)}</div></section>'
    )


def curve(series: Sequence[tuple[float, float]], width: int = 260, height: int = 110) -> str:
    """An inline SVG line, y on a log scale from 0.01 to 1 or as far as the data reach."""
    x = np.array([point[0] for point in series], dtype=float)
    y = np.log10(np.clip([point[1] for point in series], 1e-4, None))
    low, high = min(-2.0, float(y.min())), max(0.0, float(y.max()))
    px = 34 + (x - x[0]) / max(x[-1] - x[0], 1e-9) * (width - 40)
    py = 6 + (high - y) / (high - low) * (height - 22)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
    grid = []
    for tick in range(int(np.ceil(low)), int(np.floor(high)) + 1):
        at = 6 + (high - tick) / (high - low) * (height - 22)
        label = f"{10.0**tick:g}"
        grid.append(
            f'<line x1="34" x2="{width - 6}" y1="{at:.1f}" y2="{at:.1f}"/><text x="30" y="{at + 3:.1f}">{label}</text>'
        )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(grid)}<polyline points="{path}"/></svg>'


def latent_section(
    one: Indexed, images: ImageSource | None, n_latents: int, n_images: int, seed: int, task: Any
) -> str:
    table = one.store.images()
    latents = one.index.latents
    chosen, rule = choose_latents(one, table, n_latents, seed)
    histograms, edges = one.index.histograms()
    cards = []
    for latent, why in chosen:
        cards.append(latent_card(one, images, table, latents, latent, why, histograms[latent], edges, n_images))
        task.advance(1)
    n_dead = int(latents["dead"].sum())
    caption = (
        f"{len(latents['latent'])} latents, {n_dead} never fired on the {one.codes.n_images} stored images. {rule} "
        "Lit patches are where the latent fires, on one scale per row of pictures; point at a picture to see "
        f"it bare.{concepts_told(one)}"
    )
    return (
        f"<section><h2>Latents of {escape(one.name)}</h2>"
        f'<p class="caption">{escape(caption)}</p>{"".join(cards)}</section>'
    )


def concepts_told(one: Indexed) -> str:
    told = ""
    if one.names is not None:
        told = (
            f" {len(one.names)} latents have a valid name, by how well it tells in which pictures that did not find it "
            "the latent fires."
        )
    if one.concepts is None:
        return told
    found = [row["concept"] for row in one.concepts.values() if is_recovered(row)]
    return told + (
        f" {len(found)} latents recover a concept of the world, {len(set(found))} different ones: F1 of at least 0.5 "
        "over pictures that did not choose it, and more than a latent that is always on would have."
    )


def choose_latents(one: Indexed, table: Columns, n: int, seed: int) -> tuple[list[tuple[int, str]], str]:
    """Half by rules that look for meaning, half at random: what is best, and what is usual."""
    latents = one.index.latents
    enough, of_which = np.flatnonzero(latents["n_images_active"] >= 16), "all that fire on at least 16 images"
    if len(enough) == 0:
        enough, of_which = np.flatnonzero(~latents["dead"]), "all that fire at all"
    named = best_named(one, enough, n // 4)
    seen_on_patches = np.setdiff1d(enough[on_patches(one, enough)], [latent for latent, _ in named])
    half = n // 2 - len(named)
    chosen, by = purest(one, table, seen_on_patches, half), "the purest top images, one per class"
    if len(chosen) < half:  # no labels, or too few pictures of a class: then by how far they rise above themselves
        chosen, by = strongest(one, seen_on_patches, half), "the largest rise above their own mean"
    rest = np.setdiff1d(enough, [latent for latent, _ in [*named, *chosen]])
    drawn = np.random.default_rng(seed).permutation(rest)[: n - len(chosen) - len(named)]
    rule = f"Shown: {len(drawn)} drawn at random among {of_which}."
    if chosen:
        rule = f"Shown: {len(chosen)} of those that fire most on patches, with {by}; and {rule.removeprefix('Shown: ')}"
    if named:
        rule = f"Shown: {len(named)} with the surest names, one a name; {rule.removeprefix('Shown: ')}"
    return [*named, *chosen, *((int(latent), "drawn at random") for latent in drawn)], rule


def best_named(one: Indexed, latents: NDArray[np.int64], n: int) -> list[tuple[int, str]]:
    """At most n latents, each of another valid name, with the largest held-out AUC."""
    valid = {latent: (one.names or {})[latent] for latent in latents.tolist() if latent in (one.names or {})}
    chosen: dict[str, tuple[int, str]] = {}
    for latent in sorted(valid, key=lambda latent: (-(valid[latent].detection_auc or 0), latent)):
        if len(chosen) < n:
            chosen.setdefault(valid[latent].name, (latent, "chosen: its name is among the surest"))
    return list(chosen.values())


def purest(one: Indexed, table: Columns, latents: NDArray[np.int64], n: int) -> list[tuple[int, str]]:
    """At most n latents, each of another class, that fills at least half of their top images."""
    if all(name is None for name in table["class_name"]):
        return []
    tops = {int(latent): top_classes(one, table, int(latent))[0] for latent in latents}
    density = one.index.latents["image_density"]
    chosen: dict[str, tuple[int, str]] = {}
    # Among equals, rather one that fires on few images than one that fires on all.
    for latent in sorted(tops, key=lambda latent: (-tops[latent][1], density[latent], latent)):
        name, share = tops[latent]
        if share >= 0.5 and len(chosen) < n:
            chosen.setdefault(name, (latent, f"chosen: {share:.0%} of its top images are one class"))
    return list(chosen.values())


def strongest(one: Indexed, latents: NDArray[np.int64], n: int) -> list[tuple[int, str]]:
    """The n latents whose last listed top image lies highest above their mean activation, of those that fire on at
    most half of the images: what fires often at the same strength says little."""
    rows = one.index.latents
    rise = {
        int(latent): float(one.index.top_images(int(latent))["value"][-1] / rows["mean"][latent])
        for latent in latents
        if rows["image_density"][latent] <= 0.5
    }
    order = sorted(rise, key=lambda latent: (-rise[latent], latent))[:n]
    return [(latent, f"chosen: {rise[latent]:.1f} times its mean on all its top images") for latent in order]


def on_patches(one: Indexed, latents: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which latents have at least half of their top images' strongest tokens on a patch, where a map can show them."""
    if one.codes.manifest.tokens != "all" or one.codes.token_position(0) > 0:
        return np.ones(len(latents), dtype=bool)
    n_special = one.store.manifest.grid.n_special
    return np.array([(one.index.top_images(int(i))["token"] >= n_special).mean() >= 0.5 for i in latents], dtype=bool)


def top_classes(one: Indexed, table: Columns, latent: int) -> list[tuple[str, float]]:
    """(class, share of the latent's top images), commonest first."""
    rows = one.index.top_images(latent)["image"]
    names, counts = np.unique([str(table["class_name"][row]) for row in rows], return_counts=True)
    order = np.lexsort((names, -counts))
    return [(str(names[i]), float(counts[i] / len(rows))) for i in order]


def latent_card(
    one: Indexed,
    images: ImageSource | None,
    table: Columns,
    latents: Columns,
    latent: int,
    why: str,
    histogram: NDArray[np.int64],
    edges: NDArray[np.float64],
    n_images: int,
) -> str:
    top = one.index.top_images(latent)
    rows, values, tokens = top["image"][:n_images], top["value"][:n_images], top["token"][:n_images]
    pictures = "".join(
        picture(one, images, table, latent, int(row), float(value), int(token), float(values[0]))
        for row, value, token in zip(rows, values, tokens, strict=True)
    )
    classes = ", ".join(f"{name} {share:.0%}" for name, share in top_classes(one, table, latent)[:3] if name != "None")
    facts = (
        f"fires on {latents['density'][latent]:.2%} of tokens, {latents['image_density'][latent]:.1%} of images; "
        f"mean {latents['mean'][latent]:.3g} when active, largest {latents['max'][latent]:.3g}"
    )
    found = "" if one.concepts is None else recovered_line(one.concepts.get(latent))
    found += "" if one.names is None else name_line(one.names.get(latent))
    return (
        f'<article><header><h3>latent {latent}</h3><span class="why">{escape(why)}</span>'
        f"{bars(histogram, edges)}</header>"
        f'{found}<p class="facts">{escape(facts)}{"<br>top images: " + escape(classes) if classes else ""}</p>'
        f'<div class="pictures">{pictures}</div></article>'
    )


def recovered_line(row: Mapping[str, Any] | None) -> str:
    """What the latent stands for, with F1 beside that of "always"; what it is nearest to where that is not much."""
    if row is None or row["concept"] is None:
        return '<p class="concept none">no concept of the world</p>'
    patch = f", patch IoU {row['patch']['iou']:.2f}" if "patch" in row else ""
    numbers = f"F1 {row['f1']:.2f} (always: {row['constant']:.2f}{patch})"
    about = escape(f"AUC {row['auc']:.2f}, precision {row['precision']:.2f}, recall {row['recall']:.2f}")
    kind, word = ("", "recovered") if is_recovered(row) else (" none", "nearest, not recovered")
    name = escape(row["concept"])
    return f'<p class="concept{kind}" title="{about}">{word}: <strong>{name}</strong> {escape(numbers)}</p>'


def name_line(row: Concept | None) -> str:
    """The latent's name with what speaks for it; the runner-up in the tooltip."""
    if row is None:
        return '<p class="concept none">no valid name</p>'
    held_out = ""
    if row.detection_auc is not None and row.detection_random is not None:
        held_out = f", held-out AUC {row.detection_auc:.2f} (random names: {row.detection_random:.2f})"
    about = escape(f"runner-up {row.runner_up} {row.runner_up_score:.2f}; score {row.score:.2f}")
    by = escape(f"by {row.method}{held_out}")
    return f'<p class="concept" title="{about}">named <strong>{escape(row.name)}</strong> {by}</p>'


def bars(histogram: NDArray[np.int64], edges: NDArray[np.float64]) -> str:
    """The activations' histogram (log10) as a small inline SVG over the bins that are not empty."""
    filled = np.flatnonzero(histogram)
    if len(filled) == 0:
        return ""
    first, last = filled[0], filled[-1] + 1
    counts = histogram[first:last] / histogram.max()
    parts = [
        f'<rect x="{i * 4}" y="{26 - 24 * count:.1f}" width="3" height="{24 * count:.1f}"/>'
        for i, count in enumerate(counts)
    ]
    told = f"activations from {10 ** edges[first]:.2g} to {10 ** edges[last]:.2g}, log scale"
    return f'<svg class="bars" viewBox="0 0 {4 * len(counts)} 26"><title>{told}</title>{"".join(parts)}</svg>'


def picture(
    one: Indexed,
    images: ImageSource | None,
    table: Columns,
    latent: int,
    row: int,
    value: float,
    token: int,
    scale: float,
) -> str:
    label = table["class_name"][row] or table["id"][row]
    special = one.store.manifest.grid.patch_of_token(one.codes.token_position(token)) is None
    at = " (CLS or register)" if special and one.codes.manifest.tokens == "all" else ""
    caption = f"<figcaption>{escape(str(label))}<br>{value:.2f}{at}</figcaption>"
    thumb = thumbnail(one.store, images, int(table["position"][row])) if images is not None else None
    if thumb is None:
        return f'<figure class="bare">{caption}</figure>'
    heat = ""
    if one.codes.manifest.tokens in ("all", "spatial"):
        heat = f'<img class="heat" alt="" src="{heat_map(one.codes.patch_map(row, latent).numpy(), scale)}">'
    alt = escape(str(table["caption"][row] or label))
    return f'<figure><div class="stack"><img alt="{alt}" title="{alt}" src="{thumb}">{heat}</div>{caption}</figure>'


def thumbnail(store: Store, images: ImageSource, position: int) -> str | None:
    """What the model saw of the picture, as a data URI; None if the picture is no longer there."""
    preprocess = Preprocess.from_json(store.manifest.request["preprocess"])
    try:
        crop = preprocess.crop(images.load(position))
    except (BadImage, OSError):
        return None
    width = round(THUMB_PX * crop.width / crop.height)
    resample = Image.Resampling.NEAREST if crop.height < THUMB_PX else Image.Resampling.LANCZOS
    return _data_uri(crop.resize((width, THUMB_PX), resample), "WEBP", quality=80)


def heat_map(patches: NDArray[np.float32], scale: float) -> str:
    """One pixel per patch; the page enlarges it without smoothing."""
    pixels = np.zeros((*patches.shape, 4), dtype=np.uint8)
    pixels[..., :3] = SHADE
    pixels[..., 3] = np.round(255 * shade(patches, scale)).astype(np.uint8)
    return _data_uri(Image.fromarray(pixels, "RGBA"), "PNG")


def shade(patches: NDArray[np.float32], scale: float) -> NDArray[Any]:
    """How dark each patch is laid over: DARKEST where nothing fires, 0 at activation `scale` and above."""
    return DARKEST * (1 - np.sqrt(np.clip(patches / max(scale, 1e-12), 0, 1)))


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def provenance_section(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    row = rows[0]
    shared = {
        k: row[k] for k in ("backbone", "backbone_digest", "images", "n_images", "head", "seed", "cost", "provenance")
    }
    definitions = {
        name: row["measured"][name]["definition"] for name in shown_measures(rows) if name in row["measured"]
    }
    text = json.dumps({**shared, "definitions": definitions}, indent=1, ensure_ascii=False)
    meanings = "".join(
        f"<dt>{escape(MEASURES[m].title)}</dt><dd>{escape(MEASURES[m].meaning)}</dd>" for m in shown_measures(rows)
    )
    return (
        f"<section><h2>How it was measured</h2><dl>{meanings}</dl>"
        f"<details><summary>Provenance</summary><pre>{escape(text)}</pre></details></section>"
    )
