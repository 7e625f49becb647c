"""The stronger control of a backbone that has learnt nothing: coders trained on its activations.

Each is what its coder would have become there: the same architecture, size, starting weights, training images, batches
and steps, on the activations of the same model with random weights (`prisma_controls.RandomWeights`). What it reaches
is what any activations of this architecture give a coder that is fitted to them.

    FOLDER/coder-<digest>     such a coder, kept; FOLDER/store-<digest> its activations, removed once it is trained
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.backbones.base import Backbone
from vitrail.coders import SparseCoder, load_coder, make_coder
from vitrail.files import json_digest, tensors_digest
from vitrail.images import ImageSource, open_images
from vitrail.progress import SILENT, Progress
from vitrail.provenance import VERSION
from vitrail.store import Store, extract
from vitrail.store.joined import JoinedSource, Part
from vitrail.studies.prisma_controls import RandomWeights
from vitrail.training import Source, TrainConfig, train


class RandomCoders(dict[str, str]):
    """By the name of the coder they stand beside the digests of coders trained on a random backbone; `coders` are these
    coders themselves. As a mapping it is JSON: what a table was asked.
    """

    def __init__(self, coders: Mapping[str, SparseCoder], *, seed: int) -> None:
        super().__init__({name: tensors_digest(coder.state_dict()) for name, coder in coders.items()})
        self.coders, self.seed = dict(coders), seed


@dataclass(frozen=True)
class Recipe:
    """How a coder was trained, as its folder tells it."""

    architecture: str
    arguments: dict[str, Any]
    config: TrainConfig
    batch_size: int
    images: ImageSource
    extraction: dict[str, Any]  # options of `extract`, the points among them
    parts: tuple[tuple[str, str], ...]  # (point, kind of tokens) of what a row is made of
    train_images: tuple[int, int] | None

    def digest(self, weights: str) -> str:
        return json_digest(
            {
                "coder": [self.architecture, self.arguments],
                "config": {k: v for k, v in vars(self.config).items() if k not in ("checkpoint_every", "watch")},
                "rows": [self.images.fingerprint(), self.extraction, self.parts, self.batch_size, self.train_images],
                "weights": weights,
                "vitrail": VERSION,
            }
        )


def train_on_random(
    backbone: Backbone,
    coders: Mapping[str, tuple[Path, Mapping[str, Any]]],
    folder: Path,
    *,
    store: Path | None = None,
    seed: int = 0,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> RandomCoders:
    """For each coder (its folder, and what this says of its training) one trained on the random backbone.

    `store`: where the training images are told, instead of the store that a coder names. Goes on where it was when
    killed; what was trained before is read back. Raises ValueError where it is not known how a coder was trained, or
    its images are no longer there.
    """
    recipes = {name: recipe_of(name, path, about, store) for name, (path, about) in coders.items()}
    weights = RandomWeights.of(backbone, seed=seed)
    digest = weights.to_json()["digest"]
    found: dict[str, SparseCoder] = {}
    stores: set[Path] = set()
    device = next(backbone.parameters()).device
    for name, recipe in recipes.items():
        at = folder / f"store-{json_digest([recipe.images.fingerprint(), recipe.extraction, digest])[:16]}"
        stores.add(at)
        out = folder / f"coder-{recipe.digest(digest)[:16]}"
        if not (out / "coder.json").is_file():
            with weights.within(backbone):
                rows = extract(
                    backbone, recipe.images, out=at, n_workers=n_workers, progress=progress, **recipe.extraction
                )
            coder = make_coder(recipe.architecture, **recipe.arguments).to(device)
            source, held_out = sources(rows, recipe)
            said = {"random_backbone": weights.to_json(), "beside": name, "parts": recipe.parts}
            train(coder, source, out, config=recipe.config, held_out=held_out, metadata=said, progress=progress)
        found[name] = load_coder(out, device=device)
    for at in stores:
        shutil.rmtree(at, ignore_errors=True)
    return RandomCoders(found, seed=seed)


def sources(store: Store, recipe: Recipe) -> tuple[Source, Source | None]:
    """Rows to train on, and those held out, as `vitrail train` reads them."""

    def read(images: tuple[int, int]) -> Source:
        options: dict[str, Any] = {"batch_size": recipe.batch_size, "images": images}
        if len(recipe.parts) == 1:
            ((point, kind),) = recipe.parts
            return store.reader(point, tokens=kind, **options)
        return JoinedSource([Part(store, point, kind) for point, kind in recipe.parts], **options)

    first, last = recipe.train_images or (0, store.n_images)
    return read((first, last)), read((last, store.n_images)) if last < store.n_images else None


def recipe_of(name: str, path: Path, about: Mapping[str, Any], store: Path | None) -> Recipe:
    """Raises ValueError, saying what is missing."""
    instead = "Use --random-backbone encode, which needs no training."
    if "training" not in about or not ("store" in about or store):
        raise ValueError(f"{path} does not say how {name} was trained, so no like of it can be. {instead}")
    if "mixed_with" in about:
        raise ValueError(f"{name} was trained on rows of several stores, which cannot be had again here. {instead}")
    of_parts: Sequence[Mapping[str, Any]] = about.get("parts", (about,))
    if len({part["store"] for part in of_parts}) > 1:
        raise ValueError(f"{name} reads points of several stores; here all are of one backbone's. {instead}")
    where = store or Path(about["store"])
    try:
        request = Store.open(where).manifest.request
        images = open_images(request["images"])
        fingerprint = images.fingerprint()
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(
            f"the training data of {name} cannot be found: {error} It was trained on {about['store']}. Say with "
            f"--store where this now is; its images must be there too. {instead}"
        ) from error
    if fingerprint != request["images_fingerprint"]:
        raise ValueError(f"{images.spec} holds other images than {where} was made of. {instead}")
    asked = about["training"]["request"]
    parts = tuple((part["point"], part["tokens"]) for part in of_parts)
    kinds = {kind for _, kind in parts}
    extraction = {key: request[key] for key in ("dtype", "batch_size", "limit", "seed")}
    extraction["points"] = list(dict.fromkeys(point for point, _ in parts))
    extraction["tokens"] = kinds.pop() if kinds in ({"cls"}, {"spatial"}) else request["tokens"]
    return Recipe(
        architecture=asked["architecture"],
        arguments=dict(asked["coder"]),
        config=config_of(about["training"]),
        batch_size=batch_size_of(path, about["training"]),
        images=images,
        extraction=extraction,
        parts=parts,
        train_images=tuple(about["train_images"]) if "train_images" in about else None,
    )


def config_of(training: Mapping[str, Any]) -> TrainConfig:
    """As it was, shown nowhere but in its log."""
    asked = training["request"]["config"]
    return TrainConfig(**{**asked, "betas": tuple(asked["betas"]), "watch": ()})


def batch_size_of(path: Path, training: Mapping[str, Any]) -> int:
    """Rows of the first step, which the log tells; without a log, of the mean step."""
    log = path / "log.jsonl"
    if log.is_file():
        with log.open(encoding="utf-8") as lines:
            for line in lines:
                told = json.loads(line)
                if told.get("step") == 1:
                    return int(told["rows"])
    return max(1, round(training["rows"] / training["steps"]))
