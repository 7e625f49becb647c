"""Draw a run's latents as one PNG: python scripts/latents_picture.py RUN CODER OUT.png

A row a latent, its top pictures; patches where the latent is silent are dark. Where `vitrail recover` has told what
each latent stands for, the best of each family of concepts by patch IoU; else those that the report chooses for the
purity of their top pictures.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.backbones.preprocess import Preprocess
from vitrail.codes import CodeStore
from vitrail.images import open_images
from vitrail.index import Index
from vitrail.store import Store
from vitrail.studies.report import SHADE, Indexed, choose_latents, shade
from vitrail.studies.truth_concepts import is_recovered, read_concepts

TILE, GAP, LABEL = 96, 6, 150


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    run, name, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    store = Store.open(run / "store")
    one = Indexed(name, store, CodeStore.open(run / "codes" / name), Index.open(run / "index" / name))
    images, table = open_images(store.manifest.request["images"]), store.images()
    preprocess = Preprocess.from_json(store.manifest.request["preprocess"])
    recovered = run / "recovery" / name
    concepts = read_concepts(recovered)[1] if (recovered / "concepts.json").is_file() else {}
    chosen = [latent for latent, why in choose_latents(one, table, 12, 0)[0] if why.startswith("chosen")]
    if concepts:
        chosen = best_of_families(concepts)
    n_pictures = 8
    sheet = Image.new("RGB", (LABEL + n_pictures * (TILE + GAP), len(chosen) * (TILE + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for line, latent in enumerate(chosen):
        top = one.index.top_images(latent)
        names = [str(table["class_name"][row]) for row in top["image"]]
        commonest = max(set(names), key=names.count)
        words = f"latent {latent}\n{commonest}\n{names.count(commonest)} of its top {len(names)}"
        if latent in concepts:
            found = concepts[latent]
            words = f"latent {latent}\n{found['concept']}\nF1 {found['f1']:.2f}, patch IoU {found['patch']['iou']:.2f}"
        y = line * (TILE + GAP)
        draw.multiline_text((4, y + 22), words, "black", font, spacing=4)
        for place in range(n_pictures):
            row = int(top["image"][place])
            picture = preprocess.crop(images.load(int(table["position"][row])))
            x = LABEL + place * (TILE + GAP)
            sheet.paste(overlaid(picture, one.codes.patch_map(row, latent).numpy(), float(top["value"][0])), (x, y))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)


def best_of_families(concepts: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """The latent with the largest patch IoU of each family, of those that recover a concept."""
    best: dict[str, int] = {}
    for latent, row in concepts.items():
        if is_recovered(row) and "patch" in row:
            family = row["concept"].partition(":")[0]
            if family not in best or row["patch"]["iou"] > concepts[best[family]]["patch"]["iou"]:
                best[family] = latent
    return sorted(best.values(), key=lambda latent: -concepts[latent]["patch"]["iou"])


def overlaid(picture: Image.Image, patches: np.ndarray, scale: float) -> Image.Image:
    big = picture.resize((TILE, TILE), Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.LANCZOS)
    dark = np.round(255 * shade(patches, scale)).astype(np.uint8)
    alpha = Image.fromarray(dark).resize((TILE, TILE), Image.Resampling.NEAREST)
    big.paste(Image.new("RGB", big.size, SHADE), (0, 0), alpha)
    return big


if __name__ == "__main__":
    main()
