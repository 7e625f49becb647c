"""vitrail report"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.images import open_images
from vitrail.progress import Terminal
from vitrail.studies.first_look import report_folder


def run(arguments: Sequence[str]) -> None:
    tyro.cli(report_verb, args=arguments, prog="vitrail report", config=(tyro.conf.PositionalRequiredArgs,))


def report_verb(folder: Path, title: str | None = None, images: str | None = None) -> None:
    """Write FOLDER/report.html from what is in FOLDER: coders/, codes/, index/, eval.jsonl.

    Args:
        folder: a run folder
        images: where the pictures are now, if they moved since extraction
    """
    source = None if images is None else open_images(images)
    page = report_folder(folder, title=title or folder.resolve().name, images=source, progress=Terminal())
    print(f"report: {page}")
