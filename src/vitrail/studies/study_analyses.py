"""What a study's rows say, as tables: nothing here draws or writes.

    rows = StudyRows.of(rows, plan)       whatever is missing from a row is filled in or left out
    rows.family                           the family of coders that most main cells have: means are taken over it

Means over a backbone's configurations are means of means over seeds, and only over configurations that every backbone
with the number has: else a backbone would stand high for its widths. ViSAEBench 4.5 to 5.8; SPEC rows 81 to 90.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vitrail.metrics import MEASURES, Measure
from vitrail.studies.hypotheses import (
    Hypothesis,
    codes_lift,
    family_ranks,
    judge,
    layer_ablation,
    metric_task_matrix,
    rank_intervals,
    resolve,
    within_and_between,
)
from vitrail.studies.variance import Decomposition, decompose_rows, noise_over_seeds, with_noise

Row = Mapping[str, Any]
Table = list[dict[str, Any]]
NUMBERED = {
    "moran": "M1", "fvu": "M2", "preservation": "M3", "ovr_auc_128": "M4", "monosemanticity_normalized": "M5",
    "cross_domain_preservation": "M6", "absorption": "M7",
}  # fmt: skip
LOWER = ("fvu", "absorption", "dead", "cross_domain_fvu")
TASK = re.compile(r"(retrieval_r@\d+|linear_accuracy|segmentation_miou)_(raw|recon|codes|lift)(?:@(.+))?")
WORDS = {"linear_accuracy": "linear probe", "segmentation_miou": "segmentation mIoU"}
ELSEWHERE = {
    "cross_domain_preservation": "preserved", "cross_domain_raw_accuracy": "probe of raw",
    "cross_domain_recon_accuracy": "probe of recon", "cross_domain_codes_accuracy": "probe of codes",
    "cross_domain_codes_accuracy_128": "probe of 128 latents", "cross_domain_fvu": "FVU",
}  # fmt: skip
NEAR_TARGET = 2.0  # SPEC row 89
N_BOOTSTRAP = 200


@dataclass(frozen=True, eq=False)
class StudyRows:
    """`every` row as the contract of studies has it: role, model, layer, expansion, k, measured, curves, cost."""

    every: tuple[dict[str, Any], ...]
    plan: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Sequence[Row], plan: Mapping[str, Any]) -> "StudyRows":
        """Raises ValueError for no rows."""
        if not rows:
            raise ValueError("a study without rows has nothing to report.")
        return cls(tuple(_complete(row) for row in rows), plan)

    @cached_property
    def all_main(self) -> list[dict[str, Any]]:
        return [row for row in self.every if row["role"] == "main"] or list(self.every)

    @cached_property
    def families(self) -> list[str]:
        """Of main cells, the one with most of them first."""
        counts: dict[str, int] = {}
        for row in self.all_main:
            counts[row["architecture"]] = counts.get(row["architecture"], 0) + 1
        return sorted(counts, key=lambda name: -counts[name])

    @property
    def family(self) -> str:
        return self.families[0]

    @cached_property
    def main(self) -> list[dict[str, Any]]:
        """Main rows of the family."""
        return [row for row in self.all_main if row["architecture"] == self.family]

    @cached_property
    def backbones(self) -> list[str]:
        return list(dict.fromkeys(row["backbone"] for row in self.all_main))

    @cached_property
    def untrained(self) -> list[str]:
        """Backbones of random weights, as far as the plan or their names say so."""
        told = {str(one.get("label") or one.get("name")): one for one in self.plan.get("backbones") or ()}
        models = {row["backbone"]: row["model"] for row in self.all_main}
        return [
            name
            for name in self.backbones
            if told.get(name, {}).get("random") is not None
            or any("random" in str(said).lower() for said in (name, models[name], told.get(name, {}).get("weights")))
        ]

    @cached_property
    def names(self) -> list[str]:
        """Of everything that a main row has a number for."""
        found = dict.fromkeys(name for row in self.all_main for name in row["measured"])
        return [name for name in found if any(number(row, name) is not None for row in self.all_main)]

    @cached_property
    def headline(self) -> list[str]:
        """M1 to M7, as far as they were measured; M4 at 128, or at the most latents that there are."""
        aucs = [name for name in self.names if re.fullmatch(r"ovr_auc_\d+", name)]
        auc = "ovr_auc_128" if "ovr_auc_128" in aucs else max(aucs, key=lambda n: int(n.split("_")[-1]), default="")
        asked = ["moran", "fvu", "preservation", auc, "monosemanticity_normalized", "monosemanticity_common_normalized"]
        asked += [name for name in self.names if name.startswith("cross_domain_preservation@")]
        return [name for name in (*asked, "absorption") if name in self.names]

    @cached_property
    def tasks(self) -> list[str]:
        """What features are good for: R@1, linear probes and segmentation of raw features, and other domains."""
        found = [name for name in self.names if (of := TASK.fullmatch(name)) and of[2] == "raw"]
        found = [name for name in found if not name.startswith("retrieval") or name == "retrieval_r@1_raw"]
        probed = {of[3] for name in found if (of := TASK.fullmatch(name)) and of[1] == "linear_accuracy"}
        for name in self.names:
            kind, _, where = name.partition("@")
            if kind == "cross_domain_codes_accuracy_128" or (
                kind == "cross_domain_raw_accuracy" and where not in probed
            ):
                found.append(name)
        return found

    def by_backbone(self, name: str, rows: Sequence[Row] | None = None) -> dict[str, float]:
        """Means over common configurations; over all of them where backbones have none in common."""
        cells, _ = common(of_settings(self.main if rows is None else rows, name))
        out: dict[str, list[float]] = {}
        for (backbone, _), values in cells.items():
            out.setdefault(backbone, []).append(float(np.mean(list(values.values()))))
        return {backbone: float(np.mean(values)) for backbone, values in out.items()}

    def means(self, names: Iterable[str], rows: Sequence[Row] | None = None) -> dict[str, dict[str, float]]:
        found = {name: self.by_backbone(name, rows) for name in names}
        return {name: values for name, values in found.items() if values}


Settings = dict[tuple[str, str], dict[Any, float]]


def of_settings(rows: Sequence[Row], name: str) -> Settings:
    """(backbone, coder) -> seed -> value."""
    out: Settings = {}
    for row in rows:
        value = number(row, name)
        if value is not None:
            out.setdefault((row["backbone"], row["coder"]), {})[row["seed"]] = value
    return out


def common(settings: Settings) -> tuple[Settings, bool]:
    """Of the coders that every backbone has, and whether any had to be left out. All, where none is common."""
    of: dict[str, set[str]] = {}
    for backbone, coder in settings:
        of.setdefault(backbone, set()).add(coder)
    shared = set.intersection(*of.values()) if of else set()
    if not shared:
        return settings, False
    kept = {key: values for key, values in settings.items() if key[1] in shared}
    return kept, len(kept) < len(settings)


def number(row: Row, name: str) -> float | None:
    value = (row["measured"].get(name) or {}).get("value")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def about(name: str) -> Measure:
    """Title, better side and digits of a measured name, also of one that names an image set behind "@"."""
    task = TASK.fullmatch(name)
    if task:
        kind = WORDS.get(task[1], task[1].replace("retrieval_r", "retrieval R"))
        where = f" @{task[3]}" if task[3] else ""
        words = {"raw": "raw features", "recon": "reconstructions", "codes": "codes", "lift": "codes over raw"}
        return Measure(f"{kind}, {task[2]}{where}", "", "higher", 3, f"{kind} of {words[task[2]]}")
    stem, at, where = name.partition("@")
    known = MEASURES.get(name) or MEASURES.get(stem)
    if known is None and (auc := re.fullmatch(r"ovr_auc_(\d+)", stem)):
        known = Measure(f"M4 AUC k={auc[1]}", "", "higher", 3, f"the same as AUC k=128 with the {auc[1]} best latents")
    if known is None:
        better = "lower" if stem.startswith(LOWER) else "higher"
        known = Measure(ELSEWHERE.get(stem, stem.replace("_", " ")), "", better, 3, stem.replace("_", " "))
    title = known.title.removesuffix(" (M7)")
    if stem in NUMBERED and NUMBERED[stem] not in title:
        title = f"{NUMBERED[stem]} {title}"
    return Measure(f"{title} @{where}" if at else title, known.unit, known.better, known.digits, known.meaning)


# ------------------------------------------------------------------------------------------------------------ tables


def setting_rows(study: StudyRows) -> Table:
    """A row a setting (backbone, coder), controls behind their coder: means, spreads and how many seeds."""
    names = list(dict.fromkeys(name for row in study.every for name in row["measured"]))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in study.every:
        groups.setdefault((row["backbone"], row["coder"]), []).append(row)
    order = list(groups)

    def place(key: tuple[str, str]) -> tuple[int, int]:
        parent = (key[0], groups[key][0]["control_of"])
        return (order.index(parent), order.index(key) + 1) if parent in groups else (order.index(key), 0)

    out: Table = []
    for key in sorted(groups, key=place):
        group = groups[key]
        kept = ("role", "control_of", "point", "architecture", "d_in", "d_sae", "expansion", "k")
        line = {"backbone": key[0], "coder": key[1], **{name: group[0][name] for name in kept}, "seeds": len(group)}
        for name in names:
            values = [value for row in group if (value := number(row, name)) is not None]
            if not values:
                continue
            line[name] = float(np.mean(values))
            if len(values) > 1:
                line[f"{name}_sd"] = float(np.std(values, ddof=1))
            elif len(group) == 1:
                told = group[0]["measured"][name]
                line |= {f"{name}_{end}": told[end] for end in ("low", "high") if told.get(end) is not None}
        out.append(line)
    return out


def profiles(backbones: Sequence[str], found: Mapping[str, Mapping[Any, float]]) -> dict[str, list[float]]:
    """Measure -> for each backbone its level, from the worst of them (0) to the best (1). Only measures that have a
    better side, that every backbone has, and in which they differ. Keys are backbones or (backbone, coder)."""
    out: dict[str, list[float]] = {}
    for name, values in found.items():
        if not about(name).better:
            continue
        each = [
            [v for of, v in values.items() if (of[0] if isinstance(of, tuple) else of) == backbone]
            for backbone in backbones
        ]
        if not all(each):
            continue
        level = np.array([float(np.mean(of)) for of in each])
        level = -level if about(name).better == "lower" else level
        if np.isfinite(level).all() and np.ptp(level) > 0:
            out[name] = ((level - level.min()) / np.ptp(level)).tolist()
    return out


def variance_rows(study: StudyRows) -> tuple[Table, list[str]]:
    """Of each headline metric, by backbone x configuration, and by backbone, width and k; and what was left out."""
    out: Table = []
    notes: list[str] = []
    for name in study.headline:
        settings, cut = common(of_settings(study.main, name))
        backbones, coders = (list(dict.fromkeys(key[i] for key in settings)) for i in (0, 1))
        if len(backbones) < 2 or len(coders) < 2 or len(settings) < len(backbones) * len(coders):
            counts = f"{len(backbones)} backbones and {len(coders)} configurations in common"
            notes.append(f"{about(name).title}: {counts}; it would need two of each.")
            continue
        if cut:
            notes.append(f"{about(name).title}: only the {len(coders)} configurations that all backbones have.")
        seeds = [seed for seed in next(iter(settings.values())) if all(seed in of for of in settings.values())]
        rows = [
            {"backbone": backbone, "configuration": coder, "seed": seed, "value": value}
            for (backbone, coder), of in settings.items()
            for seed, value in ([(s, of[s]) for s in seeds] or [(None, float(np.mean(list(of.values()))))])
        ]
        noise = noise_over_seeds([list(of.values()) for of in settings.values()])
        told = {"seeds": max(len(seeds), 1), "seed_sd": noise, "backbones": len(backbones)}
        found = _decomposed(rows, ["backbone", "configuration"], noise)
        out += _shares("backbone x configuration", name, found, told | {"configurations": len(coders)})
        dials, left = _dials(study, rows)
        if isinstance(dials, str):
            notes.append(f"{about(name).title}, by width and k: {dials}")
            continue
        factors = [key for key in ("backbone", "width", "k") if len({row[key] for row in dials}) > 1]
        found = _decomposed(dials, factors, noise)
        n = len({row["configuration"] for row in dials})
        out += _shares("backbone, width, k", name, found, told | {"configurations": n})
        if left:
            notes.append(f"{about(name).title}, by width and k: {left}")
    return out, list(dict.fromkeys(notes))


def _decomposed(rows: Table, factors: Sequence[str], noise: float) -> Decomposition:
    found = decompose_rows(rows, "value", factors, n_bootstrap=N_BOOTSTRAP)
    if found.terms[0].low is None and math.isfinite(noise) and noise > 0:
        levels = {name: [row[name] for row in rows] for name in factors}
        values = [row["value"] for row in rows]
        return with_noise(found, values, levels, sd=noise, n_bootstrap=N_BOOTSTRAP)
    return found


def _dials(study: StudyRows, rows: Table) -> tuple[Table | str, str]:
    """The rows with width and k, on the widths and ks that were crossed; or a sentence on why there are none."""
    of = {(row["backbone"], row["coder"]): row for row in study.main}
    for width in ("expansion", "d_sae"):
        placed = [
            {**row, "width": of[row["backbone"], row["configuration"]][width]}
            | {"k": of[row["backbone"], row["configuration"]]["k"]}
            for row in rows
        ]
        levels = {backbone: set() for backbone in {row["backbone"] for row in rows}}
        for row in placed:
            levels[row["backbone"]].add((row["width"], row["k"]))
        if None not in {value for row in placed for value in (row["width"], row["k"])} and all(
            one == next(iter(levels.values())) for one in levels.values()
        ):
            break
    else:
        return "backbones do not share widths (as multiples of d_in, or as latents) and ks.", ""
    pairs = next(iter(levels.values()))
    widths, ks = ({pair[i] for pair in pairs} for i in (0, 1))
    if len(widths) < 2 and len(ks) < 2:
        return "one width and one k; it would need two of either.", ""
    left = ""
    if len(pairs) < len(widths) * len(ks):
        crossed = {k for k in ks if all((width, k) in pairs for width in widths)}
        if len(crossed) > 1:
            placed = [row for row in placed if row["k"] in crossed]
            left = f"only the ks that every width has ({', '.join(map(str, sorted(crossed)))})."
        else:
            left = 'widths and ks are not crossed; what they share stands apart as "shared".'
    if len({(row["width"], row["k"]) for row in placed}) < len({row["configuration"] for row in placed}):
        left += " Configurations of the same width and k count as repeats."
    return placed, left.strip()


def _shares(design: str, name: str, found: Decomposition, told: Mapping[str, Any]) -> Table:
    return [
        {
            "metric": name, "design": design, "term": one.term, "df": one.df, "ss": one.ss, "eta2": one.eta2,
            "omega2": one.omega2, "f": one.f, "eta2_low": one.low, "eta2_high": one.high, "n": found.n,
            "balanced": found.balanced, **told,
        }
        for one in found.terms
    ]  # fmt: skip


def hypothesis_rows(study: StudyRows, asked: Sequence[Hypothesis]) -> tuple[Table, list[str]]:
    """Judged over all backbones, and again without those of random weights; and a sentence on each that cannot be."""
    resolved, notes = [], []
    for one in asked:
        wanted = one if one.metric != "ovr_auc_128" or one.metric in study.names else _with_auc(one, study)
        found = resolve(wanted, study.names, study.names)
        if found is None:
            gone = [
                name for name in (wanted.metric, wanted.task) if resolve(_of(name), study.names, study.names) is None
            ]
            notes.append(f"{one.name} was not tested: the study has no {' and no '.join(gone)}.")
            continue
        if found.metric != one.metric:
            notes.append(f"{one.name} reads {found.metric}: {one.metric} was not measured.")
        resolved.append(found)
    out: Table = []
    for over, left in (("all", ()), ("trained", study.untrained)):
        if resolved and (over == "all" or (left and len(study.backbones) - len(left) > 1)):
            names = {name for one in resolved for name in (one.metric, one.task)}
            means = {
                name: {backbone: value for backbone, value in of.items() if backbone not in left}
                for name, of in ((name, study.by_backbone(name)) for name in names)
            }
            out += [{"backbones": over, **row} for row in judge(resolved, means, means)]
    for row in out:  # "not supported" would say that something was looked at
        if math.isnan(row["rho"]):
            row["verdict"] = (
                "cannot be told: fewer than three backbones" if row["n"] < 3 else "cannot be told: constant"
            )
    return out, notes


def _with_auc(one: Hypothesis, study: StudyRows) -> Hypothesis:
    auc = next((name for name in study.headline if name.startswith("ovr_auc_")), one.metric)
    return Hypothesis(one.name, auc, one.task, one.threshold)


def _of(name: str) -> Hypothesis:
    return Hypothesis("", name, name, 0.0)


def matrix_rows(study: StudyRows) -> Table:
    return metric_task_matrix(study.means(study.headline), study.means(study.tasks))


def rank_rows(study: StudyRows) -> Table:
    """Each backbone's rank in each metric, and where bootstraps over its configurations put it."""
    out: Table = []
    for name in study.headline:
        samples: dict[str, list[float]] = {}
        for (backbone, _), of in common(of_settings(study.main, name))[0].items():
            samples.setdefault(backbone, []).append(float(np.mean(list(of.values()))))
        if len(samples) > 1:
            found = rank_intervals(samples, higher_is_better=about(name).better != "lower", n_bootstrap=2000)
            out += [{"metric": name, **row, "configurations": len(samples[row["backbone"]])} for row in found]
    return out


def scatter_rows(study: StudyRows, x: str = "fvu", y: str = "preservation") -> tuple[Table, Table]:
    """Points, means over seeds, and their correlations within and between backbones."""
    first, second = of_settings(study.main, x), of_settings(study.main, y)
    points = [
        {"backbone": key[0], "coder": key[1], x: float(np.mean(list(first[key].values())))}
        | {y: float(np.mean(list(second[key].values())))}
        for key in first
        if key in second
    ]
    return points, within_and_between(points, x, y) if len(points) > 2 else []


def family_rows(study: StudyRows) -> tuple[Table, Table]:
    """Ranks of backbones by each other family against the main one's: of all cells, and of those whose L0 is within
    NEAR_TARGET of its target. The second table: how many that keeps."""
    out: Table = []
    kept: Table = []
    for filtered in (False, True):
        means = {}
        for family in study.families:
            rows = [row for row in study.all_main if row["architecture"] == family]
            near = [row for row in rows if (gap := off_target(row)) is not None and gap <= NEAR_TARGET]
            if filtered:
                kept.append({"family": family, "cells": len(rows), "near_target": len(near)})
            means[family] = study.means(study.headline, near if filtered else rows)
        for other in study.families[1:]:
            lower = [name for name in study.headline if about(name).better == "lower"]
            for row in family_ranks(means[study.family], means[other], lower_is_better=lower):
                orders = {key: " > ".join(row[key]) for key in ("order", "other_order")}
                which = f"|L0 - target| <= {NEAR_TARGET:g}" if filtered else "all"
                out.append({"family": study.family, "other": other, "cells": which} | row | orders)
    return out, kept


def off_target(row: Row) -> float | None:
    l0 = number(row, "l0_tokens")
    return None if l0 is None or row["k"] is None else abs(l0 - row["k"])


def layer_rows(study: StudyRows) -> Table:
    """Rows of role "layer" against the same model's main rows of the same coder and seed, earlier and later apart."""
    of = {(row["model"], row["coder"], row["seed"]): row for row in study.all_main}
    out: Table = []
    for kind in ("earlier", "later", "other"):
        pairs = []
        for row in study.every:
            main = of.get((row["model"], row["coder"], row["seed"])) if row["role"] == "layer" else None
            if main is not None and _than(row["layer"], main["layer"]) == kind:
                pairs.append((main, row))
        for name in study.headline:
            flat = [
                {"backbone": row["model"], "layer": which, name: number(row, name)}
                for pair in pairs
                if None not in (number(pair[0], name), number(pair[1], name))
                for which, row in zip(("main", kind), pair, strict=True)
            ]
            if flat:
                at = sorted({f"{row['model']} {main['layer']} -> {row['layer']}" for main, row in pairs})
                (found,) = layer_ablation(flat, [name], layers=("main", kind))
                out.append({"against": kind, **found, "pairs": len(flat) // 2, "layers": "; ".join(at)})
    return out


def _than(layer: Any, main: Any) -> str:
    if not isinstance(layer, int) or not isinstance(main, int) or layer == main:
        return "other"
    return "earlier" if layer < main else "later"


def lift_rows(study: StudyRows) -> tuple[Table, Table, list[str]]:
    """Each task's lifts by backbone; its rho of raw with lift beside what chance gives; and what could not be told."""
    out: Table = []
    rho: Table = []
    notes: list[str] = []
    for name in study.names:
        task = TASK.fullmatch(name)
        if not task or task[2] != "raw":
            continue
        end = f"@{task[3]}" if task[3] else ""
        codes: dict[str, list[float]] = {}
        for (backbone, _), of in common(of_settings(study.main, f"{task[1]}_codes{end}"))[0].items():
            codes.setdefault(backbone, []).append(float(np.mean(list(of.values()))))
        raw = study.by_backbone(name)
        if not (shared := [backbone for backbone in raw if backbone in codes]):
            continue
        if len(shared) < 3 or min(raw[backbone] for backbone in shared) <= 0:
            for backbone in shared:
                ratios = np.array(codes[backbone]) / raw[backbone] if raw[backbone] > 0 else np.array([math.nan])
                sd = float(ratios.std(ddof=1)) if len(ratios) > 1 else math.nan
                line = {"raw": raw[backbone], "codes": float(np.mean(codes[backbone])), "lift": float(ratios.mean())}
                out.append({"task": f"{task[1]}{end}", "backbone": backbone, **line, "sd": sd})
            notes.append("The rho of raw and lift needs three backbones with raw above 0.")
            continue
        rows, found = codes_lift(raw, codes)
        out += [{"task": f"{task[1]}{end}", **row} for row in rows]
        rho.append({"task": f"{task[1]}{end}", **found})
    return out, rho, list(dict.fromkeys(notes))


def task_rows(study: StudyRows) -> Table:
    """Backbone x task: raw features, reconstructions and codes, means over common configurations."""
    out: Table = []
    for name in study.names:
        task = TASK.fullmatch(name)
        if task and task[2] == "raw":
            end = f"@{task[3]}" if task[3] else ""
            kinds = {kind: study.by_backbone(f"{task[1]}_{kind}{end}") for kind in ("raw", "recon", "codes", "lift")}
            for backbone in study.backbones:
                line = {kind: of.get(backbone) for kind, of in kinds.items()}
                out.append({"task": f"{task[1]}{end}", "backbone": backbone, **line})
    return out


def histogram_rows(study: StudyRows, curve: str) -> Table:
    """Counts of a histogram's bins, added over the main family's cells of each backbone."""
    out: Table = []
    for backbone in study.backbones:
        bins: dict[tuple[float, float], int] = {}
        for row in study.main:
            if row["backbone"] == backbone:
                for one in row["curves"].get(curve) or ():
                    key = (one["low"], one["high"])
                    bins[key] = bins.get(key, 0) + int(one.get("latents") or 0)
        total = sum(bins.values())
        out += [
            {"backbone": backbone, "low": low, "high": high, "latents": n, "share": n / total}
            for (low, high), n in bins.items()
            if total
        ]
    return out


def probing_rows(study: StudyRows) -> Table:
    """Curves of sparse probing by backbone, coder and k, means over seeds; coders of all families, and controls."""
    cells: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for row in study.every:
        if row["role"] != "layer":
            for one in row["curves"].get("sparse_probing") or ():
                key = (row["backbone"], row["coder"], row["control_of"], one["k"])
                for score in ("ovr_auc", "multi_acc"):
                    if one.get(score) is not None:
                        cells.setdefault(key, {}).setdefault(score, []).append(float(one[score]))
    return [
        {"backbone": key[0], "coder": key[1], "control_of": key[2], "k": key[3]}
        | {score: float(np.mean(values)) for score, values in of.items()}
        for key, of in cells.items()
    ]


def cost_rows(study: StudyRows) -> tuple[Table, Table]:
    """Seconds and memory of each backbone and coder; seconds by metric of each backbone."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    by_metric: dict[tuple[str, str], float] = {}
    for row in study.every:
        groups.setdefault((row["backbone"], row["coder"]), []).append(row["cost"])
        for name, seconds in (row["cost"].get("seconds_by_metric") or {}).items():
            key = (row["backbone"], name)
            by_metric[key] = by_metric.get(key, 0.0) + float(seconds)
    out = [
        {"backbone": key[0], "coder": key[1], "cells": len(costs)}
        | {name: _added(sum, costs, name) for name in ("train_seconds", "measure_seconds")}
        | {"peak_memory_mb": _added(max, costs, "peak_memory_mb")}
        for key, costs in groups.items()
    ]
    return out, [{"backbone": key[0], "metric": key[1], "seconds": value} for key, value in by_metric.items()]


# -- helpers


def _added(how: Callable[[list[float]], float], costs: Sequence[Row], name: str) -> float | None:
    values = [float(cost[name]) for cost in costs if cost.get(name) is not None]
    return how(values) if values else None


def _complete(row: Row) -> dict[str, Any]:
    config = row.get("config") or {}
    d_in, d_sae = row.get("d_in"), row.get("d_sae")
    layer = re.match(r"blocks\.(\d+)\.", str(row.get("point", "")))
    return {
        "model": row["backbone"],
        "role": "control" if row.get("control_of") is not None else "main",
        "control_of": None,
        "point": "",
        "layer": int(layer[1]) if layer else None,
        "architecture": "",
        "d_in": None,
        "d_sae": None,
        "expansion": d_sae / d_in if d_sae and d_in else None,
        "k": config.get("k", config.get("target_l0")),
        "seed": 0,
        **row,
        **{name: dict(row.get(name) or {}) for name in ("measured", "curves", "cost")},
    }
