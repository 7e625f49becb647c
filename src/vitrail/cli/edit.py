"""vitrail edit"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from vitrail.backbones import Backbone, load
from vitrail.cli.options import pick_device
from vitrail.cli.search import EMBEDDING, find_names
from vitrail.coders import coder_metadata, load_coder
from vitrail.concepts.dense import EmbeddingIndex
from vitrail.concepts.editing import Drift, Edit, Requery, drift, edit_hook, requery
from vitrail.files import write_json
from vitrail.images import ImageSource, open_images
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head, own_head, zero_shot_head


def run(arguments: Sequence[str]) -> None:
    tyro.cli(edit_verb, args=arguments, prog="vitrail edit")


def edit_verb(
    run_or_coder: Annotated[Path, tyro.conf.Positional],
    images: Annotated[str, tyro.conf.Positional],
    concept: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-c"])],
    operation: Literal["set", "add", "scale", "remove"] = "set",
    strengths: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0, 30.0),
    queries: int = 8,
    limit: int | None = None,
    where: Literal["all", "cls", "spatial"] = "all",
    keep_error: bool = True,
    k: int = 8,
    target: tuple[str, ...] = (),
    templates: tuple[str, ...] = ("a photo of a {}.",),
    names: Path | None = None,
    coder: str | None = None,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    batch_size: int = 64,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Change concepts in images' activations, and see which images they are near then, and what else changed.

    Args:
        run_or_coder: a run folder (its coders/NAME), or a coder's folder
        images: the collection; its first images are the queries, "world:shapes?n=200"
        concept: latents by number, or by name
        operation: set to, add, or scale by each strength; remove takes none
        strengths: values, in the coder's units
        queries: how many images are edited
        limit: so many images of the collection
        where: tokens that are edited
        keep_error: what the coder does not reconstruct stays as it is
        k: neighbours of each query, itself left out
        target: classes that the edit is meant to change; drift is of the others
        templates: texts around class names, where the backbone answers zero-shot
        names: concepts.parquet or a JSON of latent to name (default: the run's, where there is one)
        coder: which of a run's coders
        backbone: default: the one the coder was trained on
        out: also write the whole table, as JSON
    """
    folder, run_folder = find_coder(run_or_coder, coder)
    loaded, about = load_coder(folder, device=pick_device(device)), coder_metadata(folder)
    for needed in ("point", "tokens"):
        if needed not in about:
            raise ValueError(f"{folder} does not say its {needed}: it was not trained by `vitrail train`.")
    if backbone is None and "backbone" not in about:
        raise ValueError(f"{folder} does not say its backbone: pass --backbone.")
    model = load(backbone or about["backbone"], weights=weights, image_px=image_px, device=pick_device(device))
    known, source, point = find_names(names, run_folder, folder.name), open_images(images), about["point"]
    edits = [Edit.of(one, operation, names=known) for one in concept]
    head, classes = class_head(model, source, templates)
    targets = [class_place(one, classes) for one in target]
    embeddings, pictures = embed_all(model, source, limit, queries, batch_size)
    if len(embeddings) <= k:
        raise ValueError(f"k={k} neighbours and the query itself need {k + 1} images, got {len(embeddings)}.")
    index, own = EmbeddingIndex(embeddings), torch.arange(len(pictures))
    before, output = at_point(model, pictures, point)
    changed: dict[float, Tensor] = {}
    drifts: dict[float, Drift] = {}
    for strength in (0.0,) if operation == "remove" else strengths:
        asked = [edit.with_value(strength) for edit in edits]
        hook = edit_hook(model, point, loaded, asked, where=where, keep_error=keep_error)
        with model.hooks({point: hook}):
            after, edited_output = at_point(model, pictures, point)
            changed[strength] = model.activations(pictures, [EMBEDDING])[EMBEDDING].float().cpu()
        rows = [_rows(value, model, point, where) for value in (before, after)]
        outputs = None if head is None else (output, edited_output)
        drifts[strength] = drift(loaded, rows[0], rows[1], asked, outputs=outputs, head=head, targets=targets)
    table = requery(lambda q: index.nearest(q, k + 1).without(own), embeddings[: len(pictures)], changed, drifts)
    print(f"{operation} {', '.join(_label(edit, known) for edit in edits)} at {point} of {len(pictures)} images:")
    show(table, operation)
    if out is not None:
        ids = [source.record(i).id for i in range(len(embeddings))]
        told = {"coder": str(folder), "images": source.spec, "point": point, "operation": operation, "where": where}
        told |= {"keep_error": keep_error, "latents": [list(edit.latents) for edit in edits], "targets": list(target)}
        write_json(out, {**told, "ids": ids, "table": [row.to_json() for row in table]})
        print(f"all neighbours: {out}")


def find_coder(path: Path, coder: str | None) -> tuple[Path, Path | None]:
    """(coder's folder, run folder or None). Raises FileNotFoundError, or ValueError where several are there."""
    if (path / "coder.json").is_file():
        return path, path.parents[1] if path.parent.name == "coders" else None
    found = sorted(file.parent.name for file in (path / "coders").glob("*/coder.json"))
    if not found:
        raise FileNotFoundError(f"{path} is neither a coder's folder nor a run with coders/NAME.")
    if coder is None and len(found) > 1:
        raise ValueError(f"{path} holds the coders {', '.join(found)}: choose one with --coder.")
    if coder is not None and coder not in found:
        raise ValueError(f"{path} holds the coders {', '.join(found)}, not {coder!r}.")
    return path / "coders" / (coder or found[0]), path


def class_head(model: Backbone, source: ImageSource, templates: Sequence[str]) -> tuple[Head | None, list[str]]:
    """What gives class probabilities: the model's own head, or its text tower on the collection's classes."""
    if model.n_classes is not None:
        return own_head(model), list(model.class_names) or list(map(str, range(model.n_classes)))
    if model.text is not None and source.classes:
        return zero_shot_head(model, source.classes, templates), list(source.classes)
    return None, []


def class_place(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise ValueError(f"there is no class {name!r} here. Classes: {', '.join(classes[:12]) or 'none'}.")
    return classes.index(name)


@torch.no_grad()
def embed_all(
    model: Backbone, source: ImageSource, limit: int | None, queries: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """(embeddings of the collection, pictures of its first `queries`). Raises ValueError for an unreadable one."""
    device = next(model.parameters()).device
    n = len(source) if limit is None else min(limit, len(source))
    batches = load_batches(source, range(n), model.preprocess, batch_size=batch_size)
    rows, pictures = [], []
    with closing(batches):
        for batch in batches:
            if batch.skipped:
                position, reason = batch.skipped[0]
                raise ValueError(f"image {position} of {source.spec} cannot be read: {reason}")
            rows.append(model.activations(batch.images.to(device), [EMBEDDING])[EMBEDDING].float().cpu())
            if sum(map(len, pictures)) < queries:
                pictures.append(batch.images)
    return torch.cat(rows), torch.cat(pictures)[:queries].to(device)


@torch.no_grad()
def at_point(model: Backbone, pictures: Tensor, point: str) -> tuple[Tensor, Tensor]:
    output, cache = model.run_with_cache(pictures, point)
    return cache[point], output.float()


def _rows(value: Tensor, model: Backbone, point: str, where: str) -> Tensor:
    """The rows that are edited."""
    if not model.point(point).has_tokens:
        return value.float()
    chosen = slice(None) if value.shape[1] == model.grid.n_patches else model.grid.tokens(where)
    return value[:, chosen].flatten(0, 1).float()


def show(table: Sequence[Requery], operation: str) -> None:
    print(
        f"{'strength':>9} {'kept':>6} {'norm':>6} {'target':>7} {'others':>7} {'top':>5} {'latents':>8}  near image 0"
    )
    for row in table:
        told, kept = row.drift, sum(row.kept) / len(row.kept)
        assert told is not None
        numbers = [told.probability, told.others, told.top_changed]
        cells = [f"{'-' if number is None else format(number, '.3f')}" for number in numbers]
        strength = "removed" if operation == "remove" else f"{row.strength:g}"
        near = " ".join(map(str, row.neighbours.rows[0].tolist()))
        print(
            f"{strength:>9} {kept:>6.2f} {told.norm_share:>6.2f} {cells[0]:>7} {cells[1]:>7} {cells[2]:>5} "
            f"{told.latents_changed:>8.2f}  {near}"
        )
    print(
        "kept: share of the neighbours before the edit. norm: |x' - x| / |x|. target: its probability, after - before."
    )
    print(
        "others: drift between the other classes, 0 to 1. top: images of another first class. latents: others changed."
    )


def _label(edit: Edit, names: dict[int, str] | None) -> str:
    return ", ".join(f"{(names or {}).get(latent, 'latent')} ({latent})" for latent in edit.latents)
