"""The report of a study, from its rows: one page that needs nothing else, each figure with its data beside it.

    write_study_report(rows, "OUT", title="...")
    OUT/report.html  OUT/report.md  OUT/figures/*.svg, *.png  OUT/data/*.csv

What the rows do not allow, with one backbone or without tasks, is left out with a sentence on what it would need. The
audit of latents reads OUT/stores and OUT/cells; OUT/plan.json says which hypotheses are asked.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vitrail.files import read_json, replacing
from vitrail.studies import study_figures as pictures
from vitrail.studies.hypotheses import hypotheses_of
from vitrail.studies.report import STYLE
from vitrail.studies.study_analyses import (
    NEAR_TARGET,
    StudyRows,
    Table,
    about,
    cost_rows,
    family_rows,
    histogram_rows,
    hypothesis_rows,
    layer_rows,
    lift_rows,
    matrix_rows,
    number,
    probing_rows,
    profiles,
    rank_rows,
    scatter_rows,
    setting_rows,
    task_rows,
    variance_rows,
)
from vitrail.studies.study_audit import audit
from vitrail.studies.study_figures import Drawing
from vitrail.studies.study_guide import guide_rows, guide_words
from vitrail.studies.study_page import (
    HOLM,
    RHO,
    Column,
    Page,
    digits,
    html_table,
    listed,
    markdown_cell,
    markdown_table,
    measure_column,
    needs,
    p_value,
    says,
    there,
    titled,
)

SETTINGS_SHOWN = 24  # in report.md
MORE_STYLE = """
.plot { margin: .6rem 0 1rem; overflow-x: auto; }
.plot img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
td.word, th.word { text-align: left; white-space: normal; max-width: 26rem; }
.says { max-width: 62rem; margin: .3rem 0; }
.needs { color: var(--soft); font-style: italic; max-width: 62rem; }
section ul { max-width: 62rem; padding-left: 1.2rem; }
"""


def write_study_report(rows: Sequence[Mapping[str, Any]], out: str | Path, *, title: str) -> Path:
    """OUT/report.html. Raises ValueError for no rows, and for hypotheses in the plan's options that are none."""
    out = Path(out)
    path = out / "plan.json"
    study = StudyRows.of(rows, read_json(path, "plan of a study") if path.is_file() else {})
    page = Page(study, out, Drawing(out / "figures"))
    for section in SECTIONS:
        section(page)
    style = STYLE + MORE_STYLE
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main><h1>{escape(title)}</h1>"
        f"{''.join(page.parts)}</main></body></html>"
    )
    for name, text in (("report.html", html), ("report.md", _markdown(page, title))):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return out / "report.html"


# ---------------------------------------------------------------------------------------------------------- sections


def _what(page: Page) -> None:
    study = page.study
    counts: dict[str, int] = {}
    for row in study.every:
        counts[row["role"]] = counts.get(row["role"], 0) + 1
    seeds = sorted({row["seed"] for row in study.every})
    cells = ", ".join(f"{n} {role}" for role, n in counts.items())
    lines = [
        f"{len(study.every)} cells ({cells}): {len(study.backbones)} backbones, coders of "
        f"{', '.join(study.families)}, seeds {', '.join(map(str, seeds))}.",
        f"Where a backbone has one number, it is the mean over seeds, then over the configurations of {study.family} "
        "that every backbone has. Controls and further layers are in no mean.",
    ]
    if study.untrained:
        lines.append(f"Of random weights, as far as names and plan say: {', '.join(study.untrained)}.")
    images = study.plan.get("images") or {}
    if images:
        lines.append("Images: " + "; ".join(f"{name}: {spec}" for name, spec in images.items()) + ".")
    page.section("What was run", says(*lines))
    page.short += [lines[0], "", *([lines[2], ""] if study.untrained else [])]


def _profile(page: Page) -> None:
    study = page.study
    profile = profiles(study.backbones, study.means(study.headline))
    title = "Profile of each backbone"
    if len(study.backbones) < 2 or len(profile) < 3:
        measures = f"{len(study.backbones)} backbones and {len(profile)} such metrics"
        needed = "needs two backbones, and three metrics that both have and in which they differ"
        page.section(title, needs(f"A profile {needed}; there are {measures}."))
        return
    rows: Table = [
        {"measure": name, **dict(zip(study.backbones, values, strict=True))} for name, values in profile.items()
    ]
    caption = "Each metric from the worst backbone of this study (centre) to the best (rim)."
    missing = [about(name).title for name in study.headline if name not in profile]
    table = page.table("profile", rows)
    page.section(
        title,
        says(
            "Ranks with distances: 0 is the worst backbone here, 1 the best, however near they lie to each other. They "
            "are never added up to a score."
        ),
        table,
        page.figure("profile", pictures.radar(profile, study.backbones), caption),
        needs(f"Not in it, as not every backbone has them or all are equal: {', '.join(missing)}.") if missing else "",
    )
    page.short += ["![Profile](figures/profile.png)", ""]


def _settings(page: Page) -> None:
    study, rows = page.study, setting_rows(page.study)
    shown = [{**row, "coder": ("\u2003" if row["control_of"] is not None else "") + row["coder"]} for row in rows]
    extra = [name for name in ("l0_tokens", "alive", "k_acc_area", "preservation_same") if name in study.names]
    measures = [*extra[:2], *study.headline, *extra[2:]]
    columns = [
        Column("backbone", "backbone", word=True),
        Column("coder", "coder", word=True),
        Column("point", "point", word=True),
        Column("expansion", "width", lambda value: f"{value:g}x"),
        Column("k", "k", lambda value: f"{value:g}"),
        Column("seeds", "seeds"),
        *map(measure_column, measures),
    ]
    if len({row["point"] for row in rows}) == 1:
        columns = [column for column in columns if column.key != "point"]
    tasks = task_rows(study)
    kinds = [Column(kind, kind, digits(3)) for kind in ("raw", "recon", "codes", "lift")]
    has_controls = any(row["control_of"] is not None for row in rows)
    page.section(
        "Settings, each beside its controls" if has_controls else "Settings",
        says(
            "Small figures: ± one standard deviation over seeds; with one seed, the 95 % interval over images. "
            "All measures are in data/settings.csv."
        ),
        "" if has_controls else needs("Controls would need coders with control_of in the plan."),
        page.table("settings", rows, columns, shown=shown),
        "<h3>Tasks: raw features, reconstructions, codes</h3>",
        page.table(
            "tasks", tasks, [Column("task", "task", word=True), Column("backbone", "backbone", word=True), *kinds]
        )
        if tasks
        else needs("Tasks would need labelled test images (retrieval, linear probes) or masks (segmentation)."),
    )
    heads = [Column("backbone", "backbone"), Column("coder", "coder"), *map(measure_column, measures)]
    if len(rows) > SETTINGS_SHOWN:
        means = study.means(measures)
        heads = [column for column in heads if column.key != "coder"]
        rows = [{"backbone": b, **{name: of.get(b) for name, of in means.items()}} for b in study.backbones]
        page.short += ["Means of backbones over their common configurations; each setting is in data/settings.csv.", ""]
    page.short += [*markdown_table(rows, heads), ""]


def _moran(page: Page) -> None:
    study, title = page.study, "Spatial coherence: Moran's I over latents"
    rows = histogram_rows(study, "moran_histogram")
    if not rows:
        page.section(title, needs("Distributions need the curve moran_histogram, which patches of test images give."))
        return
    raw = histogram_rows(study, "raw_moran_histogram")
    marks = {name: study.by_backbone(name) for name in ("moran", "raw_moran", "moran_null")}
    table: Table = [{"of": of, **row} for of, found in (("latents", rows), ("raw dimensions", raw)) for row in found]
    means: Table = []
    for backbone in study.backbones:
        line: dict[str, Any] = {"backbone": backbone, **{name: of.get(backbone) for name, of in marks.items()}}
        if line["moran"] is not None and line["raw_moran"]:
            line["kept"] = line["moran"] / line["raw_moran"]
        means.append(line | {"evaluable": study.by_backbone("moran_evaluable").get(backbone)})
    caption = f"Share of evaluable latents by Moran's I, all {study.family} cells of a backbone together."
    page.section(
        title,
        says(
            "A backbone's own dimensions are the diagnostic: what they already show is not the coder's doing. The null "
            "is -1 / (patches - 1), and so another for another grid."
        ),
        page.table("moran_distributions", table),
        page.figure("moran_distributions", pictures.histograms(rows, raw, marks, study.backbones), caption),
        page.table(
            "moran_means",
            means,
            [
                Column("backbone", "backbone", word=True),
                Column("moran", "latents", digits(3)),
                Column("raw_moran", "raw dimensions", digits(3)),
                Column("kept", "latents / raw", digits(2)),
                Column("moran_null", "null", digits(4)),
                Column("evaluable", "share evaluable", digits(3)),
            ],
        ),
        "" if marks["raw_moran"] else needs("The diagnostic needs raw_moran of a backbone's dimensions."),
    )


def _fidelity(page: Page) -> None:
    study, title = page.study, "Reconstruction error against preservation"
    points, found = scatter_rows(study)
    if not found:
        page.section(title, needs(f"It needs three settings that have FVU and preservation; there are {len(points)}."))
        return
    between = next((row for row in found if row["backbone"] == "between"), None)
    within = [row for row in found if row["backbone"] in study.backbones and not math.isnan(row["rho"])]
    negative = sum(row["rho"] < 0 for row in within)
    words = [
        f"Within a backbone rho is negative in {negative} and positive in {len(within) - negative} of {len(within)}."
    ]
    if between is None:
        words.append("Between backbones there is no correlation of ranks of fewer than three.")
    elif math.isnan(between["rho"]):
        words.append("Between backbones one side is constant.")
    else:
        words.append(
            f"Between backbones rho is {between['rho']:+.2f} (exact p {between['p']:.3g}, {between['n']} backbones)."
        )
        low = [row for row in within if (row["rho"] < 0) != (between["rho"] < 0)]
        if low:
            words.append(
                f"The two have opposite signs in {len(low)} backbones: which backbone is rebuilt better says another "
                "thing than which coder of one backbone rebuilds better."
            )
    caption = "A point a setting, means over seeds; a diamond a backbone's mean."
    page.section(
        title,
        says(
            "If error alone decided what a probe can still read, points would fall from left to right within each "
            "backbone, and between them. " + " ".join(words)
        ),
        page.table("fvu_preservation", points),
        page.figure("fvu_preservation", pictures.scatter(points, "fvu", "preservation", study.backbones), caption),
        page.table("fvu_preservation_rho", found, [Column("backbone", "over", word=True), *RHO]),
    )


def _probing(page: Page) -> None:
    rows, title = probing_rows(page.study), "Sparse probing: how many latents a class needs"
    if not rows:
        page.section(title, needs("Curves need labelled test images (sparse_probing)."))
        return
    caption = (
        "Mean over classes of a one-vs-rest probe's AUC, given the k best latents of each class; means over seeds."
    )
    page.section(
        title,
        page.table("k_curves", rows),
        page.figure("k_curves", pictures.curves_by_k(rows, page.study.backbones), caption),
    )


def _variance(page: Page) -> None:
    rows, notes = variance_rows(page.study)
    title = "What the spread over settings is due to"
    if not rows:
        page.section(title, needs(*(notes or ["It needs two backbones with two configurations in common."])))
        return
    noisy = any(there(row["eta2_low"]) for row in rows)
    several = any(row["seeds"] > 1 for row in rows)
    words = [
        f"Main cells of {page.study.family} only. eta^2: share of the sum of squares; omega^2: the same less what "
        "chance would give a factor of so many levels; shares of a balanced design add up to 1."
    ]
    if several:
        words.append("Intervals: seeds drawn anew within each cell; with two or three they are too narrow.")
    elif noisy:
        words.append(
            "One seed a cell goes in. Intervals: 95 % of decompositions once noise as large as that between the seeds "
            "of those settings that have several (seed sd) is added. The residual is interaction and noise together."
        )
    else:
        words.append("One seed a cell: the residual is interaction and noise together, and there are no intervals.")
    columns = [
        Column("metric", "metric", word=True),
        Column("design", "design", word=True),
        Column("term", "term", word=True),
        Column("df", "df"),
        Column("eta2", "eta²", digits(3)),
        Column("omega2", "omega²", digits(3)),
        Column("f", "F", digits(1)),
        Column("n", "values"),
        Column("seed_sd", "seed sd", lambda value: f"{value:.2g}"),
    ]
    table = page.table("variance", rows, columns, shown=titled(rows, "metric"))
    page.section(
        title,
        says(" ".join(words)),
        page.figure("variance", pictures.shares(rows), "Shares of the sum of squares."),
        f"<details><summary>All terms</summary>{table}</details>",
        listed(notes),
    )


def _hypotheses(page: Page) -> None:
    asked = hypotheses_of(page.study.plan.get("options") or {})
    rows, notes = hypothesis_rows(page.study, asked)
    title = "Hypotheses: does a metric of coders foretell a task?"
    if not rows:
        page.section(title, needs(*notes))
        page.short += [*notes, ""]
        return
    n = max(row["n"] for row in rows)
    least = f"With {n} backbones no exact two-sided p is below {p_value(2 / math.factorial(n))}" if n > 2 else (
        f"With {n} backbones ranks have no correlation"
    )  # fmt: skip
    tested = len([row for row in rows if row["backbones"] == "all"])
    if n > 2:
        smallest = tested * 2 / math.factorial(n)
        least += f", and after Holm over {tested} none below {p_value(min(smallest, 1.0))} unless others are larger"
    columns = [
        Column("hypothesis", "", word=True),
        Column("backbones", "backbones", word=True),
        Column("metric", "metric", word=True),
        Column("task", "task", word=True),
        *RHO[:2],
        Column("threshold", "asked", digits(2)),
        *RHO[2:],
        Column("p_one_sided", "p, one-sided", p_value),
        Column("p_t", "p, by t", p_value, meaning="what papers print; wrong for a handful of backbones"),
        HOLM,
        Column("verdict", "verdict", word=True),
    ]
    again = " A second set of lines leaves out backbones of random weights." if page.study.untrained else ""
    page.section(
        title,
        says(
            "Spearman's rho over backbones, each the mean of its configurations. Supported: rho at the asked threshold "
            f"or above, and p after Holm at most .05. {least}.{again}"
        ),
        page.table("hypotheses", rows, columns, shown=titled(rows, "metric", "task")),
        listed(notes),
    )
    heads = [Column("hypothesis", "hypothesis"), *columns[1:6], RHO[2], HOLM, columns[-1]]
    page.short += [
        "## Hypotheses",
        "",
        *markdown_table(titled(rows, "metric", "task"), heads),
        "",
        f"{least}.",
        *notes,
        "",
    ]


def _matrix(page: Page) -> None:
    study, title = page.study, "Every metric against every task"
    rows = matrix_rows(study)
    page.found["matrix"] = rows
    n = max((row["n"] for row in rows), default=0)
    if n < 3:
        what = f"{len(study.backbones)} backbones, {len(study.headline)} metrics, {len(study.tasks)} tasks"
        page.section(
            title, needs(f"It needs three backbones that have a metric and a task in common; there are {what}.")
        )
        return
    holds = [row for row in rows if row["p_holm"] <= 0.05]
    counted = sum(not math.isnan(row["rho"]) for row in rows)
    words = (
        f"{len(holds)} of {counted} pairs have p at most .05 after Holm over all of them. Values as they are: for an "
        "error (FVU, absorption) a negative rho is the good one. R@5 and R@10 are in data/tasks.csv."
    )
    caption = "Spearman's rho over backbones; in brackets p after Holm over the whole matrix."
    page.section(
        title,
        says(words),
        page.table("metric_task_matrix", rows),
        page.figure("metric_task_matrix", pictures.heat_map(rows), caption),
        ""
        if page.drawing.available
        else html_table(
            titled(rows, "metric", "task"),
            [Column("metric", "metric", word=True), Column("task", "task", word=True), *RHO, HOLM],
        ),
    )


def _ranks(page: Page) -> None:
    rows, title = rank_rows(page.study), "How sure the ranks of backbones are"
    if not rows:
        page.section(title, needs("Ranks need two backbones that have a metric."))
        return
    single = all(row["configurations"] < 2 for row in rows)
    caption = "Rank of each backbone's mean; bars: where 95 % of bootstraps over its configurations put it."
    page.section(
        title,
        needs("With one configuration a backbone nothing can be drawn anew: bars have no length.") if single else "",
        page.table("rank_intervals", rows),
        page.figure("rank_intervals", pictures.rank_bars(rows, page.study.backbones), caption),
    )


def _lifts(page: Page) -> None:
    rows, rho, notes = lift_rows(page.study)
    title = "What codes keep of raw features: lift"
    if not rows:
        page.section(title, needs("Lifts need tasks measured on raw features and on codes."))
        return
    page.section(
        title,
        says(
            "lift = codes / raw, mean over configurations. Raw is its denominator: noise in raw alone makes rho of raw "
            "and lift negative. By chance: rho if codes' numbers were given to backbones at random; its p is the share "
            "of those with a rho as low."
        ),
        page.table("lifts", rows),
        page.figure(
            "lifts", pictures.lifts(rows, page.study.backbones), "Lift against raw; bars: sd over configurations."
        ),
        page.table(
            "lifts_rho",
            rho,
            [
                Column("task", "task", word=True),
                *RHO,
                Column("rho_by_chance", "rho by chance", digits(2, "+")),
                Column("p_by_chance", "p against chance", p_value),
            ],
        ),
        listed(notes),
    )


def _families(page: Page) -> None:
    study, title = page.study, "Do two families of coders rank backbones alike?"
    if len(study.families) < 2:
        page.section(title, needs(f"It needs coders of a second family; all are {study.family}."))
        return
    rows, kept = family_rows(study)
    told = [f"{one['family']} {one['near_target']} of {one['cells']}" for one in kept]
    page.section(
        title,
        says(
            "Means over the configurations that every backbone has. Both ways: all cells, and only those whose L0 is "
            f"within {NEAR_TARGET:g} of what was asked for ({'; '.join(told)} cells); cells without a target are in "
            "the first only."
        ),
        page.table(
            "family_ranks",
            rows,
            [
                Column("metric", "metric", word=True),
                Column("cells", "cells", word=True),
                Column("family", "of", word=True),
                Column("other", "and", word=True),
                *RHO,
                HOLM,
                Column("order", "order", word=True),
                Column("other_order", "the other's order", word=True),
            ],
            shown=titled(rows, "metric"),
        ),
        page.table("family_cells", kept),
    )


def _layers(page: Page) -> None:
    rows, title = layer_rows(page.study), "Another layer of the same models"
    if not rows:
        page.section(
            title, needs("It needs rows of role layer: a further point of a model, with a coder of the main ones.")
        )
        return
    page.section(
        title,
        says(
            f"The further layer less the main one, same model, coder and seed: {rows[0]['layers']}. p: exact, over all "
            "signs of the models' changes."
        ),
        page.table(
            "layers",
            rows,
            [
                Column("metric", "metric", word=True),
                Column("against", "further layer", word=True),
                Column("n", "models"),
                Column("first", "main", digits(3)),
                Column("change", "change", digits(3, "+")),
                Column("rises", "rises in"),
                Column("p", "p, sign flips", p_value),
                Column("rho_of_orders", "rho of orders", digits(2, "+")),
            ],
            shown=titled(rows, "metric"),
        ),
    )


def _audit(page: Page) -> None:
    html, rows, notes = audit(page.study, page.out)
    title = "Latents to look at"
    if not html:
        page.section(title, needs(*notes))
        return
    page.section(
        title,
        says(
            "By rule, not by eye: of each backbone's widest coder (then largest k, then first seed) the latent whose "
            "Moran's I is nearest the mean, and three of the top 5 %. Lit patches are where the latent fires, on one "
            "scale a latent; point at a picture to see it bare. Pictures are those of its largest activations, so that "
            "they say what it fires on most, and not what it mostly fires on."
        ),
        page.table("audit", rows),
        html,
        listed(notes),
    )


def _guide(page: Page) -> None:
    study, title = page.study, "Which backbone for which task"
    if not study.tasks:
        page.section(title, needs("It needs tasks: labelled test images, other domains, or masks."))
        return
    rows = guide_rows(study, page.found.get("matrix") or [])
    words = guide_words(study, rows)
    columns = [
        Column("task", "task", word=True),
        Column("raw", "measured there", word=True),
        Column("codes", "measured there, codes", word=True),
        Column("metric", "nearest metric", word=True),
        *RHO[1:3],
        HOLM,
        Column("by_metric", "order by that metric", word=True),
    ]
    page.section(title, listed(words), page.table("guide", rows, columns, shown=titled(rows, "task", "metric")))
    page.short += ["## Which backbone for which task", "", *(f"- {markdown_cell(word)}" for word in words), ""]


def _costs(page: Page) -> None:
    rows, by_metric = cost_rows(page.study)
    seconds = {name: sum(row[name] or 0 for row in rows) for name in ("train_seconds", "measure_seconds")}
    peak = max((row["peak_memory_mb"] or 0 for row in rows), default=0)
    told = (
        f"Training took {seconds['train_seconds']:,.0f} s, measuring {seconds['measure_seconds']:,.0f} s; the largest "
        f"process had {peak:,.0f} MB. Extraction is not in it."
    )
    names = {"train_seconds": "training, s", "measure_seconds": "measuring, s", "peak_memory_mb": "peak memory, MB"}
    page.section(
        "What it cost",
        says(told),
        page.table("seconds_by_metric", by_metric)
        + page.figure(
            "seconds_by_metric", pictures.stacked_seconds(by_metric, _backbones_of(by_metric)), "Measuring, by metric."
        )
        if by_metric
        else needs("Seconds by metric need cost.seconds_by_metric in the rows."),
        page.table(
            "costs",
            rows,
            [Column("backbone", "backbone", word=True), Column("coder", "coder", word=True), Column("cells", "cells")]
            + [Column(key, title, lambda value: f"{value:,.0f}") for key, title in names.items()],
        ),
    )
    page.short += [told, ""]


def _backbones_of(rows: Table) -> list[str]:
    return list(dict.fromkeys(row["backbone"] for row in rows))


def _how(page: Page) -> None:
    study = page.study
    shown = [*study.headline, *study.tasks]
    told = {name: (about(name).title, f"{about(name).meaning}; {_definition(study, name)}") for name in shown}
    meanings = "".join(f"<dt>{escape(title)}</dt><dd>{escape(meaning)}</dd>" for title, meaning in told.values())
    first = study.every[0]
    about_it = {"plan": study.plan, "provenance": first.get("provenance"), "backbone_digests": _digests(study)}
    text = json.dumps(about_it, indent=1, ensure_ascii=False, default=str)
    m5 = [name for name in shown if name == "monosemanticity_normalized"]
    page.section(
        "How it was measured",
        f"<dl>{meanings}</dl>",
        needs("M5 of two backbones compares their evaluators as well, unless they share one.") if m5 else "",
        f"<details><summary>Plan and provenance</summary><pre>{escape(text)}</pre></details>",
    )


def _definition(study: StudyRows, name: str) -> str:
    row = next((row for row in study.all_main if number(row, name) is not None), None)
    return "" if row is None else str(row["measured"][name].get("definition") or "")


def _digests(study: StudyRows) -> dict[str, Any]:
    return {row["backbone"]: row.get("backbone_digest") for row in study.every}


SECTIONS = (
    _what, _profile, _settings, _moran, _fidelity, _probing, _variance, _hypotheses, _matrix, _ranks, _lifts, _families,
    _layers, _audit, _guide, _costs, _how,
)  # fmt: skip


def _markdown(page: Page, title: str) -> str:
    lines = [
        f"# {markdown_cell(title)}",
        "",
        *page.short,
        "All of it: report.html. Figures: figures/. Numbers: data/.",
        "",
    ]
    return "\n".join(lines)
