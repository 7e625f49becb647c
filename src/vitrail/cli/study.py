"""vitrail study run"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.cli.options import pick_device, pick_workers
from vitrail.progress import Terminal
from vitrail.studies.study import run_study
from vitrail.studies.study_estimate import estimate
from vitrail.studies.study_plan import read_plan
from vitrail.studies.study_report import write_study_report
from vitrail.studies.visaebench import VERSION, measure


def run(arguments: Sequence[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"run": run_verb},
        args=arguments,
        prog="vitrail study",
        description="Backbones x coders x seeds from one file (docs/studies.md).",
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def run_verb(
    file: Path,
    out: Path = Path("study"),
    plan: bool = False,
    only: tuple[str, ...] = (),
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Run what FILE declares: extract, train, measure (ViSAEBench), report. Killed and run again, it goes on.

    Args:
        file: YAML or JSON
        out: the folder for everything
        plan: say what it will cost, and do nothing
        only: backbones of the plan; the others, and the report, are left to another run with the same OUT
    """
    told = read_plan(file)
    print(f"{told.n_cells} cells: {len(told.backbones)} backbones, {len(told.coders)} coders and their seeds")
    for one in estimate(told):
        hours = ", ".join(f"{hours:.3g} h on {name}" for name, hours in one["hours"].items())
        print(
            f"  {one['backbone']}: {one['images']:,} images, {one['tokens']:,} tokens, {one['bytes'] / 2**20:,.1f} MiB;"
            f" {one['extract_flops']:.2e} FLOPs to extract, {one['train_flops']:.2e} to train,"
            f" {one['measure_flops']:.2e} to encode and decode what is measured; about {hours}"
        )
    if plan:
        return
    rows = run_study(
        told,
        out,
        measure=measure,
        version=VERSION,
        only=only,
        device=pick_device(device),
        n_workers=pick_workers(workers),
        progress=Terminal(),
    )
    if only:
        print(f"{len(rows)} cells of {', '.join(only)} are in {out / 'cells'}. Run without --only for the report.")
        return
    path = write_study_report(rows, out, title=told.title or file.stem)
    print(f"{len(rows)} rows in {out / 'rows.jsonl'}; the report: {path}")
