"""vitrail index"""

from collections.abc import Sequence
from pathlib import Path

import tyro

from vitrail.codes import CodeStore
from vitrail.index import build_index
from vitrail.progress import Terminal


def run(arguments: Sequence[str]) -> None:
    tyro.cli(index_verb, args=arguments, prog="vitrail index", config=(tyro.conf.PositionalRequiredArgs,))


def index_verb(codes: Path, out: Path, k: int = 16) -> None:
    """Per latent: the k images and patches that excite it most, its density and histogram.

    Args:
        codes: what `vitrail encode` wrote
        out: the index's folder
    """
    index = build_index(CodeStore.open(codes), out, k=k, progress=Terminal())
    dead = int(index.latents["dead"].sum())
    print(f"{out}: {index.manifest['d_sae']:,} latents, {dead:,} never fired on {index.manifest['n_images']:,} images")
