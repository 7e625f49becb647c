"""vitrail demo"""

import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.cli.options import pick_device, pick_workers
from vitrail.progress import Terminal
from vitrail.studies.demo import demo
from vitrail.studies.table_text import print_table


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
    first = rows[0]
    print(
        f"{first['n_images']:,} test images that no coder saw. Each coder stands above its controls, which may spend "
        f"as many active latents.\n{time.monotonic() - began:.0f} s. The report, with the latents to look at:\n"
        f"  {(out / 'report.html').resolve()}"
    )
