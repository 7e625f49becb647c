"""vitrail check-table"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.studies.check_repeats import check_repeats
from vitrail.studies.check_table import Known, Sheet, check_sheet


def run(arguments: Sequence[str]) -> None:
    tyro.cli(check_table_verb, args=arguments, prog="vitrail check-table", config=(tyro.conf.PositionalRequiredArgs,))


def check_table_verb(
    files: tuple[Path, ...],
    /,
    unscaled_classes: int | None = None,
    tokens: int | None = None,
    d_in: int | None = None,
    d_sae: int | None = None,
) -> None:
    """Check tables of coders against themselves and each other: one sentence for each thing that cannot be right.

    Ends with 1 if there is any, with 0 if there is none.

    Args:
        files: CSV files with a header; columns are known by name (EV, FVU, CE, L0, sparsity, DO ...)
        unscaled_classes: cross-entropies are of unscaled cosines over so many classes
        tokens: tokens an image, for sums of L0 over an image
        d_in: dimensions of the activations, for the bounds of orthogonality and stability
        d_sae: number of latents, for these bounds and for sparsity
    """
    if not files:
        raise ValueError("give at least one CSV file to check.")
    known = Known(unscaled_classes=unscaled_classes, n_tokens=tokens, d_in=d_in, d_sae=d_sae)
    sheets = [Sheet.read(path) for path in files]
    findings = [finding for sheet in sheets for finding in check_sheet(sheet, known)] + check_repeats(sheets)
    for finding in findings:
        print(finding)
    n_rows = sum(len(sheet.rows) for sheet in sheets)
    checked = f"{n_rows} rows of {len(sheets)} table{'s' if len(sheets) > 1 else ''}"
    if findings:
        sys.stdout.flush()
        print(f"{checked}: {len(findings)} finding{'s' if len(findings) > 1 else ''}", file=sys.stderr)
        sys.exit(1)
    print(f"{checked}: nothing is wrong")
