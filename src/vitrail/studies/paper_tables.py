"""Rows of `vitrail eval` in the layouts of the papers: Prisma's table and MSAE's, as Markdown, LaTeX, HTML or CSV.

    prisma   Joseph et al. 2025, tables 4-9: EV in per cent, average L0s, cosines, the cross-entropies, alive latents
    msae     Zaigrajew et al. 2025, tables 1 and 6-17: sparsity, FVU, CS, probe, CKNNA, orthogonality, dead latents

A column stands where some row has its number. Values are vitrail's own definitions; those columns whose published
definition differs have a twin under the published one (`published=True`), never silently instead. The CSV has the
column names of the published tables, full precision and an interval beside each number: `vitrail check-table` reads it.

`differences_table` has the same columns of differences between rows of one pass, with paired intervals over its images.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Found = dict[str, Any]  # a Measured, as JSON


@dataclass(frozen=True)
class Column:
    title: str
    csv_name: str
    measure: str
    digits: int
    scale: float = 1.0
    spread: str | None = None  # the measure whose value stands behind a plus-minus


LAYOUTS: dict[str, tuple[Column, ...]] = {
    "prisma": (
        Column("% explained var.", "pct_explained_var", "explained_variance", 1, 100),
        Column("avg L0", "avg_L0", "l0_tokens", 2),
        Column("avg CLS L0", "avg_cls_L0", "l0_cls", 2),
        Column("avg img L0 (sum)", "avg_img_L0_sum", "l0_image_sum", 1),
        Column("avg img L0 (unique)", "avg_img_L0_unique", "l0_image_unique", 1),
        Column("cos sim", "cos_sim", "cosine", 3),
        Column("recon cos sim", "recon_cos_sim", "recon_cosine", 3),
        Column("CE", "CE", "ce", 3),
        Column("recon CE", "recon_CE", "recon_ce", 3),
        Column("zero abl CE", "zero_abl_CE", "zero_ce", 3),
        Column("% CE recovered", "pct_CE_recovered", "ce_recovered", 2),
        Column("% alive", "pct_alive", "alive", 1, 100),
    ),
    "prisma-published": (
        Column("% explained var. (mean of ratios)", "pct_explained_var", "explained_variance_prisma", 1, 100),
        Column("avg L0", "avg_L0", "l0_tokens", 2),
        Column("avg CLS L0", "avg_cls_L0", "l0_cls", 2),
        Column("cos sim (token axis)", "cos_sim", "cosine_prisma", 3),
        Column("recon cos sim", "recon_cos_sim", "recon_cosine", 3),
        Column("CE (unscaled)", "CE", "ce_unscaled", 4),
        Column("recon CE (unscaled)", "recon_CE", "recon_ce_unscaled", 4),
        Column("zero abl CE (unscaled)", "zero_abl_CE", "zero_ce_unscaled", 4),
        Column("% CE recovered (unscaled)", "pct_CE_recovered", "ce_recovered_unscaled", 2),
        Column("% alive", "pct_alive", "alive", 1, 100),
    ),
    "msae": (
        Column("L0 (zeros)", "L0_zero_fraction", "sparsity", 3, spread="sparsity_std"),
        Column("FVU", "FVU", "fvu", 3, spread="fvu_std"),
        Column("CS", "CS", "cosine_normalized", 3, spread="cosine_normalized_std"),
        Column("LP (KL) 1e-6", "LP_KL_x1e6", "lp_kl", 2, 1e6, spread="lp_kl_std"),
        Column("LP (Acc)", "LP_Acc", "lp_agreement", 3),
        Column("CKNNA", "CKNNA", "cknna", 3),
        Column("DO", "DO", "do_mean_sq", 4),
        Column("NDN (eval)", "NDN_eval", "dead_eval", 0),
        Column("NDN (train)", "NDN_train", "dead_train", 0),
    ),
    "msae-published": (
        Column("L0 (zeros)", "L0_zero_fraction", "sparsity", 3, spread="sparsity_std"),
        Column("FVU (code)", "FVU", "fvu_msae_code", 3, spread="fvu_msae_code_std"),
        Column("CS (mean added back)", "CS", "cosine", 3, spread="cosine_std"),
        Column("LP (KL) 1e-6", "LP_KL_x1e6", "lp_kl", 2, 1e6, spread="lp_kl_std"),
        Column("LP (Acc)", "LP_Acc", "lp_agreement", 3),
        Column("CKNNA (Eq. 5)", "CKNNA", "cknna_eq5", 3),
        Column("DO", "DO", "do_mean_sq", 4),
        Column("NDN (eval)", "NDN_eval", "dead_eval", 0),
        Column("NDN (train)", "NDN_train", "dead_train", 0),
    ),
}


def paper_table(
    rows: Sequence[dict[str, Any]],
    layout: str,
    *,
    form: str = "markdown",
    controls: bool = True,
    intervals: bool = False,
) -> str:
    """The rows as text. Raises ValueError for a layout or form there is none of, and where no column has a number."""
    kept = [row for row in rows if controls or row.get("control_of") is None]
    columns = _columns(kept, layout, form)
    if form == "csv":
        return _csv(kept, columns)
    cells = [[row_name(row), *(_cell(row, column, intervals) for column in columns)] for row in kept]
    return FORMS[form](["", *(column.title for column in columns)], cells, [row.get("control_of") for row in kept])


def differences_table(
    rows: Sequence[dict[str, Any]], layout: str, *, form: str = "markdown", against: str | None = None
) -> str:
    """Each coder less each of its controls, image by image; with `against`, less that row: another coder by name, or a
    control, also by its own name alone ("pca").

    Intervals are of differences over the same images. Where a number has no interval over images (CKNNA, what is of a
    decoder alone), it has no paired one either: a dash. Raises ValueError where there are no such differences.
    """
    columns = _columns(rows, layout, form)
    found = [
        {**row, "name": f"{row_name(row)} less {own_name(other)}", "less": other, "measured": differences}
        for row in rows
        for other, differences in row.get("paired", {}).items()
        if (is_control(row, other) if against is None else against in (other, own_name(other)))
    ]
    if not found:
        raise ValueError(_no_differences(rows, against))
    if form == "csv":
        return _csv(found, columns, less=True)
    cells = [[row["name"], *(_cell(row, column, True, sign="+") for column in columns)] for row in found]
    return FORMS[form](["", *(column.title for column in columns)], cells, [row["less"] for row in found])


def is_control(row: dict[str, Any], other: str) -> bool:
    """Whether the row of this name is a control of the coder `row`, by how controls are named."""
    return other.startswith(f"{row['name']} / ")


def _no_differences(rows: Sequence[dict[str, Any]], against: str | None) -> str:
    names = list(dict.fromkeys(other for row in rows for other in row.get("paired", {})))
    if not names:
        return (
            f"these {len(rows)} rows have no differences over the same images: they were measured one coder a time and "
            "without controls, or before there were any. Measure them in one `vitrail eval`, into a new file."
        )
    if against is None:
        return f"no coder has a control here. Name a coder with --against: {', '.join(names)}."
    return f"no row was compared with {against!r}. There are: {', '.join(names)}."


def _columns(rows: Sequence[dict[str, Any]], layout: str, form: str) -> list[Column]:
    """Those of which some row has a number."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
    columns = [c for c in LAYOUTS[layout] if any(_number(row, c.measure) is not None for row in rows)]
    if not columns:
        raise ValueError(
            f"none of these {len(rows)} rows has a number of the {layout} table. Measure with `vitrail eval --metrics "
            "all`."
        )
    return columns


def own_name(name: str) -> str:
    """A control's own, without the coder's."""
    return name.split(" / ")[-1]


def row_name(row: dict[str, Any]) -> str:
    """A coder's name with its point; a control's last word."""
    if row.get("control_of") is not None:
        return own_name(row["name"])
    return f"{row['name']} ({row['point']})" if "point" in row else row["name"]


def _number(row: dict[str, Any], measure: str | None) -> float | None:
    return None if measure is None else row["measured"].get(measure, {}).get("value")


def _cell(row: dict[str, Any], column: Column, intervals: bool, sign: str = "") -> str:
    """`sign`: "+" for a difference, which has no spread."""
    value = _number(row, column.measure)
    if value is None:
        return "–"
    form = f"{sign}.{column.digits}f"
    text = f"{column.scale * value:{form}}"
    spread = None if sign else _number(row, column.spread)
    if spread is not None:
        text += f" ± {column.scale * spread:.{column.digits}f}"
    found = row["measured"][column.measure]
    if intervals and found.get("low") is not None and found.get("high") is not None:
        low, high = (f"{column.scale * found[end]:{form}}" for end in ("low", "high"))
        text += f" [{low}, {high}]"
    return text


Written = Callable[[list[str], list[list[str]], list[str | None]], str]


def _markdown(titles: list[str], cells: list[list[str]], control_of: list[str | None]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row, control in zip(cells, control_of, strict=True):
        name = row[0].replace("|", r"\|")
        lines.append("| " + " | ".join([name if control else f"**{name}**", *row[1:]]) + " |")
    return "\n".join(lines) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "%": r"\%", "_": r"\_", "#": r"\#", "&": r"\&", "$": r"\$", "±": r"$\pm$"}


def _latex(titles: list[str], cells: list[list[str]], control_of: list[str | None]) -> str:
    """A booktabs tabular."""

    def clean(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in text).replace("–", "--")

    lines = [rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(clean, titles)) + r" \\", r"\midrule"]
    for place, (row, control) in enumerate(zip(cells, control_of, strict=True)):
        if place and control is None:
            lines.append(r"\addlinespace")
        name = rf"\quad {clean(row[0])}" if control else rf"\textbf{{{clean(row[0])}}}"
        lines.append(" & ".join([name, *map(clean, row[1:])]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _html(titles: list[str], cells: list[list[str]], control_of: list[str | None]) -> str:
    def line(row: list[str], tag: str, kind: str = "") -> str:
        return f"<tr{kind}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = [line(row, "td", ' class="control"' if of else "") for row, of in zip(cells, control_of, strict=True)]
    return "<table>\n<thead>" + line(titles, "th") + "</thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>\n"


def _csv(rows: Sequence[dict[str, Any]], columns: Sequence[Column], *, less: bool = False) -> str:
    """Full precision. Of each number its interval, where there is one, and the definition by which it was computed.
    `less`: the rows are differences, and say from what.
    """
    said = ["name", *(["less"] if less else []), "architecture", "control_of", "point", "tokens", "d_in", "d_sae"]
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    heads = [f"{c.csv_name}{end}" for c in columns for end in ("", "_low", "_high", "_definition")]
    table.writerow([*said, *heads])
    for row in rows:
        about = [row.get(key, "") for key in said]
        cells: list[Any] = []
        for column in columns:
            found = row["measured"].get(column.measure, {})
            ends = (found.get(end) for end in ("value", "low", "high"))
            cells += ["" if end is None else repr(column.scale * end) for end in ends]
            cells.append(found.get("definition", ""))
        table.writerow(["" if cell is None else cell for cell in about] + cells)
    return stream.getvalue()


FORMS: dict[str, Written] = {"markdown": _markdown, "latex": _latex, "html": _html, "csv": _markdown}
