"""A bias study of one classifier: which concepts go with its answers, and which of them move its answers.

    OUT/report.html        the page        OUT/bias.json       everything in it, and what it was made with
    OUT/associations.csv   every latent that fires, beside the answers; OUT/leanings.csv   the same given the true class
    OUT/curves.csv         the interventions

Half of the pictures fit the classifier, a linear layer on image embeddings; all numbers are of the other half. Or it is
fitted on others, `fit_on`: a classifier that learnt where background and class go together, asked where they do not.
"""

import base64
import csv
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.concepts.bias import (
    Association,
    Classifier,
    CurvePoint,
    Leaning,
    as_rows,
    associations,
    by_name,
    densities,
    dose_response,
    fit_classifier,
    intervention_curve,
    leanings,
    plateau,
    strengths_of,
)
from vitrail.concepts.detection import best_concepts
from vitrail.concepts.editing import Edit, edit_hook, edit_rows
from vitrail.concepts.pictures import Pictures, read_pictures
from vitrail.files import replacing, write_json
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.progress import SILENT, Progress
from vitrail.provenance import provenance

EMBEDDING = "hook_image_embed"
ALPHA = 0.05


def bias_study(
    backbone: Backbone,
    coder: SparseCoder,
    images: ImageSource,
    out: str | Path,
    *,
    point: str,
    tokens: str,
    target: str,
    fit_on: ImageSource | None = None,
    names: Mapping[int, str] | None = None,
    n_shown: int = 6,
    n_changed: int = 64,
    n_permutations: int = 2000,
    batch_size: int = 64,
    n_workers: int = 0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes the folder; returns bias.json.

    `target`: "label=NAME" for one of the classes ("label=A|B" for any of several), or a concept of the pictures' truth
    ("ground:water"). `names` of latents; without them, where the truth is known, each latent's best concept. `n_shown`
    latents, those of largest |r_given| (then of largest |r|) whose p_family is below 0.05, are set to values from 0 to
    three times their largest, on `n_changed` pictures.
    """
    given: dict[str, Any] = {"batch_size": batch_size, "n_workers": n_workers, "progress": progress}
    pictures = read_pictures(backbone, images, coder, point, tokens, **given)
    yes = truth_of(pictures, target)
    order, asked = np.random.default_rng(seed).permutation(pictures.n), np.arange(pictures.n)
    classes = (f"not {target}", target)
    if fit_on is None:
        fitted, asked = np.sort(order[: pictures.n // 2]), np.sort(order[pictures.n // 2 :])
        rows, said = pictures.embeddings[fitted], yes[fitted]
    else:
        others = read_pictures(backbone, fit_on, coder, point, tokens, **given)
        rows, said = others.embeddings, truth_of(others, target)
    classifier = fit_classifier(rows, torch.from_numpy(said).long(), classes)
    half = pictures.select(asked)
    answers = classifier.answers(half.embeddings)
    accuracy = float((answers.numpy() == yes[asked]).mean())
    permuted: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
    found = associations(half.codes, answers == 1, **permuted)
    odds = classifier.log_odds(half.embeddings, 1)
    leaning = leanings(half.codes, odds, _true_class(half, yes[asked]), **permuted)
    if names is None:
        names = _true_names(half, [one.latent for one in found])
    concepts, said = by_name(half.codes, names)
    together = [] if not said else leanings(concepts, odds, _true_class(half, yes[asked]), **permuted)
    expected = _to_change(leaning, found, n_shown)
    some = asked[:: max(1, len(asked) // n_changed)][:n_changed]
    changed = Changed(backbone, coder, images, pictures.positions[some], point, tokens, batch_size)
    curves: dict[int, list[CurvePoint]] = {}
    with progress.task("interventions", len(expected), "latents") as task:
        for latent in expected:
            values = strengths_of(half.codes, latent)
            curves[latent] = intervention_curve(
                classifier, changed.before, changed, latent, values, answer=1, seed=seed
            )
            task.advance(1)
    told = {
        "target": target,
        "backbone": backbone.name,
        "point": point,
        "tokens": tokens,
        "images": images.spec,
        "fit_on": None if fit_on is None else fit_on.spec,
        "n": {"fitted": len(rows), "asked": len(asked), "changed": len(some)},
        "accuracy": accuracy,
        "share_true": float(yes[asked].mean()),
        "share_said": float((answers == 1).double().mean()),
        "n_tested": len(found),
        "n_permutations": n_permutations,
        "associations": as_rows(found, names),
        "leanings": as_rows(leaning, names),
        "concepts": [
            {**row, "latents": [i for i, name in names.items() if name == row["name"]]}
            for row in as_rows(together, dict(enumerate(said)))
        ],
        "interventions": [_told(latent, r, curves[latent], names, seed) for latent, r in expected.items()],
        "densities": {str(latent): densities(half.codes, answers == 1, latent) for latent in expected},
        "provenance": provenance(),
    }
    out = Path(out)
    write_json(out / "bias.json", told)
    _write_csv(out / "associations.csv", told["associations"])
    _write_csv(out / "leanings.csv", told["leanings"])
    _write_csv(
        out / "curves.csv", [{"latent": c["latent"], **row} for c in told["interventions"] for row in c["curve"]]
    )
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page(told), encoding="utf-8")
    return told


def truth_of(pictures: Pictures, target: str) -> np.ndarray:
    """(n,) of bool. Raises ValueError for a target that these pictures do not know, or that all or none has."""
    known: list[str] = [] if pictures.truth is None else list(pictures.truth.concepts)
    known += [f"label={name}" for name in pictures.classes]
    if target in known:
        asked = [target]
    else:
        head, equals, rest = target.partition("=")
        asked = [f"label={one.strip()}" for one in rest.split("|")] if (head, equals) == ("label", "=") else [target]
    for one in asked:
        if one not in known:
            shown = ", ".join(known[:12]) or "nothing"
            raise ValueError(f"these pictures know nothing of {one!r}. They know {shown}{' ...' if known[12:] else ''}")
    if target.startswith("label="):
        chosen = [pictures.classes.index(one.removeprefix("label=")) for one in asked]
        yes = np.isin(pictures.labels, chosen)
    else:
        assert pictures.truth is not None
        yes = pictures.truth.images[:, pictures.truth.concepts.index(target)]
    if yes.all() or not yes.any():
        raise ValueError(f"{target!r} is true of {int(yes.sum())} of {len(yes)} pictures: a classifier needs both.")
    return np.asarray(yes, dtype=bool)


def _true_class(pictures: Pictures, yes: Bool[np.ndarray, " n"]) -> Int[Tensor, " n"]:
    """The finest that is known: the label, parted by the answer that is right. Without labels, that answer."""
    return torch.from_numpy(2 * (pictures.labels + 1) + yes)


def _to_change(leaning: Sequence[Leaning], found: Sequence[Association], n_shown: int) -> dict[int, float]:
    """Latent -> the correlation whose sign says which way the answer should go."""
    expected = {one.latent: one.r_given for one in [one for one in leaning if one.p_family <= ALPHA][:n_shown]}
    for one in [one for one in found if one.p_family <= ALPHA][:n_shown]:
        expected.setdefault(one.latent, one.point_biserial)
    return expected


class Changed:
    """The embeddings of some pictures with one latent set, the coder's error kept; `before` as they are."""

    def __init__(
        self,
        backbone: Backbone,
        coder: SparseCoder,
        images: ImageSource,
        positions: Sequence[int] | np.ndarray,
        point: str,
        tokens: str,
        batch_size: int = 64,
    ) -> None:
        self._backbone, self._coder, self._point = backbone, coder, point
        self._where = tokens if backbone.point(point).has_tokens else "all"
        batches = load_batches(images, [int(one) for one in positions], backbone.preprocess, batch_size=batch_size)
        self._pixels = [batch.images for batch in batches]
        self._rows = [self._embeddings(pixels) for pixels in self._pixels]
        self.before = torch.cat([normalize(rows.float(), dim=1).cpu() for rows in self._rows])

    @torch.inference_mode()
    def _embeddings(self, pixels: Tensor) -> Tensor:
        device = next(self._backbone.parameters()).device
        return self._backbone.activations(pixels.to(device), [EMBEDDING])[EMBEDDING]

    def __call__(self, latent: int, value: float) -> Float[Tensor, "n d_embed"]:
        edits = [Edit((latent,), "set", value)]
        if self._point == EMBEDDING:
            rows = [edit_rows(self._coder, one, edits) for one in self._rows]
        else:
            hook = edit_hook(self._backbone, self._point, self._coder, edits, where=self._where)
            with self._backbone.hooks({self._point: hook}):
                rows = [self._embeddings(pixels) for pixels in self._pixels]
        return torch.cat([normalize(one.float(), dim=1).cpu() for one in rows])


def _true_names(pictures: Pictures, latents: Sequence[int]) -> dict[int, str]:
    if pictures.truth is None:
        return {}
    best = best_concepts(pictures.codes, pictures.truth, latents)
    return {latent: name for latent, name in best.items() if name is not None}


def _told(latent: int, r: float, curve: Sequence[CurvePoint], names: Mapping[int, str], seed: int) -> dict[str, Any]:
    rows = [
        {
            "value": point.value,
            **{f"probability{end}": getattr(point.probability, key) for end, key in _ENDS},
            **{f"change{end}": getattr(point.change, key) for end, key in _ENDS},
        }
        for point in curve
    ]
    response = dose_response(curve, r, seed=seed)
    told = {
        "name": names.get(latent, ""),
        "latent": latent,
        "r": r,
        **{f"rise{end}": getattr(response.rise, key) for end, key in _ENDS},
        "rank": response.rank,
        "way": response.way,
        "plateau": plateau(curve),
    }
    return {**told, "curve": rows}


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        if rows:
            table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


# ------------------------------------------------------------------------------------------------------------- page

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}p.note{color:#666;font-size:13px}"""


def page(told: Mapping[str, Any]) -> str:
    """One HTML page that needs nothing else."""
    say, n = html.escape, told["n"]
    gone = (("latent", "fires", "AUC", "r", "d", "p", "p Holm", "p family"), "latent fires auc point_biserial effect")
    leant = (("latent", "fires", "r given class", "slope", "p", "p Holm", "p family"), "latent fires r_given slope")
    whole = (("latents", *leant[0][1:]), "n_latents fires r_given slope")
    concepts = [{**one, "n_latents": len(one["latents"])} for one in told["concepts"]]
    tables = {
        key: _table(told[key][:20], head, [*columns.split(), "p", "p_holm", "p_family"])
        for key, (head, columns) in {"associations": gone, "leanings": leant}.items()
    }
    named = ""
    if concepts:
        named = (
            '<h3>Concepts: all latents of one name together</h3><p class="note">Each activation over its largest, '
            "added up: a concept is often split over several latents.</p>"
            + _table(concepts[:12], whole[0], [*whole[1].split(), "p", "p_holm", "p_family"])
        )
    moved = "".join(
        f"<tr><td>{say(one['name'] or '–')}</td><td>{one['latent']}</td><td>{one['r']:+.2f}</td>"
        f"<td>{one['curve'][0]['probability']:.3f}</td><td>{one['curve'][-1]['probability']:.3f}</td>"
        f"<td>{one['rise']:+.3f} ({one['rise_low']:+.3f} to {one['rise_high']:+.3f})</td><td>{one['rank']:+.2f}</td>"
        f"<td>{_WAYS[one['way']]}</td>"
        f"<td>{'not reached' if one['plateau'] is None else format(one['plateau'], '.3g')}</td></tr>"
        for one in told["interventions"]
    )
    still = ""
    if told["interventions"] and all(one["way"] == "none" for one in told["interventions"]):
        still = (
            f"<p><b>None of them moves the answer.</b> What goes with it is read elsewhere: {say(told['tokens'])} "
            f"tokens of {say(told['point'])} may not reach the embedding any more (patches of the last block do not "
            "reach a class token). Take an earlier block, or a coder of the class token.</p>"
        )
    source = "" if told["fit_on"] is None else f"of {say(told['fit_on'])}"
    picture = _pictures(told)
    figure = f'<img alt="Densities and curves" src="data:image/png;base64,{picture}">' if picture else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What moves “{say(told["target"])}”</title>
<style>{STYLE}</style><h1>What goes with “{say(told["target"])}”, and what moves it</h1>
<p>A linear classifier on the image embeddings of {say(told["backbone"])}, fitted on {n["fitted"]} pictures
{source}. On {n["asked"]} others it is right in
{told["accuracy"]:.1%}; it says yes to {told["share_said"]:.1%}, and {told["share_true"]:.1%} are.
Latents of {say(told["point"])}; pictures {say(told["images"])}.</p>
<h2>What it leans on besides the class</h2><p class="note">Partial correlation of latent and log-odds among pictures
of the same true class (label, where there are labels); slope: change of log-odds for one standard deviation of the
latent. A fair classifier has little here. The strongest 20 of {len(told["leanings"])}.</p>
{named}<h3>Single latents</h3>{tables["leanings"]}
<h2>What goes with its answers</h2><p class="note">Of {told["n_tested"]} tested, the strongest 20: first of all what
the class is. {told["n_permutations"]:,} permutations: no p is below {1 / (told["n_permutations"] + 1):.2g}. p family:
for the largest of all latents. Association is not cause.</p>
{tables["associations"]}
<h2>Latents that were turned up</h2><p class="note">Set to values from 0 to three times the largest seen, in
{n["changed"]} pictures, all else kept. Bands, and what stands in brackets: 95 % over pictures. Rank: Spearman's rho of
value and P. “Right way”: likelier with a latent that goes with the answer, less likely with one that goes against
it.</p>
<table><tr><th>name</th><th>latent</th><th>r</th><th>P at 0</th><th>P at most</th><th>rise</th><th>rank</th>
<th>way</th><th>plateau from</th></tr>{moved}</table>{still}{figure}</html>
"""


_WAYS = {"right": "right", "wrong": "the wrong way", "none": "does not move"}


def _table(rows: Sequence[Mapping[str, Any]], head: Sequence[str], keys: Sequence[str]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(one['name'] or '–')}</td>" + "".join(f"<td>{_short(one[key])}</td>" for key in keys)
        for one in rows
    )
    return f"<table><tr><th>name</th>{''.join(f'<th>{html.escape(one)}</th>' for one in head)}</tr>{cells}</table>"


def _short(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _pictures(told: Mapping[str, Any]) -> str:
    """Base64 of a PNG: a row a latent, density and curve. Empty, with a warning, where matplotlib is missing."""
    if not told["interventions"]:
        return ""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn('the page has no curves, which need matplotlib: pip install "vitrail[figures]".', stacklevel=2)
        return ""
    shown = told["interventions"]
    figure = Figure(figsize=(8, 2.1 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 2, squeeze=False)
    for (left, right), one in zip(axes, shown, strict=True):
        rows = told["densities"][str(one["latent"])]
        middle = [(row["low"] + row["high"]) / 2 for row in rows]
        left.step(middle, [row["said"] for row in rows], where="mid", color="#1b3a70", label="it says yes")
        left.step(middle, [row["other"] for row in rows], where="mid", color="#d99a00", label="it says no")
        left.set_yscale("symlog", linthresh=0.01)
        left.set_title(f"{one['latent']} {one['name']}", fontsize=9)
        left.set_xlabel("activation", fontsize=8)
        left.set_ylabel("share of pictures", fontsize=8)
        curve = one["curve"]
        x = [row["value"] for row in curve]
        right.fill_between(
            x, [row["probability_low"] for row in curve], [row["probability_high"] for row in curve], alpha=0.2
        )
        right.plot(x, [row["probability"] for row in curve], marker="o", markersize=3, color="#1b3a70")
        right.set_ylim(-0.02, 1.02)
        right.set_xlabel("set to", fontsize=8)
        right.set_ylabel("P(yes)", fontsize=8)
        for axis in (left, right):
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=7, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return base64.b64encode(content.getvalue()).decode()


__all__ = ["Changed", "Classifier", "bias_study", "page", "truth_of"]
