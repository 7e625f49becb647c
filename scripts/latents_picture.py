"""Draw a run's latents as one PNG: python scripts/latents_picture.py RUN CODER OUT.png

A row a latent, its top pictures; patches where the latent is silent are dark. Latents are those that the report chooses
for the purity of their top pictures.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.backbones.preprocess import Preprocess
from vitrail.codes import CodeStore
from vitrail.images import open_images
from vitrail.index import Index
from vitrail.store import Store
from vitrail.studies.report import SHADE, Indexed, choose_latents, shade

TILE, GAP, LABEL = 96, 6, 150


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    run, name, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    store = Store.open(run / "store")
    one = Indexed(name, store, CodeStore.open(run / "codes" / name), Index.open(run / "index" / name))
    images, table = open_images(store.manifest.request["images"]), store.images()
    preprocess = Preprocess.from_json(store.manifest.request["preprocess"])
    chosen = [latent for latent, why in choose_latents(one, table, 12, 0)[0] if why.startswith("chosen")]
    n_pictures = 8
    sheet = Image.new("RGB", (LABEL + n_pictures * (TILE + GAP), len(chosen) * (TILE + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for line, latent in enumerate(chosen):
        top = one.index.top_images(latent)
        names = [str(table["class_name"][row]) for row in top["image"]]
        commonest = max(set(names), key=names.count)
        words = f"latent {latent}\n{commonest}\n{names.count(commonest)} of its top {len(names)}"
        y = line * (TILE + GAP)
        draw.multiline_text((4, y + 22), words, "black", font, spacing=4)
        for place in range(n_pictures):
            row = int(top["image"][place])
            picture = preprocess.crop(images.load(int(table["position"][row])))
            x = LABEL + place * (TILE + GAP)
            sheet.paste(overlaid(picture, one.codes.patch_map(row, latent).numpy(), float(top["value"][0])), (x, y))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(192).save(out, optimize=True)


def overlaid(picture: Image.Image, patches: np.ndarray, scale: float) -> Image.Image:
    big = picture.resize((TILE, TILE), Image.Resampling.NEAREST if picture.width < TILE else Image.Resampling.LANCZOS)
    dark = np.round(255 * shade(patches, scale)).astype(np.uint8)
    alpha = Image.fromarray(dark).resize((TILE, TILE), Image.Resampling.NEAREST)
    big.paste(Image.new("RGB", big.size, SHADE), (0, 0), alpha)
    return big


if __name__ == "__main__":
    main()
