"""vitrail table"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vitrail.files import replacing
from vitrail.studies.first_look import read_rows
from vitrail.studies.long_table import write_long_table
from vitrail.studies.paper_tables import differences_table, paper_table
from vitrail.studies.seeds import over_seeds


def run(arguments: Sequence[str]) -> None:
    tyro.cli(table_verb, args=arguments, prog="vitrail table", config=(tyro.conf.PositionalRequiredArgs,))


def table_verb(
    layout: Literal["prisma", "prisma-published", "msae", "msae-published"],
    rows: Annotated[tuple[Path, ...], tyro.conf.Positional],
    form: Literal["markdown", "latex", "html", "csv", "parquet"] = "markdown",
    controls: bool = True,
    intervals: bool = False,
    seeds: bool = False,
    paired: bool = False,
    against: str | None = None,
    out: Path | None = None,
) -> None:
    """Rows of `vitrail eval` in a paper's layout.

    Args:
        layout: the paper; "-published" has its own definitions where they differ from vitrail's (docs/metrics.md)
        rows: eval.jsonl files, or run folders that hold one
        form: "parquet": every number of every row, whatever the layout, a line each in full precision; needs --out
        controls: with the controls under each coder
        intervals: with 95 % intervals (a CSV always has them)
        seeds: one row for the coders NAME#0, NAME#1, ...: means, and intervals over the seeds
        paired: instead of numbers their differences, each coder less each of its controls, with 95 % intervals over
            the same images; a dash where there is none
        against: with --paired: less this row instead, a coder of the same `vitrail eval` or a control ("pca")
        out: a file; default, the screen
    """
    if not rows:
        raise ValueError("name at least one eval.jsonl, or a run folder that holds one.")
    if against is not None and not paired:
        raise ValueError("--against says from what --paired takes the difference: give both.")
    if paired and seeds:
        raise ValueError("--paired is of single coders over the same images, --seeds of means: leave one out.")
    found = [row for path in rows for row in read_rows(path / "eval.jsonl" if path.is_dir() else path)]
    if seeds:
        means = over_seeds(found)
        merged = {name for mean in means for name in mean["seeds"]}
        found = means + [row for row in found if row["name"] not in merged and row["control_of"] not in merged]
    if form == "parquet":
        if out is None:
            raise ValueError("a Parquet table is a file: say which with --out numbers.parquet.")
        print(f"{write_long_table(found, out)} numbers in {out}")
        return
    if paired:
        text = differences_table(found, layout, form=form, against=against)
    else:
        text = paper_table(found, layout, form=form, controls=controls, intervals=intervals)
    if out is None:
        print(text, end="")
        return
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(out)
