"""vitrail convert"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.foreign import PEERS, normalize_inside, read_foreign, save_opened
from vitrail.store import Store
from vitrail.studies.first_look import coder_about


def run(arguments: Sequence[str]) -> None:
    tyro.cli(convert_verb, args=arguments, prog="vitrail convert", config=(tyro.conf.PositionalRequiredArgs,))


def convert_verb(
    path: Path,
    out: Path,
    peer: Annotated[
        str | None, tyro.conf.arg(help=f"the format, instead of looking for it: {', '.join(PEERS)}")
    ] = None,
    store: Path | None = None,
    point: str | None = None,
    tokens: str | None = None,
    backbone: str | None = None,
) -> None:
    """A coder of another library as a vitrail coder: the same codes and reconstructions, or a sentence why not.

    Args:
        path: the folder or file that the other library saved. It is read as data; none of its code runs
        out: the folder for the coder
        store: of the activations that it reads: names backbone, point and tokens for `vitrail eval`, and gives the
            statistics of coders whose library normalises outside of the file
        point: the hook point, by vitrail's name
        tokens: all, spatial, cls or pooled
        backbone: by vitrail's name
    """
    found, opened = read_foreign(path, peer)
    about: dict[str, Any] = {"point": point, "tokens": tokens, "backbone": backbone}
    about = {name: value for name, value in about.items() if value is not None}
    if store is not None:
        of_store = Store.open(store)
        point = of_store.default_point(point)
        about = {**coder_about(of_store, point, of_store.kind(point, tokens)), **about}
        stats = of_store.stats(point, about["tokens"])
        if len(stats.mean) != opened.coder.d_in:
            raise ValueError(
                f"{store} has activations of {len(stats.mean)} dimensions, {path} takes {opened.coder.d_in}."
            )
        if opened.outside is not None:
            normalize_inside(opened, stats)
    save_opened(found, opened, out, about)
    coder = opened.coder
    print(f"{out}: {coder.name}, {coder.d_in} -> {coder.d_sae}, normalisation {coder.normalization}; from {found.name}")
    for note in opened.notes:
        print(f"  note: {note}")
