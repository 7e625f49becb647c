"""Training on several points at once: what `vitrail train` asks for transcoders and crosscoders.

--to POINT              of a transcoder: the point to be written, of the same store
--beside WHERE ...      of a crosscoder: further sources. WHERE is a POINT of the same store, another STORE (the same
                        point there), or STORE:POINT
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.coders import CODERS, MultiSource, SparseCoder, Transcoder
from vitrail.store import Store
from vitrail.store.joined import JoinedSource, Part
from vitrail.studies.first_look import coder_about


@dataclass(frozen=True)
class Joined:
    """`widths`: the coder's arguments that follow from the data. `about`: what its metadata says of it."""

    source: JoinedSource
    held_out: JoinedSource | None
    widths: dict[str, Any]
    about: dict[str, Any]


def reads_several_points(architecture: str) -> bool:
    return issubclass(CODERS[architecture], Transcoder | MultiSource)


def joined(
    architecture: str,
    store: Path,
    *,
    point: str | None,
    to: str | None = None,
    beside: Sequence[str] = (),
    tokens: str | None,
    batch_size: int,
    seed: int,
    held_out: float,
) -> Joined:
    """Sources for training and for the inference threshold. `held_out`: share of the images, the last of the store."""
    parts = parts_to_join(architecture, Store.open(store), point=point, to=to, beside=beside, tokens=tokens)
    n_images = parts[0].store.n_images
    n_train = n_images - round(held_out * n_images)
    source = JoinedSource(parts, batch_size=batch_size, seed=seed, images=(0, n_train))
    rest = None
    if n_train < n_images:
        rest = JoinedSource(parts, batch_size=batch_size, seed=seed, images=(n_train, n_images))
    return Joined(source, rest, widths(architecture, source), {**about(source.parts), "train_images": [0, n_train]})


def parts_to_join(
    architecture: str, store: Store, *, point: str | None, to: str | None, beside: Sequence[str], tokens: str | None
) -> list[Part]:
    """The points a coder of this architecture reads (and writes), in the order of its rows."""
    if not reads_several_points(architecture):
        raise ValueError(f"{architecture} reads one point; --to is of transcoders, --beside of crosscoders.")
    if point is None:
        raise ValueError(f"{architecture} needs --point, the point it reads first. The store holds {_listed(store)}.")
    writes = issubclass(CODERS[architecture], Transcoder)
    if writes and (to is None or beside):
        raise ValueError(f"{architecture} reads --point and writes --to, one each. The store holds {_listed(store)}.")
    if not writes and (to is not None or not beside):
        raise ValueError(f"{architecture} needs --beside, one or more sources that it reads beside --point.")
    wanted = [(store, to)] if writes else [_place(store, point, word) for word in beside]
    return [Part(store, point, tokens), *(Part(where, name or point, tokens) for where, name in wanted)]


def widths(architecture: str, source: JoinedSource) -> dict[str, Any]:
    if issubclass(CODERS[architecture], Transcoder):
        return dict(zip(("d_in", "d_out"), source.widths, strict=True))
    return {"d_in": source.d_in, "widths": list(source.widths)}


def about(parts: Sequence[Part]) -> dict[str, Any]:
    """Of the first part what any coder says of its point, and the same of every part under `parts`."""
    of_each = [coder_about(part.store, part.store.default_point(part.point), part.kind) for part in parts]
    return {**of_each[0], "parts": of_each}


def beside_when_encoding(
    coder: SparseCoder, metadata: Mapping[str, Any], store: Store, asked: Sequence[str]
) -> list[Part]:
    """What a crosscoder reads beside its first point: as asked, else where it was trained. Of other coders, nothing."""
    if not isinstance(coder, MultiSource):
        if asked:
            raise ValueError(f"a {coder.name} coder reads one point; --beside is of crosscoders.")
        return []
    if asked:
        point = store.default_point(metadata.get("point"))
        return [
            Part(where, name or point, metadata.get("tokens"))
            for where, name in (_place(store, point, w) for w in asked)
        ]
    if "parts" not in metadata:
        raise ValueError(f"this {coder.name} does not say what it was trained on: name it with --beside.")
    first, *others = metadata["parts"]
    return [
        Part(store if part["store"] == first["store"] else Store.open(part["store"]), part["point"], part["tokens"])
        for part in others
    ]


def _place(store: Store, point: str, word: str) -> tuple[Store, str]:
    """Of "POINT", "STORE" or "STORE:POINT"."""
    if word in store.points:
        return store, word
    path, separator, name = word.rpartition(":")
    if separator and Path(path).is_dir():
        return Store.open(path), name
    if Path(word).is_dir():
        return Store.open(word), point
    raise ValueError(f"--beside {word!r} is neither a point of the store ({_listed(store)}) nor the folder of another.")


def _listed(store: Store) -> str:
    return ", ".join(store.points)
