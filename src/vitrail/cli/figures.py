"""vitrail figures"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vitrail.studies.figures import figures
from vitrail.studies.first_look import read_rows


def run(arguments: Sequence[str]) -> None:
    tyro.cli(figures_verb, args=arguments, prog="vitrail figures")


def figures_verb(rows: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path, controls: bool = True) -> None:
    """Draw the curves of `vitrail eval --metrics`: SVG, PNG and the numbers they show (CSV).

    Args:
        rows: eval.jsonl files, or run folders that hold one
        out: the folder for the pictures
        controls: draw them too, thin and grey
    """
    if not rows:
        raise ValueError("name at least one eval.jsonl, or a run folder that holds one.")
    found = [row for path in rows for row in read_rows(path / "eval.jsonl" if path.is_dir() else path)]
    for path in figures([row for row in found if controls or row.get("control_of") is None], out):
        print(path)
