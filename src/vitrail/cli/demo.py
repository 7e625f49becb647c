"""vitrail demo"""

import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.cli.options import pick_device, pick_workers
from vitrail.progress import Terminal
from vitrail.studies.demo import demo
from vitrail.studies.table_text import print_recovery, print_table
from vitrail.studies.truth_recovery import read_recovery


def run(arguments: Sequence[str]) -> None:
    tyro.cli(demo_verb, args=arguments, prog="vitrail demo")


def demo_verb(out: Path = Path("demo"), device: str = "auto", workers: int | None = None) -> None:
    """The main job on the built-in world with the built-in model: no download, no data, a few minutes on two cores.

    Args:
        out: the folder for everything; run again, it goes on where it was
    """
    began = time.monotonic()
    rows = demo(out, device=pick_device(device), n_workers=pick_workers(workers), progress=Terminal())
    print_table(rows)
    print("\nWhat was found of what there is to find, on pictures of their own:")
    print_recovery(read_recovery(out / "recovery" / "recovery.jsonl"))
    first = rows[0]
    print(
        f"{first['n_images']:,} test images that no coder saw. Above, each coder stands over its controls, which may "
        f"spend as many active latents; below, controls at their best, limited or not.\n"
        f"{time.monotonic() - began:.0f} s. The report, with the latents to look at:\n"
        f"  {(out / 'report.html').resolve()}"
    )
