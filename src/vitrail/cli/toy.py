"""vitrail toy"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from vitrail.progress import Terminal
from vitrail.toys import train_toy


def run(arguments: Sequence[str]) -> None:
    tyro.cli(toy_verb, args=arguments, prog="vitrail toy", config=(tyro.conf.PositionalRequiredArgs,))


def toy_verb(action: Literal["train"], name: str, out: Path = Path("toys")) -> None:
    """Train a toy model by its recipe (docs/toys.md) and write NAME.safetensors and NAME.json to OUT."""
    told = train_toy(name, out, progress=Terminal())
    print(f"{out / name}.safetensors: held-out {told['held_out']}")
