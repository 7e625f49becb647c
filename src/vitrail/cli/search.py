"""vitrail search"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vitrail.backbones import load
from vitrail.coders import coder_metadata
from vitrail.codes import CodeStore
from vitrail.concepts.dense import EmbeddingIndex
from vitrail.concepts.inverted import Neighbours, SparseIndex, build_search
from vitrail.concepts.search import (
    Hit,
    Names,
    explained,
    fires_here,
    groups_of,
    images_firing,
    read_names,
)
from vitrail.files import write_json
from vitrail.progress import Terminal
from vitrail.store import Store

EMBEDDING = "hook_image_embed"


def run(arguments: Sequence[str]) -> None:
    tyro.cli(search_verb, args=arguments, prog="vitrail search")


def search_verb(
    run_or_codes: Annotated[Path, tyro.conf.Positional],
    image: int | None = None,
    text: str | None = None,
    box: tuple[int, int, int, int] | None = None,
    metric: Literal["l1", "cosine", "overlap", "embedding"] | None = None,
    pool: str = "max",
    k: int = 10,
    why: int = 8,
    coder: str | None = None,
    names: Path | None = None,
    by_meaning: bool = False,
    embeddings: Path | None = None,
    exact: bool | None = None,
    index: Path | None = None,
    out: Path | None = None,
) -> None:
    """Images like an image, images of a concept, what fires in a box; and why.

    Args:
        run_or_codes: a run folder (its codes/NAME), or a folder of codes
        image: a row of the store: images like this one
        text: images in which the concepts of these words fire; commas part the concepts
        box: with --image: LEFT TOP RIGHT BOTTOM in pixels: what fires there, and images with the same latents
        metric: l1 (default), cosine or overlap of codes; embedding: cosine of image embeddings
        pool: an image's codes: max or mean over its patches, cls, or the number of a token
        k: how many images
        why: how many shared latents to show for each
        coder: which of a run's coders
        names: concepts.parquet or a JSON of latent to name (default: the run's, where there is one)
        by_meaning: words that are no name find the nearest names, by the backbone's text tower
        embeddings: a store of hook_image_embed of the same images (default: the one the codes were made from)
        exact: embeddings compared one by one, or through usearch (default: exact up to 100,000)
        index: where the search index is kept (default: RUN/search/NAME-POOL)
        out: also write what was found, as JSON
    """
    if (image is None) == (text is None):
        raise ValueError("ask for either --image or --text.")
    if box is not None and image is None:
        raise ValueError("--box is drawn on an image: give --image too.")
    path, run_folder = find_codes(run_or_codes, coder)
    codes = CodeStore.open(path)
    known = find_names(names, run_folder, path.name)
    at = index or (
        run_folder / "search" / f"{path.name}-{pool}" if run_folder else path.parent / f"{path.name}-{pool}.search"
    )
    searched = build_search(codes, at, pool=int(pool) if pool.isdigit() else pool, progress=Terminal())
    told: dict[str, Any] = {"codes": str(path), "pool": pool, "image": image, "text": text, "box": box}
    if text is not None:
        hits, extra = by_text(searched, codes, text, known, k, by_meaning)
    elif box is not None:
        assert image is not None
        hits, extra = by_box(searched, codes, image, box, metric or "overlap", known, k, why)
    else:
        assert image is not None
        hits, extra = by_image(searched, codes, image, metric or "l1", known, k, why, embeddings, exact)
    told |= {**extra, "hits": [hit.to_json() for hit in hits]}
    show(hits, image_ids(codes), distance=extra.get("metric") == "l1")
    if out is not None:
        write_json(out, told)
        print(f"also in {out}")


def find_codes(path: Path, coder: str | None) -> tuple[Path, Path | None]:
    """(folder of codes, run folder or None). Raises FileNotFoundError, or ValueError where several coders are there."""
    if (path / "manifest.json").is_file():
        return path, path.parents[1] if path.parent.name == "codes" else None
    found = sorted(folder.parent.name for folder in (path / "codes").glob("*/manifest.json"))
    if not found:
        raise FileNotFoundError(f"{path} is neither a folder of codes nor a run with codes/NAME.")
    if coder is None and len(found) > 1:
        raise ValueError(f"{path} holds codes of {', '.join(found)}: choose one with --coder.")
    if coder is not None and coder not in found:
        raise ValueError(f"{path} holds codes of {', '.join(found)}, not of {coder!r}.")
    return path / "codes" / (coder or found[0]), path


def find_names(names: Path | None, run_folder: Path | None, coder: str) -> dict[int, str] | None:
    if names is not None:
        return read_names(names)
    if run_folder is not None:
        for path in (run_folder / "concepts" / coder / "concepts.parquet", run_folder / "concepts.parquet"):
            if path.is_file():
                return read_names(path)
    return None


def by_text(
    index: SparseIndex, codes: CodeStore, text: str, names: Names | None, k: int, by_meaning: bool
) -> tuple[list[Hit], dict[str, Any]]:
    if not names:
        raise ValueError("words find latents by their names, and there are none: run `vitrail name`, or pass --names.")
    tower = None
    if by_meaning:
        about = coder_metadata(Path(codes.manifest.coder["path"]))
        tower = load(about["backbone"]).text
        if tower is None:
            raise ValueError(f"{about['backbone']} has no text tower: ask without --by-meaning.")
    groups = groups_of(text, names, tower)
    for group in groups:
        print("concepts: " + ", ".join(f"{names[latent]} (latent {latent})" for latent in group))
    rows, scores = images_firing(index, groups, k)
    latents = {latent for group in groups for latent in group}
    return [Hit(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)], {
        "metric": "concepts",
        "latents": sorted(latents),
    }


def by_box(
    index: SparseIndex,
    codes: CodeStore,
    image: int,
    box: tuple[int, int, int, int],
    metric: str,
    names: Names | None,
    k: int,
    why: int,
) -> tuple[list[Hit], dict[str, Any]]:
    fires, query = fires_here(codes, image, box, names=names)
    print(f"in the box {len(fires)} latents fire:")
    for one in fires[:why]:
        print(f"  {_label(one.latent, one.name):<28} max {one.max:.3g}, mean {one.mean:.3g}, {one.n_patches} patches")
    found = leave_out(index.nearest(query, min(k + 1, index.n), metric), image)
    told = {"metric": metric, "fires": [vars(one) for one in fires]}
    return explained(index, query, found, names=names, top=why), told


def by_image(
    index: SparseIndex,
    codes: CodeStore,
    image: int,
    metric: str,
    names: Names | None,
    k: int,
    why: int,
    embeddings: Path | None,
    exact: bool | None,
) -> tuple[list[Hit], dict[str, Any]]:
    query, extra = index.rows(torch.tensor([image])), {}
    if metric == "embedding":
        dense = EmbeddingIndex(image_embeddings(embeddings or Path(codes.manifest.store)), exact=exact)
        if dense.n != index.n:
            raise ValueError(f"{embeddings} holds {dense.n} images, the codes {index.n}: extract the same images.")
        found = dense.nearest(dense.embeddings[image : image + 1].float(), min(k + 1, dense.n))
        if not dense.is_exact:
            extra = {"recall": dense.recall(min(k, dense.n))}
            print(f"through usearch, which finds {extra['recall']:.1%} of the exact neighbours here")
    else:
        found = index.nearest(query, min(k + 1, index.n), metric)
    return explained(index, query, leave_out(found, image), names=names, top=why), {"metric": metric, **extra}


def leave_out(found: Neighbours, image: int) -> Neighbours:
    return found.without(torch.tensor([image]))


def image_embeddings(store: Path) -> torch.Tensor:
    """Every image's embedding. Raises KeyError where the store does not hold them."""
    opened = Store.open(store)
    if EMBEDDING not in opened.points:
        raise KeyError(
            f"{store} holds {', '.join(opened.points)}, not {EMBEDDING}: extract it from the same images and pass "
            "that store with --embeddings."
        )
    kind = opened.kind(EMBEDDING, None)
    return torch.cat([x[:, 0] for _, x in opened.image_batches(EMBEDDING, kind)])


def image_ids(codes: CodeStore) -> list[str] | None:
    """Names of the store's images in row order; None where the store is elsewhere now."""
    try:
        table = Store.open(codes.manifest.store).images()
    except (OSError, ValueError) as error:
        print(f"note: images have no names here, only rows: {error}", file=sys.stderr)
        return None
    return [
        f"{name} ({about})" if about else str(name)
        for name, about in zip(table["id"], table["class_name"], strict=True)
    ]


def show(hits: Sequence[Hit], ids: list[str] | None, *, distance: bool) -> None:
    print(f"{'row':>8}  {'distance' if distance else 'similarity':>10}  image")
    for hit in hits:
        print(f"{hit.row:>8}  {hit.value:>10.4g}  {ids[hit.row] if ids else ''}")
        if hit.why:
            parts = [f"{_label(one.latent, one.name)} {one.share:.0%}" for one in hit.why]
            print(f"{'':>20}  shares {json.dumps(', '.join(parts), ensure_ascii=False)[1:-1]}")


def _label(latent: int, name: str | None) -> str:
    return f"latent {latent}" if name is None else f"{name} ({latent})"
