"""Disentanglement: a classifier that leans on an attribute, and what ablating that attribute's latents does to it.

    train    class x attribute: means of every latent and neuron by group; from them F(tau) for 25 tau (selection.py)
    val      each F(tau) ablated: of each method the strict and the relaxed choice
    test     the chosen sets, beside 20 random sets of the same size and beside what is known to work

    strict     worst-group accuracy, then overall, is largest; neither below the model as it is
    relaxed    worst-group accuracy is largest; no group but the one that was the worst loses more than 4 points

    rule       pooled         E over all images with the attribute against all without: the paper's Eq. 9
               balanced       the same within each class, classes weighing the same
               standardised   balanced, in standard deviations within groups: one tau for latents and neurons alike
    side       with           what is larger with the attribute: the paper's; without: with the others; both: either

Rule and side "any": the best of all of them on validation images. Neurons (residual coordinates) are chosen by the same
rule. Random sets are drawn among coordinates that are not always
0, which is a harder control than drawing among all: most of a large dictionary hardly ever fires. Ceilings: the
attribute's direction projected out (the mean difference within classes; directions of a classifier, one after another,
Ravfogel et al. 2020, arXiv:2004.07667), and the last layer fitted again on balanced groups (Kirichenko et al. 2022,
arXiv:2204.02937). They read group labels of the training images, as the balanced rule does.

"Steering CLIP's vision transformer with sparse autoencoders", section 7.1, Tables 1 and 5-8; SPEC rows 117-124. There
the two maxima of the strict choice, and whether each group or their mean may lose 4 %, are not said. All thresholds are
chosen on validation images; where the paper takes the best coder of each layer it does so on test images.
"""

import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.concepts.bias import fit_classifier
from vitrail.files import replacing, write_json
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head, LinearHead
from vitrail.progress import SILENT, Progress
from vitrail.provenance import provenance
from vitrail.steering.ablation import Answers, FeatureSet, ablated_answers
from vitrail.steering.closed_form import IMAGE_EMBED
from vitrail.steering.disentangle_page import page
from vitrail.steering.groups import GroupAccuracy, GroupChange, GroupedImages, group_accuracy, group_change
from vitrail.steering.interventions import Directions
from vitrail.steering.selection import TAUS, Means, MeanSums, Site, add_site, balanced, neurons_at, select, standardised
from vitrail.tables import write_table

RULES, SIDES = ("pooled", "balanced", "standardised"), ("with", "without", "both")
CHOICES, ANY = ("strict", "relaxed"), "any"
FORMAT, VERSION = "vitrail-disentangle", 1


@dataclass(frozen=True, kw_only=True)
class DisentangleOptions:
    """`drop`: what a non-target group may lose under the relaxed choice, a share. `factors`: what chosen coordinates
    are multiplied by; 0 is zero ablation, the paper's. `directions`: how many are projected out, one number a ceiling.
    """

    rules: tuple[str, ...] = RULES
    sides: tuple[str, ...] = SIDES
    taus: tuple[float, ...] = TAUS
    factors: tuple[float, ...] = (0.0,)
    pool: str = "mean"
    drop: float = 0.04
    n_random: int = 20
    directions: tuple[int, ...] = (1, 4)
    batch_size: int = 64
    n_bootstrap: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        for what, asked, known in (("rules", self.rules, RULES), ("sides", self.sides, SIDES)):
            if not asked or any(one not in known for one in asked):
                raise ValueError(f"{what} are {', '.join(known)}, got {', '.join(asked) or 'none'}.")
        if not self.taus or not self.factors:
            raise ValueError("give at least one tau and one factor.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop is a share in 0..1, got {self.drop}.")


@dataclass(frozen=True)
class Method:
    """One way to choose sets: `kind` latents or neurons."""

    kind: str
    site: str
    rule: str
    side: str

    @property
    def name(self) -> str:
        return f"{self.kind} of {self.site}, {self.rule}, {self.side}"


@dataclass(frozen=True, eq=False)
class Candidate:
    method: Method
    tau: float
    which: Int[np.ndarray, " m"]
    factor: float = 0.0

    def of(self, method: Method) -> bool:
        own = self.method
        same = (own.kind, own.site) == (method.kind, method.site)
        return same and (method.rule == ANY or (own.rule, own.side) == (method.rule, method.side))

    def set_at(self, site: Site) -> FeatureSet:
        return FeatureSet(f"{self.method.name}, tau {self.tau!r}, times {self.factor!r}", site, self.which, self.factor)


@dataclass(frozen=True, eq=False)
class Tried:
    """A candidate and its accuracies on validation images."""

    candidate: Candidate
    accuracy: GroupAccuracy


def disentangle(
    backbone: Backbone,
    head: Head,
    train: GroupedImages,
    val: GroupedImages,
    test: GroupedImages,
    sites: Mapping[str, Site],
    out: str | Path,
    *,
    spurious: str,
    options: DisentangleOptions | None = None,
    said: Mapping[str, Any] | None = None,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Writes OUT/disentangle.json, rows.parquet, rows.csv and report.html; returns the JSON.

    `sites`: coders by name (selection.latents_at). `spurious`: the attribute A of the images. Logits of `head` are the
    classes of the images in order. `said` goes into the JSON. Raises ValueError where parts do not belong together.
    """
    options, out = options or DisentangleOptions(), Path(out)
    _check(head, train, val, test, sites, spurious)
    given: dict[str, Any] = {"batch_size": options.batch_size, "n_workers": n_workers, "progress": progress}
    places = all_sites(backbone, sites)
    seen = look(backbone, train, places, spurious, options.pool, **given)
    candidates = [one for method in methods_of(sites, options) for one in candidates_of(method, seen, options)]

    told = _answers(backbone, head, val, [one.set_at(places[_key(one.method)]) for one in candidates], given)
    was = _accuracy(val, told.positions, told.before)
    tried = [Tried(one, _accuracy(val, told.positions, said)) for one, said in zip(candidates, told.after, strict=True)]
    chosen = {
        (method, choice): pick([one for one in tried if one.candidate.of(method)], was, choice, options.drop)
        for method in [*methods_of(sites, options), *overall_methods(sites, options)]
        for choice in CHOICES
    }
    trial = _test_sets(chosen, places, seen, train, options)
    final = _answers(backbone, head, test, [one for one in trial.sets.values() if one is not None], given)
    refit = balanced_head(seen.embeddings, train, seen.positions, options.seed)
    rows = [*_test_rows(test, final, trial, options), _refit_row(test, final, refit, options)]
    result = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": backbone.name,
        "spurious": spurious,
        "classes": list(test.classes),
        "attributes": list(test.attributes),
        "groups": list(test.groups),
        "images": {"train": train.images.spec, "val": val.images.spec, "test": test.images.spec},
        "counts": {"train": train.counts(), "val": val.counts(), "test": test.counts()},
        "head": head.kind,
        "sites": {name: {"point": one.point, "tokens": one.where, "n": one.basis.n} for name, one in sites.items()},
        "options": asdict(options),
        "before": {"val": was.to_json(), "test": _accuracy(test, final.positions, final.before).to_json()},
        "val": [_val_row(one) for one in tried],
        "test": rows,
        "random": _random_summaries(rows),
        "against": _against(test, final, trial, rows, sites, options),
        "provenance": provenance(),
        **(said or {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "disentangle.json", result)
    write_rows(out, result)
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page(result), encoding="utf-8")
    return result


# ------------------------------------------------------------------------------------------------------------ train


@dataclass(frozen=True, eq=False)
class Seen:
    """The training images once: means by kind and site, each image's mean row at each site's tokens, embeddings."""

    means: dict[str, Means]
    rows: dict[str, Float[Tensor, "n d"]]
    embeddings: Float[Tensor, "n d_embed"]
    positions: Int[np.ndarray, " n"]
    with_attribute: Bool[np.ndarray, " n_all"]
    classes: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str]]:
        """Groups of each class, with the attribute and without. Classes that lack one are left out, with a warning."""
        some = next(iter(self.means.values()))
        n = dict(zip(some.groups, some.n_images.tolist(), strict=True))
        both = [(f"{one}, with", f"{one}, without") for one in self.classes]
        kept = [pair for pair in both if n[pair[0]] and n[pair[1]]]
        if not kept:
            raise ValueError("no class has training images with and without the attribute: nothing can be balanced.")
        if len(kept) < len(both):
            warnings.warn("classes without images of both kinds are left out of the balanced rule.", stacklevel=3)
        return kept


def all_sites(backbone: Backbone, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The coders' sites, and neurons at the same points and tokens: "latents NAME", "neurons POINT, TOKENS"."""
    found = {f"latents {name}": site for name, site in sites.items()}
    for site in sites.values():
        found.setdefault(f"neurons {_point_of(site)}", neurons_at(backbone, site.point, site.where))
    return found


@torch.inference_mode()
def look(
    backbone: Backbone,
    train: GroupedImages,
    places: Mapping[str, Site],
    spurious: str,
    pool: str,
    *,
    batch_size: int,
    n_workers: int,
    progress: Progress,
) -> Seen:
    """One pass. Raises ValueError where no image could be read."""
    has = train.attribute == train.attributes.index(spurious)
    groups = {"with": has, "without": ~has}
    for i, name in enumerate(train.classes):
        groups |= {f"{name}, with": has & (train.labels == i), f"{name}, without": ~has & (train.labels == i)}
    members = torch.from_numpy(np.stack(list(groups.values()), 1))
    sums = {name: MeanSums(site.basis.n, list(groups), pool) for name, site in places.items()}
    points = list(dict.fromkeys([*(site.point for site in places.values()), IMAGE_EMBED]))
    rows: dict[str, list[Tensor]] = {_point_of(site): [] for site in places.values()}
    at: list[int] = []
    embeddings, device = [], next(backbone.parameters()).device
    wanted = range(len(train))
    batches = load_batches(train.images, wanted, backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("training images", len(wanted), "images") as task:
        for batch in batches:
            task.advance(len(batch.positions) + len(batch.skipped))
            if not batch.positions:
                continue
            at += batch.positions
            values = backbone.activations(batch.images.to(device), points)
            embeddings.append(values[IMAGE_EMBED].float().cpu())
            kept: dict[str, Tensor] = {}
            for name, site in places.items():
                x = site.rows(backbone, values[site.point])
                add_site(sums[name], site, x, members[batch.positions])
                kept[_point_of(site)] = x.float().mean(1).cpu()
            for name, x in kept.items():
                rows[name].append(x)
    if not at:
        raise ValueError(f"none of the {len(train)} training images could be read.")
    means = {name: one.means() for name, one in sums.items()}
    together = {name: torch.cat(parts).clone() for name, parts in rows.items()}
    return Seen(means, together, torch.cat(embeddings).clone(), np.asarray(at), has, train.classes)


def methods_of(sites: Mapping[str, Site], options: DisentangleOptions) -> list[Method]:
    """A set for each rule and side."""
    return [
        Method(kind, name, rule, side)
        for kind, name in _kinds(sites)
        for rule in options.rules
        for side in options.sides
    ]


def overall_methods(sites: Mapping[str, Site], options: DisentangleOptions) -> list[Method]:
    """The best of all rules and sides on validation images: where there are several."""
    if len(options.rules) * len(options.sides) == 1:
        return []
    return [Method(kind, name, ANY, ANY) for kind, name in _kinds(sites)]


def _kinds(sites: Mapping[str, Site]) -> list[tuple[str, str]]:
    points = dict.fromkeys(_point_of(site) for site in sites.values())
    return [("latents", name) for name in sites] + [("neurons", name) for name in points]


def candidates_of(method: Method, seen: Seen, options: DisentangleOptions) -> list[Candidate]:
    """A set for each tau and factor, empty ones left out."""
    means = seen.means[_key(method)]
    if method.rule == "pooled":
        inside, outside = means.of("with"), means.of("without")
    else:
        within = {"balanced": balanced, "standardised": standardised}[method.rule]
        inside, outside = within(means, seen.pairs())
    found = []
    for tau in options.taus:
        more, less = select(inside, outside, tau), select(outside, inside, tau)
        which = {"with": more, "without": less, "both": np.union1d(more, less)}[method.side]
        if len(which):
            found += [Candidate(method, float(tau), which, factor) for factor in options.factors]
    return found


# -------------------------------------------------------------------------------------------------------------- val


def pick(tried: Sequence[Tried], was: GroupAccuracy, choice: str, drop: float = 0.04) -> Tried | None:
    """The strict or the relaxed choice; None where nothing beats the model as it is. Of equals the smallest set."""
    target = was.worst
    allowed = []
    for one in tried:
        now = one.accuracy
        if choice == "strict":
            fits = now.worst_share.value >= was.worst_share.value and now.overall.value >= was.overall.value
        else:
            others = (name for name in was.groups if name != target)
            fits = all(was.groups[name].value - now.groups[name].value <= drop + 1e-12 for name in others)
        if fits and _rank(now) > _rank(was):
            allowed.append(one)
    return max(allowed, key=lambda one: (*_rank(one.accuracy), -len(one.candidate.which)), default=None)


def _rank(accuracy: GroupAccuracy) -> tuple[float, float]:
    return accuracy.worst_share.value, accuracy.overall.value


# ------------------------------------------------------------------------------------------------------------- test


@dataclass(frozen=True, eq=False)
class Trial:
    """What is asked on test images: sets by key, None for the model as it is; `about`: each set's columns."""

    sets: dict[str, FeatureSet | None] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, one: FeatureSet | None, **about: Any) -> None:
        name = f"{len(self.sets)}"
        self.sets[name] = None if one is None else replace(one, name=name)
        self.about[name] = about


def _test_sets(
    chosen: Mapping[tuple[Method, str], Tried | None],
    places: Mapping[str, Site],
    seen: Seen,
    train: GroupedImages,
    options: DisentangleOptions,
) -> Trial:
    trial = Trial()
    for (method, choice), found in chosen.items():
        about: dict[str, Any] = {**asdict(method), "choice": choice, "control": "", "draw": None}
        if found is None:
            trial.add(None, **about, tau=None, factor=None, n_set=0)
            continue
        one, site = found.candidate, places[_key(method)]
        about |= {"tau": one.tau, "factor": one.factor, "n_set": len(one.which)}
        trial.add(one.set_at(site), **about)
        alive = seen.means[_key(method)].alive()
        for draw in range(options.n_random):  # of one size the same for every choice: asked once
            rng = np.random.default_rng((options.seed, len(one.which), draw))
            which = np.sort(rng.choice(alive, min(len(one.which), len(alive)), replace=False))
            trial.add(FeatureSet("", site, which, one.factor), **(about | {"control": "random", "draw": draw}))
    for point, rows in seen.rows.items():
        site = next(one for one in places.values() if _point_of(one) == point)
        for name, directions in removals(rows, train, seen, options).items():
            basis = Directions(directions.to(next(iter(places.values())).basis.device), kind="directions")
            towards = (rows @ basis.rows.cpu().T).mean(0).to(basis.device)
            about = {"kind": "projection", "site": point, "rule": name, "side": "", "choice": "", "control": "ceiling"}
            everything = np.arange(basis.n)
            one = FeatureSet("", Site(site.point, basis, site.where), everything, 0.0, towards)
            trial.add(one, **about, draw=None, tau=None, factor=None, n_set=basis.n)
    return trial


def removals(
    rows: Float[Tensor, "n d"], train: GroupedImages, seen: Seen, options: DisentangleOptions
) -> dict[str, Float[Tensor, "k d"]]:
    """Orthonormal directions of the attribute, from each image's mean row: of the mean difference within classes, and
    of logistic regressions on as many images of each group, each fitted with those before it projected out."""
    labels, has = train.labels[seen.positions], seen.with_attribute[seen.positions]
    gaps = []
    for i in range(len(train.classes)):
        inside, outside = has & (labels == i), ~has & (labels == i)
        if inside.any() and outside.any():
            gaps.append(rows[inside].mean(0) - rows[outside].mean(0))
    if not gaps:
        return {}
    gap = torch.stack(gaps).mean(0)
    found = {"mean difference": (gap / gap.norm())[None]}
    at = _balanced_rows(2 * labels + has, options.seed)
    x, y, taken = rows[at].clone(), torch.from_numpy(has[at]).long(), []
    x = x - x.mean(0)
    for _ in range(min(max(options.directions, default=0), rows.shape[1] - 1)):
        fitted = fit_classifier(x, y, ("without", "with"), c=0.1).logistic
        w = (fitted.weight[1] - fitted.weight[0]).float()
        for one in taken:
            w = w - (w @ one) * one
        taken.append(w / w.norm())
        x = x - (x @ taken[-1])[:, None] * taken[-1]
    for k in options.directions:
        found[f"{k} classifier direction{'s' if k > 1 else ''}"] = torch.stack(taken[:k])
    return found


def balanced_head(
    embeddings: Float[Tensor, "n d_embed"], train: GroupedImages, positions: Int[np.ndarray, " n"], seed: int
) -> LinearHead:
    """The last layer, fitted on as many images of each group (rare ones repeated)."""
    at = _balanced_rows(train.group[positions], seed)
    labels = torch.from_numpy(train.labels[positions][at])
    return linear_head(embeddings[at], labels, train.classes)


@torch.inference_mode()
def embeddings_of(
    backbone: Backbone, images: ImageSource, *, batch_size: int = 64, n_workers: int = 0, progress: Progress = SILENT
) -> tuple[Float[Tensor, "n d_embed"], Int[np.ndarray, " n"]]:
    """What is handed to a head, and which images could be read. Raises ValueError where none could."""
    found, at, device = [], [], next(backbone.parameters()).device
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("embeddings", len(images), "images") as task:
        for batch in batches:
            task.advance(len(batch.positions) + len(batch.skipped))
            if batch.positions:
                at += batch.positions
                found.append(backbone.activations(batch.images.to(device), [IMAGE_EMBED])[IMAGE_EMBED].float().cpu())
    if not at:
        raise ValueError(f"none of the images of {images.spec} could be read.")
    return torch.cat(found).clone(), np.asarray(at)


def linear_head(
    embeddings: Float[Tensor, "n d_embed"], labels: Int[Tensor, " n"], classes: Sequence[str], *, c: float = 1.0
) -> LinearHead:
    """concepts.bias.fit_classifier as a head."""
    fitted = fit_classifier(embeddings, labels, classes, c=c)
    weight = fitted.logistic.weight / fitted.scale
    return LinearHead(weight.float(), (fitted.logistic.bias - weight @ fitted.mean).float())


def _balanced_rows(group: Int[np.ndarray, " n"], seed: int) -> Int[np.ndarray, " m"]:
    """As many rows of each group that is there, drawn with replacement: the mean number of images a group."""
    rng, present = np.random.default_rng(seed), np.unique(group)
    each = max(1, len(group) // len(present))
    return np.concatenate([rng.choice(np.flatnonzero(group == one), each) for one in present])


# ------------------------------------------------------------------------------------------------------------ tables


def _answers(
    backbone: Backbone, head: Head, images: GroupedImages, sets: Sequence[FeatureSet], given: Mapping[str, Any]
) -> Answers:
    return ablated_answers(backbone, images.images, head, sets, **given)


def _right(images: GroupedImages, positions: np.ndarray, answers: np.ndarray) -> Bool[np.ndarray, " n"]:
    return answers == images.labels[positions]


def _accuracy(images: GroupedImages, positions: np.ndarray, answers: np.ndarray) -> GroupAccuracy:
    return group_accuracy(_right(images, positions, answers), images.group[positions], images.groups)


def _numbers(accuracy: GroupAccuracy) -> dict[str, Any]:
    row: dict[str, Any] = {"n": accuracy.overall.n, "worst_group": accuracy.worst}
    for name, share in (("overall", accuracy.overall), ("worst", accuracy.worst_share)):
        low, high = share.interval
        row |= {name: share.value, f"{name}_low": low, f"{name}_high": high}
    row["groups"] = {name: {"accuracy": share.value, "n": share.n} for name, share in accuracy.groups.items()}
    return row


def _changes(change: GroupChange) -> dict[str, Any]:
    return {
        "change_overall": change.overall.value,
        "p_overall": change.overall.p,
        "change_worst": change.worst,
        "change_worst_low": change.worst_low,
        "change_worst_high": change.worst_high,
        "p_in_worst": change.in_worst.p,
        "gained_in_worst": change.in_worst.gained,
        "lost_in_worst": change.in_worst.lost,
    }


def _val_row(one: Tried) -> dict[str, Any]:
    candidate = one.candidate
    about = {"tau": candidate.tau, "factor": candidate.factor, "n_set": len(candidate.which)}
    return {**asdict(candidate.method), **about, **_numbers(one.accuracy)}


def _test_rows(test: GroupedImages, final: Answers, trial: Trial, options: DisentangleOptions) -> list[dict[str, Any]]:
    group = test.group[final.positions]
    before = _right(test, final.positions, final.before)
    rows = []
    for name, one in trial.sets.items():
        after = before if one is None else _right(test, final.positions, final.of(name))
        change = group_change(before, after, group, test.groups, n_bootstrap=options.n_bootstrap, seed=options.seed)
        accuracy = group_accuracy(after, group, test.groups)
        rows.append({**trial.about[name], **_numbers(accuracy), **_changes(change)})
    return rows


def _refit_row(test: GroupedImages, final: Answers, head: LinearHead, options: DisentangleOptions) -> dict[str, Any]:
    group, positions = test.group[final.positions], final.positions
    after = _right(test, positions, head(final.embeddings).argmax(1).numpy())
    before = _right(test, positions, final.before)
    change = group_change(before, after, group, test.groups, n_bootstrap=options.n_bootstrap, seed=options.seed)
    about = {"kind": "head", "site": IMAGE_EMBED, "rule": "last layer fitted again on balanced groups", "side": ""}
    about |= {"choice": "", "control": "ceiling", "draw": None, "tau": None, "factor": None, "n_set": 0}
    return {**about, **_numbers(group_accuracy(after, group, test.groups)), **_changes(change)}


def _random_summaries(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the draws beside each chosen set, and how many of them reach its worst group."""
    found = []
    for row in rows:
        if row["control"] or not row["n_set"]:
            continue
        keys = ("kind", "site", "rule", "side", "choice")
        draws = [one for one in rows if one["control"] == "random" and all(one[k] == row[k] for k in keys)]
        if not draws:
            continue
        told: dict[str, Any] = {k: row[k] for k in keys} | {"n_draws": len(draws)}
        for name in ("overall", "worst"):
            values = np.array([one[name] for one in draws])
            told |= {name: values.mean(), f"{name}_sd": values.std(ddof=1) if len(values) > 1 else 0.0}
        as_good = sum(one["worst"] >= row["worst"] for one in draws)
        found.append(told | {"as_good": as_good, "p_worst": (1 + as_good) / (1 + len(draws))})
    return found


def _against(
    test: GroupedImages,
    final: Answers,
    trial: Trial,
    rows: Sequence[Mapping[str, Any]],
    sites: Mapping[str, Site],
    options: DisentangleOptions,
) -> list[dict[str, Any]]:
    """Chosen latents less neurons chosen by the same rule, side and choice at the same point, image by image."""
    group, found = test.group[final.positions], []
    keys = ("rule", "side", "choice")
    chosen = {
        (one["kind"], one["site"], *(one[k] for k in keys)): name
        for name, one in trial.about.items()
        if not one["control"]
    }
    answered = dict(zip(trial.sets, rows, strict=False))  # the rows of sets come first

    def right(name: str) -> Bool[np.ndarray, " n"]:
        return _right(test, final.positions, final.before if trial.sets[name] is None else final.of(name))

    for (kind, site, *about), name in chosen.items():
        if kind == "latents":
            other = chosen["neurons", _point_of(sites[site]), *about]
            change = group_change(
                right(other), right(name), group, test.groups, n_bootstrap=options.n_bootstrap, seed=options.seed
            )
            told = {"site": site, **dict(zip(keys, about, strict=True)), "neurons": answered[other]["worst"]}
            found.append({**told, "latents": answered[name]["worst"], **_changes(change)})
    return found


def write_rows(out: Path, result: Mapping[str, Any]) -> None:
    """rows.parquet and rows.csv: every set of validation and of test, a row each, groups as columns."""
    groups = result["groups"]
    plain = {"part": "VARCHAR", **dict.fromkeys(("kind", "site", "rule", "side", "choice", "control"), "VARCHAR")}
    plain |= {
        "draw": "INTEGER",
        "tau": "DOUBLE",
        "factor": "DOUBLE",
        "n_set": "INTEGER",
        "n": "INTEGER",
        "worst_group": "VARCHAR",
    }
    ends = ("", "_low", "_high")
    plain |= dict.fromkeys([f"{name}{end}" for name in ("overall", "worst") for end in ends], "DOUBLE")
    changes = ("change_overall", "p_overall", "change_worst", "change_worst_low", "change_worst_high", "p_in_worst")
    plain |= dict.fromkeys(changes, "DOUBLE")
    types = plain | {f"{what} of {name}": "DOUBLE" for name in groups for what in ("accuracy", "n")}
    rows = []
    for part in ("val", "test"):
        for row in result[part]:
            told = {name: row.get(name, "" if plain[name] == "VARCHAR" else None) for name in plain} | {"part": part}
            for name in groups:
                one = row["groups"].get(name, {})
                told |= {f"accuracy of {name}": one.get("accuracy"), f"n of {name}": one.get("n", 0)}
            rows.append(told)
    write_table(out / "rows.parquet", {name: [row[name] for row in rows] for name in types}, types)
    with replacing(out / "rows.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(types), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_disentangle(folder: str | Path) -> dict[str, Any]:
    """disentangle.json of a folder. Raises FileNotFoundError or ValueError for what is not one."""
    path = Path(folder) / "disentangle.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `vitrail disentangle` has not finished there.")
    told = json.loads(path.read_text(encoding="utf-8"))
    if told.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of `vitrail disentangle`.")
    return told


# ------------------------------------------------------------------------------------------------------------ checks


def _check(
    head: Head,
    train: GroupedImages,
    val: GroupedImages,
    test: GroupedImages,
    sites: Mapping[str, Site],
    spurious: str,
) -> None:
    if not sites:
        raise ValueError("give at least one coder.")
    for name, other in (("val", val), ("test", test)):
        if (other.classes, other.attributes) != (train.classes, train.attributes):
            raise ValueError(
                f"train has the groups {', '.join(train.groups)}, {name} has {', '.join(other.groups)}: they differ."
            )
    if spurious not in train.attributes:
        raise ValueError(f"these images have no attribute {spurious!r}. They have {', '.join(train.attributes)}.")
    if head.n_classes != len(train.classes):
        raise ValueError(f"the head tells {head.n_classes} classes, the images have {len(train.classes)}.")
    shared = train.images.spec == test.images.spec or val.images.spec == test.images.spec
    if shared:
        warnings.warn(
            "test images are those of training or validation: the numbers are no held-out ones.", stacklevel=3
        )


def _point_of(site: Site) -> str:
    return f"{site.point}, {site.where}"


def _key(method: Method) -> str:
    return f"{method.kind} {method.site}"
