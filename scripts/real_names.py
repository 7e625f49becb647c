"""Names of real latents, tried on pictures and masks they have not met: what docs/real-names.md reports.

    python scripts/real_names.py OUT STUDY [deit] [dinov2] [clip] [clip-8] ...

STUDY is the folder of scripts/real_study.py's study: its coders (BatchTopK, 4x, k 64, of blocks.11 and blocks.8) and
its stores of Tiny-ImageNet and COCO. Reads $VITRAIL_SHARED/data besides (default ../shared). A model and layer whose
file is in OUT is not done again.

    OUT/stores/          imagenet_1000's activations (of CLIP the first 448: four minutes)
    OUT/clip-11.json     every design: counts, held-out detection, checks against masks and classes, names
    OUT/clip-11-DESIGN-METHOD.csv    the checks, latent by latent
    OUT/names.md         the tables        OUT/real_names_*.png      the pictures

Sets of pictures, none of which a coder was trained on: `small`, 2,750 of Tiny-ImageNet (200 classes of 8 to 22);
`photographs`, imagenet_1000 (one of each class); `scenes`, 200 of COCO with masks. What finds a name never tries it.
"""

import csv
import json
import os
import sys
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from real_first_look import SHARED
from vitrail.backbones import Backbone, load
from vitrail.backbones.preprocess import Preprocess
from vitrail.coders import SparseCoder, load_coder, make_coder
from vitrail.coders.sparse import Codes
from vitrail.concepts.detection import firing, largest
from vitrail.concepts.effect import effect
from vitrail.concepts.mask_check import Masked, write_mask_checks
from vitrail.concepts.masks import truth_of_labels, truth_of_masks
from vitrail.concepts.naming import Named, decoder_text, labels, top_images
from vitrail.concepts.pictures import Pictures
from vitrail.concepts.study import NamingOptions, summary_of, tried
from vitrail.concepts.vocabulary import Vocabulary, class_vocabulary, stored_vocabulary
from vitrail.files import write_json
from vitrail.images import open_images
from vitrail.images.loader import load_batches
from vitrail.metrics.hierarchies import imagenet_groups
from vitrail.metrics.truth import Firing
from vitrail.progress import Terminal
from vitrail.store import Store, extract
from vitrail.training import TrainConfig, train

LAYERS = {"11": "blocks.11.hook_resid_post", "8": "blocks.8.hook_resid_post"}
EMBED = "hook_image_embed"
CODER = "batch_topk-4x-k64"
OPTIONS = NamingOptions(above=0.5, n_bootstrap=300)
N_EFFECT = {"clip": 150, "deit": 100}
N_PHOTOGRAPHS = {"clip": 448}  # half a second of a core each; the first of a random order
N_SMALL = {"clip": 1280}  # rows to encode
N_LATENTS = {"deit": 256, "dinov2": 256}  # drawn at random: every class is held against every latent
MIN_GROUP = 8  # classes, and so photographs


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, study, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or ["deit", "dinov2", "clip"]
    if not SHARED.is_dir() or not (study / "plan.json").is_file():
        sys.exit(f"{SHARED} or {study}/plan.json is not here: set VITRAIL_SHARED, and run scripts/real_study.py first.")
    for model in dict.fromkeys(one.partition("-")[0] for one in wanted):
        cells = [(layer, CODER, f"{model}-{layer}") for layer in LAYERS]
        if model == "clip":
            cells.append(("embed", "", "clip-embed"))
        for layer, coder, name in cells:
            if (model in wanted or name in wanted) and not (out / f"{name}.json").is_file():
                write_json(out / f"{name}.json", _plain(Cell(out, study, model, layer, coder, name).found()))
                print(f"{out / name}.json", flush=True)
    from real_names_report import write_report

    write_report(out)


class Cell:
    """A model's layer with its coder, and the three sets of pictures through both."""

    def __init__(self, out: Path, study: Path, model: str, layer: str, coder: str, name: str) -> None:
        self.out, self.study, self.model, self.layer, self.name = out, study, model, layer, name
        # One row a picture at k 16 of 1,024: a latent fires in few pictures as it is.
        self.options = replace(OPTIONS, above=0.0) if layer == "embed" else OPTIONS
        plan = json.loads((study / "plan.json").read_text())
        about = next(one for one in plan["backbones"] if one["label"] == model)
        weights = None if about["weights"] is None else Path(about["weights"])
        self.backbone: Backbone = load(about["name"], weights=weights, image_px=about["image_px"])
        self.stores = self._stores(plan)
        embed = self._embeddings()
        if layer == "embed":
            self.point, self.coder = EMBED, small_coder(self.stores["small"], out / "clip-embed-coder")
        else:
            self.point = LAYERS[layer]
            folder = study / "cells" / (model if layer == "11" else f"{model}-8") / coder / "seed0" / "coder"
            self.coder = load_coder(folder).eval()
        self.classes, self.small_labels, self.photograph_labels, self.wnids = _labels(self.stores)
        self.small = self._pictures("small", embed["small"], self.small_labels, self.classes)
        self.photographs = self._pictures("photographs", embed["photographs"], self.photograph_labels, self.classes)
        embed = {which: normalize(x, dim=1) for which, x in embed.items()}
        # Tiny-ImageNet's pictures are ImageNet's made small: a photograph may be among them.
        alike = (embed["photographs"] @ embed["small"].t()).max(1).values
        self.twins = int((alike > 0.97).sum())
        new = np.flatnonzero((alike <= 0.97).numpy())
        self.photographs, self.wnids = self.photographs.select(new), [self.wnids[at] for at in new]
        self.said: dict[str, Any] = {}

    def found(self) -> dict[str, Any]:
        """Every design that this model allows."""
        words = self.words()
        if words is not None:
            self.by_words(words)
        if self.model not in N_PHOTOGRAPHS:
            self.by_classes()
            self.by_groups()
        return {
            "model": self.model,
            "point": self.point,
            "n": {"small": self.small.n, "photographs": self.photographs.n, "twins left out": self.twins},
            "d_sae": self.coder.d_sae,
            "above": self.options.above,
            "designs": self.said,
        }

    # -- designs

    def words(self) -> Vocabulary | None:
        """CLIP: the 80 words of COCO. DeiT: its classes, each with its row of the head. DINOv2 has no words."""
        if self.model == "clip":
            rows = SHARED / "vocabulary/clip_vit_b16_coco80_text_embeddings.npy"
            listed = json.loads((SHARED / "vocabulary/clip_vit_b16_coco80_names.json").read_text())
            return stored_vocabulary(listed, rows, source="80 words of COCO", d_embed=512)
        if self.model == "deit":
            linear = [one for one in self.backbone.modules() if isinstance(one, torch.nn.Linear)]
            head = next(one for one in linear if one.out_features == self.backbone.n_classes)
            rows = normalize(head.weight.detach().float(), dim=1).numpy()
            keys = _unique(self.backbone.class_names)
            return stored_vocabulary(keys, rows, source="the head's classes", d_embed=rows.shape[1])
        return None

    def by_words(self, words: Vocabulary) -> None:
        """Named on `small`, tried on `photographs`, and where words are COCO's on the masks of `scenes`."""
        named: dict[str, Named] = {}
        if self.layer == "embed":
            named["decoder_text"] = decoder_text(self.coder, words)
        else:
            named["top_images"] = top_images(self.small.codes, self.small.embeddings, words, n_top=self.options.n_top)
        if self.layer == "8":
            named["effect"] = self.effects(words)
        rows = self._tried(named, self.small, self.photographs, words)
        masked = self._masks(words) if self.layer != "embed" else None
        self._say("words", rows, masked)
        if self.model == "clip" and self.layer in LAYERS:
            naming, trying = self.photographs.halves(seed=0)
            again = {"top_images": top_images(naming.codes, naming.embeddings, words, n_top=self.options.n_top)}
            self._say("words, half of photographs", self._tried(again, naming, trying, words), masked)

    def by_classes(self) -> None:
        """200 classes: named on half of `small`, tried on the other; and detection on `photographs` as well."""
        naming, trying = self.small.halves(seed=0)
        centred = normalize(naming.embeddings - naming.embeddings.mean(0), dim=1)
        words = class_vocabulary(centred, naming.labels, self.classes)
        named = self._by_labels(naming, words)
        rows = self._tried(named, naming, trying, words)
        self._say("classes", rows, _of_labels(trying))
        self._say("classes, tried on photographs", self._tried(named, naming, self.photographs, words), None)

    def by_groups(self) -> None:
        """Groups of classes by WordNet: a single class of `photographs` has one picture, and nothing to hold out."""
        place, names = groups_of(self.wnids)
        pictures = _relabelled(self.photographs, place, names)
        naming, trying = pictures.halves(seed=0)
        centred = normalize(naming.embeddings - naming.embeddings.mean(0), dim=1)
        words = class_vocabulary(centred, naming.labels, names)
        rows = self._tried(self._by_labels(naming, words), naming, trying, words)
        self._say("groups", rows, _of_labels(trying))

    def effects(self, words: Vocabulary) -> Named:
        """Of some latents drawn at random from those that fire: one run of the blocks above for each."""
        live = np.flatnonzero((largest(self.small.codes) > 0) & (largest(self.photographs.codes) > 0))
        some = np.sort(np.random.default_rng(0).permutation(live)[: N_EFFECT[self.model]])
        images = open_images(f"{SHARED}/imagenet_1000/labels.csv")
        at = np.random.default_rng(1).permutation(len(images))[:2].tolist()
        shown = next(load_batches(images, at, self.backbone.preprocess, batch_size=2)).images
        by_head = bool(self.backbone.n_classes and self.backbone.class_names)
        found = effect(
            self.backbone,
            self.coder,
            shown,
            self.point,
            "spatial",
            some,
            None if by_head else words,
            highest=largest(self.small.codes),
            progress=Terminal(),
        )
        if not by_head:
            return found
        short = dict(zip(self.backbone.class_names, words.words, strict=True))
        names, seconds = (tuple(short[one] for one in those) for those in (found.names, found.runners_up))
        return replace(found, names=names, runners_up=seconds)

    # -- what designs share

    def _by_labels(self, naming: Pictures, words: Vocabulary) -> dict[str, Named]:
        limit = self.options.above * largest(naming.codes)
        return {
            "labels": labels(firing(naming.codes, limit), naming.labels, naming.classes),
            "top_images": top_images(naming.codes, naming.embeddings, words, n_top=self.options.n_top),
        }

    def _tried(self, named: dict[str, Named], naming: Pictures, trying: Pictures, words: Vocabulary) -> list[Any]:
        limit = self.options.above * largest(naming.codes)
        if words.source == "classes of the pictures":  # rows less a mean ask for pictures less a mean
            naming, trying = (
                _with_embeddings(one, normalize(one.embeddings - one.embeddings.mean(0), dim=1))
                for one in (naming, trying)
            )
        fires = firing(trying.codes, limit).fired().numpy() / trying.n
        return tried(named, trying, words, self.backbone, limit, self.options, fires, naming=naming)

    def _say(self, design: str, rows: list[Any], masked: Masked | None) -> None:
        said: dict[str, Any] = {}
        for method in dict.fromkeys(row.method for row in rows):
            mine = [row for row in rows if row.method == method]
            said[method] = summary_of(mine) | {"names": len(mine), "different": len({row.name for row in mine})}
            aucs = [(r.detection_auc, r.detection_low, r.detection_high, r.detection_random, r.valid) for r in mine]
            said[method]["detections"] = [one for one in aucs if one[0] is not None]
            if masked is not None:
                checks = masked.check(mine, n_bootstrap=self.options.n_bootstrap)
                of = {row.latent: {"valid": row.valid, "detection_auc": row.detection_auc} for row in mine}
                said[method] |= {
                    "check": checks.summary(),
                    "check_of_valid": checks.only({row.latent for row in mine if row.valid}).summary(),
                    "checked": [asdict(one) | of[one.latent] for one in checks.measured],
                }
                slug = f"{self.name}-{design}-{method}".replace(",", "").replace(" ", "_")
                write_mask_checks(self.out / f"{slug}.csv", checks.measured)
        self.said[design] = said
        print(
            self.name, design, {m: {k: v for k, v in one.items() if k in BRIEF} for m, one in said.items()}, flush=True
        )

    def _masks(self, words: Vocabulary) -> Masked:
        """COCO's patches: codes, and what they show."""
        store = self.stores["scenes"]
        codes = Codes.cat([self._codes(x) for _, x in store.image_batches(self.point, "spatial", n_images=64)])
        ids = store.images()["id"][: store.n_images].tolist()
        preprocess = Preprocess.from_json(store.manifest.request["preprocess"])
        truth = truth_of_masks(ids, SHARED / "coco_masks/masks", preprocess, store.manifest.grid)
        return Masked(codes, truth, among=words.words)

    @torch.inference_mode()
    def _codes(self, x: Float[Tensor, "n t d"]) -> Codes:
        return self.coder.encode_sparse(x.flatten(0, 1).float())

    def _pictures(self, which: str, embeddings: Tensor, label: np.ndarray, classes: tuple[str, ...]) -> Pictures:
        store = self.stores[which]
        if self.layer == "embed":
            codes = self._codes(embeddings[:, None])
        else:
            most = N_SMALL.get(self.model, store.n_images) if which == "small" else store.n_images
            batches = store.image_batches(self.point, "spatial", n_images=64)
            few = (x for _, x in takewhile(lambda one: one[0] + len(one[1]) <= most, batches))
            codes = Codes.cat([Firing.of_codes(self._codes(x), x.shape[1], slice(None)).images for x in few])
        if self.model in N_LATENTS:
            drawn = torch.zeros(codes.d_sae, dtype=torch.bool)
            order = np.random.default_rng(0).permutation(codes.d_sae)[: N_LATENTS[self.model]]
            drawn[torch.from_numpy(order)] = True
            codes = codes.keep(drawn[codes.indices.long()])
        n = codes.n
        ids = tuple(store.images()["id"][:n].tolist())
        return Pictures(
            normalize(embeddings[:n], dim=1), codes, label[:n], classes, (None,) * n, ids, np.arange(n), None
        )

    def _embeddings(self) -> dict[str, Float[Tensor, "n d_embed"]]:
        """Of each picture as the model gives it, in the order of the store of each set."""
        out = {}
        for which, store in (("small", self.stores["small embeddings"]), ("photographs", self.stores["photographs"])):
            out[which] = torch.cat([x for _, x in store.image_batches(EMBED, "pooled")])[:, 0].float()
        of = {one: at for at, one in enumerate(self.stores["small embeddings"].images()["id"].tolist())}
        wanted = self.stores["small"].images()["id"][: self.stores["small"].n_images].tolist()
        out["small"] = out["small"][[of[one] for one in wanted]]
        return out

    def _stores(self, plan: dict[str, Any]) -> dict[str, Store]:
        folder = next(self.study.glob(f"stores/{self.model}-*"))
        small = Store.open(folder / "test")
        mine = self.out / "stores" / self.model
        images = open_images(f"{SHARED}/imagenet_1000/labels.csv")
        points = [*LAYERS.values(), EMBED]
        photographs = extract(
            self.backbone,
            images,
            points,
            mine / "photographs",
            tokens="spatial",
            limit=N_PHOTOGRAPHS.get(self.model),
            progress=Terminal(),
        )
        embeddings = small
        if EMBED not in small.points:
            source = open_images(plan["images"]["test"])
            embeddings = extract(self.backbone, source, [EMBED], mine / "small", tokens="spatial", progress=Terminal())
        return {
            "small": small,
            "small embeddings": embeddings,
            "photographs": photographs,
            "scenes": Store.open(folder / "scenes"),
        }


BRIEF = ("names", "different", "detection_measured", "detection_auc", "detection_random", "valid", "check")


def small_coder(store: Store, out: Path) -> SparseCoder:
    """TopK on the image embeddings at hand, 2,750 of them: few."""
    width = store.manifest.points[EMBED].d_in
    coder = make_coder("topk", d_in=width, d_sae=1024, k=16, normalization="mean_std")
    config = TrainConfig(epochs=150, lr=1e-3, warmup_steps=50, dead_window_rows=20_000)
    reader = store.reader(EMBED, batch_size=256)
    return train(coder, reader, out, config=config, metadata={"point": EMBED, "tokens": "pooled"}).coder.eval()


def groups_of(wnids: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of each picture its group, -1 where it has none: the largest groups first, each class in one, none too small."""
    known = list(dict.fromkeys(wnids))
    groups: dict[str, tuple[int, ...]] = {}
    for depth in (1, 2):
        groups |= {f"{key}/{depth}": those for key, those in imagenet_groups(known, depth=depth).items()}
    taken: dict[int, int] = {}
    names: list[str] = []
    for key, those in sorted(groups.items(), key=lambda one: (-len(one[1]), one[0])):
        free = [one for one in those if one not in taken]
        name = key.split()[0].replace("_", " ")
        if len(free) >= MIN_GROUP and name not in names:
            taken |= dict.fromkeys(free, len(names))
            names.append(name)
    return np.array([taken.get(known.index(wnid), -1) for wnid in wnids]), tuple(names)


def _labels(stores: dict[str, Store]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, list[str]]:
    """Tiny-ImageNet's classes; which of them each picture of both sets shows, -1 for none; wnids of photographs."""
    listed = sorted(json.loads((SHARED / "tiny_imagenet/classes.json").read_text()), key=lambda one: one["label"])
    of_wnid = {one["wnid"]: one["label"] for one in listed}
    with (SHARED / "imagenet_1000/labels.csv").open() as stream:
        wnid_of = {row["file"]: row["wnid"] for row in csv.DictReader(stream)}
    small, photographs = stores["small"], stores["photographs"]
    wnids = [wnid_of[one] for one in photographs.images()["id"][: photographs.n_images].tolist()]
    own = small.images()["label"][: small.n_images].astype(int)
    return (
        tuple(one["name"] for one in listed),
        own,
        np.array([of_wnid.get(wnid, -1) for wnid in wnids]),
        wnids,
    )


def _plain(value: Any) -> Any:
    """NaN as None, all the way down: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def _of_labels(pictures: Pictures) -> Masked:
    """Pictures with a class each, as patches of their own."""
    return Masked(pictures.codes, truth_of_labels(pictures.labels, pictures.classes), min_patches=3)


def _relabelled(pictures: Pictures, label: np.ndarray, classes: tuple[str, ...]) -> Pictures:
    return replace(pictures, labels=label, classes=classes)


def _with_embeddings(pictures: Pictures, embeddings: Tensor) -> Pictures:
    return replace(pictures, embeddings=embeddings)


def _unique(names: Any) -> tuple[str, ...]:
    """First names of classes; the whole, where two classes share the first."""
    short = [name.split(",")[0] for name in names]
    return tuple(f"{first} ({at})" if short.count(first) > 1 else first for at, first in enumerate(short))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
