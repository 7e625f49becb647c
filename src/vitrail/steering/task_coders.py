"""Coders of a task's own pictures, with the augmentations that the paper names.

    rotation    -20, -10, 10 or 20 degrees          edge crop   5 to 15 % of each side
    contrast    a factor of 1.1 to 1.3              flip        left and right

A copy takes each of the four with probability 1/2, one at least; the pictures as they are come first. What a copy gets
depends on the seed, the picture's id and the copy's number alone. How the paper combines them, and how many copies it
makes, is not said.

"Steering CLIP's vision transformer with sparse autoencoders", section 10.1: TopK of 64 or 128, expansion 64, two epochs
on CelebA or on augmented Waterbirds. `flip` moves what is left and right in a text or a class; leave it out there.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vitrail.backbones.base import Backbone
from vitrail.coders import SparseCoder, load_coder, make_coder
from vitrail.files import json_digest
from vitrail.images.base import ImageRecord, ImageSource
from vitrail.progress import SILENT, Progress
from vitrail.store import Store, extract
from vitrail.training import TrainConfig, train

ANGLES = (-20, -10, 10, 20)
CROP, CONTRAST = (0.05, 0.15), (1.1, 1.3)
KINDS = ("rotation", "crop", "contrast", "flip")


class AugmentedImages(ImageSource):
    """The pictures of `whole`, then `copies` of each, all of the first copy before any of the second."""

    def __init__(self, whole: ImageSource, *, copies: int = 1, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> None:
        if copies < 0:
            raise ValueError(f"copies must be at least 0, got {copies}.")
        if unknown := [one for one in kinds if one not in KINDS]:
            raise ValueError(f"augmentations are {', '.join(KINDS)}, got {unknown[0]!r}.")
        if copies and not kinds:
            raise ValueError("copies without an augmentation would be the pictures themselves: name at least one.")
        self.whole, self.copies, self.kinds, self.seed = whole, copies, kinds, seed
        self.classes = whole.classes

    @property
    def spec(self) -> str:
        """Says what it is; `open_images` does not open it."""
        return f"augmented:{self.copies},{'+'.join(self.kinds)},{self.seed}:{self.whole.spec}"

    def __len__(self) -> int:
        return len(self.whole) * (1 + self.copies)

    def record(self, i: int) -> ImageRecord:
        record, copy = self.whole.record(self._check(i) % len(self.whole)), i // len(self.whole)
        if copy == 0:
            return record
        own = (record.label, record.class_name, record.caption, record.split)
        return ImageRecord(f"{record.id}~{copy}", record.uri, *own)

    def load(self, i: int) -> Image.Image:
        at, copy = self._check(i) % len(self.whole), i // len(self.whole)
        picture = self.whole.load(at)
        if copy == 0:
            return picture
        return augmented(picture, drawn(self.whole.record(at).id, copy, self.kinds, self.seed))

    def size_bytes(self, i: int) -> int:
        return self.whole.size_bytes(self._check(i) % len(self.whole))

    def fingerprint(self) -> str:
        own = {"copies": self.copies, "kinds": list(self.kinds), "seed": self.seed}
        return json_digest({"augmented": self.whole.fingerprint(), **own})


def drawn(image_id: str, copy: int, kinds: tuple[str, ...] = KINDS, seed: int = 0) -> dict[str, float]:
    """What a copy gets: degrees, the share of each side that is cut, the factor, 1 for flipped."""
    digest = hashlib.sha256(f"{seed}/{copy}/{image_id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8]))
    taken, always = rng.random(len(KINDS)) < 0.5, rng.integers(len(kinds))
    values = {
        "rotation": float(rng.choice(ANGLES)),
        "crop": float(rng.uniform(*CROP)),
        "contrast": float(rng.uniform(*CONTRAST)),
        "flip": 1.0,
    }
    return {one: values[one] for one, take in zip(KINDS, taken, strict=True) if one in kinds and take} or {
        kinds[always]: values[kinds[always]]
    }


def augmented(picture: Image.Image, what: Mapping[str, float]) -> Image.Image:
    """Of the same size. A rotation shows the picture's own border repeated where it would show nothing."""
    wide, high = picture.size
    if angle := what.get("rotation"):
        border = max(wide, high) // 2
        rows = np.pad(np.asarray(picture), ((border, border), (border, border), (0, 0)), mode="edge")
        turned = Image.fromarray(rows).rotate(angle, Image.Resampling.BILINEAR)
        picture = turned.crop((border, border, border + wide, border + high))
    if share := what.get("crop"):
        inner = (share * wide, share * high, (1 - share) * wide, (1 - share) * high)
        picture = picture.resize((wide, high), Image.Resampling.BICUBIC, box=inner)
    if factor := what.get("contrast"):
        picture = ImageEnhance.Contrast(picture).enhance(factor)
    return ImageOps.mirror(picture) if what.get("flip") else picture


def train_task_coder(
    backbone: Backbone,
    images: ImageSource,
    out: str | Path,
    *,
    point: str,
    tokens: str = "all",
    copies: int = 1,
    kinds: tuple[str, ...] = KINDS,
    d_sae: int | None = None,
    k: int = 64,
    config: TrainConfig | None = None,
    batch_rows: int = 4096,
    batch_size: int = 64,
    n_workers: int = 0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> SparseCoder:
    """OUT/store and OUT/coder: what is there is not made again. `d_sae` None: 64 times the width, as in the paper; its
    recipe (Adam, cosine, 200 steps of warmup, 2 epochs, batches of 4096) where `config` is None."""
    out = Path(out)
    store = extract(
        backbone,
        AugmentedImages(images, copies=copies, kinds=kinds, seed=seed),
        [point],
        out / "store",
        tokens=tokens,
        batch_size=batch_size,
        seed=seed,
        n_workers=n_workers,
        progress=progress,
    )
    return train_on(
        store,
        out / "coder",
        point=point,
        tokens=tokens,
        d_sae=d_sae,
        k=k,
        config=config,
        batch_rows=batch_rows,
        seed=seed,
        progress=progress,
    )


def train_on(
    store: Store,
    folder: Path,
    *,
    point: str,
    tokens: str,
    d_sae: int | None = None,
    k: int = 64,
    config: TrainConfig | None = None,
    batch_rows: int = 4096,
    seed: int = 0,
    progress: Progress = SILENT,
) -> SparseCoder:
    """A coder of a store that is there. What is in `folder` is not trained again."""
    if (folder / "weights.safetensors").is_file():
        return load_coder(folder).eval()
    source = store.reader(point, batch_size=batch_rows, seed=seed)
    coder = make_coder("topk", d_in=source.d_in, d_sae=64 * source.d_in if d_sae is None else d_sae, k=k, seed=seed)
    chosen = config or TrainConfig(epochs=2, lr=1e-3, warmup_steps=200, schedule="cosine", revive="ghost", seed=seed)
    request = store.manifest.request
    kept = ("backbone", "backbone_digest", "images", "images_fingerprint", "preprocess")
    about: dict[str, Any] = {"point": point, "tokens": store.kind(point, None if tokens == "all" else tokens)}
    about |= {
        "store": str(store.path.resolve()),
        "store_digest": store.digest,
        **{name: request[name] for name in kept},
    }
    return train(coder, source, folder, config=chosen, metadata=about, progress=progress).coder.eval()
