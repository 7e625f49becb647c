"""The main job on real photographs and real pretrained weights: what docs/first-look.md reports.

    python scripts/real_first_look.py OUT [deit] [dinov2] [clip]

Reads $VITRAIL_SHARED/data (default ../shared): DeiT-Tiny with its ImageNet head on 1,000 photographs, DINOv2-S with
registers on textures, and the image tower of OpenAI's CLIP ViT-B/16, zero-shot over 80 words on COCO pictures. Nothing
of it ships with vitrail.
"""

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitrail.backbones import Backbone, load
from vitrail.cli.options import pick_workers
from vitrail.images import open_images
from vitrail.metrics.heads import Head, ZeroShotHead, fit_linear_head, own_head
from vitrail.progress import Terminal
from vitrail.studies.first_look import CoderPlan, first_look
from vitrail.studies.table_text import print_table
from vitrail.training import TrainConfig

SHARED = Path(os.environ.get("VITRAIL_SHARED", "../shared")) / "data"
CLIP_CONFIG = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    out, wanted = Path(sys.argv[1]), sys.argv[2:] or list(JOBS)
    if not SHARED.is_dir():
        sys.exit(f"{SHARED} is not here: set VITRAIL_SHARED.")
    for name in wanted:
        rows = JOBS[name](out)
        print(f"\n{rows[0]['backbone']}, {rows[0]['point']}, {rows[0]['n_images']} pictures, head {rows[0]['head']}")
        print_table(rows)
        print(f"report: {out / name / 'report.html'}\n")


def deit(out: Path) -> list[dict]:
    backbone = load("timm/deit_tiny_patch16_224", weights=SHARED / "weights/deit_tiny_patch16_224_in1k.safetensors")
    photographs = f"{SHARED}/imagenet_1000/labels.csv"
    sets = (f"{photographs}@0:0.8", f"{photographs}@0.8:0.85", f"{photographs}@0.85:1")
    return job(
        out / "deit", backbone, sets, "blocks.8.hook_resid_post", own_head(backbone), d_sae=1536, k=32, epochs=12
    )


def dinov2(out: Path) -> list[dict]:
    weights = dequantised("vit_small_patch14_reg4_dinov2", out)
    backbone = load("timm/vit_small_patch14_reg4_dinov2", weights=weights, image_px=224)
    textures = f"{SHARED}/dtd10"
    sets = (f"{textures}@0:0.7", f"{textures}@0.7:0.75", f"{textures}@0.75:1")
    head = fit_linear_head(backbone, open_images(sets[0]), n_workers=pick_workers(None), progress=Terminal())
    return job(out / "dinov2", backbone, sets, "blocks.8.hook_resid_post", head, d_sae=3072, k=32, epochs=12)


def clip(out: Path) -> list[dict]:
    folder = out / "clip-vit-base-patch16"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    dequantised("clip_vit_b16_vision", out, folder / "model.safetensors")
    backbone = load(f"hf/{folder}")
    photographs = f"{SHARED}/imagenet_1000/labels.csv"
    sets = (f"{photographs}@0:0.95", f"{photographs}@0.95:1", str(coco_table(out)))
    classes = np.load(SHARED / "vocabulary/clip_vit_b16_coco80_text_embeddings.npy").astype(np.float32)
    head = ZeroShotHead(classes=torch.from_numpy(classes), logit_scale=100.0)
    return job(out / "clip", backbone, sets, "blocks.9.hook_resid_post", head, d_sae=6144, k=64, epochs=5)


JOBS = {"deit": deit, "dinov2": dinov2, "clip": clip}


def job(
    out: Path,
    backbone: Backbone,
    sets: tuple[str, str, str],
    point: str,
    head: Head,
    *,
    d_sae: int,
    k: int,
    epochs: int,
) -> list[dict]:
    plans = (
        CoderPlan("topk", "topk", {"d_sae": d_sae, "k": k}),
        CoderPlan("matryoshka", "matryoshka", {"d_sae": d_sae, "ks": (k // 2, k, 2 * k, 4 * k), "inference_k": k}),
    )
    train_images, held_out_images, eval_images = (open_images(spec) for spec in sets)
    return first_look(
        backbone,
        out,
        train_images=train_images,
        held_out_images=held_out_images,
        eval_images=eval_images,
        point=point,
        plans=plans,
        config=TrainConfig(epochs=epochs, lr=1e-3, warmup_steps=50, dead_window_rows=150_000, checkpoint_every=100),
        head=head,
        n_workers=pick_workers(None),
        progress=Terminal(),
    )


def dequantised(name: str, out: Path, path: Path | None = None) -> Path:
    """fp32 weights from the int8 copy: W[o, i] = int8[o, i] * scale[o]."""
    path = path or out / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = load_file(SHARED / f"weights/{name}_int8.safetensors")
        weights = {key: value.float() for key, value in stored.items() if not key.endswith((".int8", ".scale"))}
        for key in (key for key in stored if key.endswith(".int8")):
            weight = key.removesuffix(".int8")
            weights[weight] = stored[key].float() * stored[f"{weight}.scale"][:, None]
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path


def coco_table(out: Path) -> Path:
    """A CSV of the COCO pictures that show one of the 80 names; label: the one that covers most of the picture."""
    names = json.loads((SHARED / "vocabulary/clip_vit_b16_coco80_names.json").read_text())
    listed = (SHARED / "coco_masks/classes.yaml").read_text().split("classes:")[1]
    of_pixel = {int(index): name.strip() for index, name in re.findall(r"^\s+(\d+): (.*)$", listed, re.MULTILINE)}
    path = out / "coco.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path", "label", "class_name"])
        for picture in sorted((SHARED / "coco_masks/images").glob("*.jpg")):
            mask = np.asarray(Image.open(SHARED / f"coco_masks/masks/{picture.stem}.png"))
            covered = {of_pixel.get(int(i)): n for i, n in zip(*np.unique(mask, return_counts=True), strict=True)}
            things = {name: n for name, n in covered.items() if name in names}
            if things:
                name = max(things, key=lambda thing: (things[thing], thing))
                table.writerow([picture.resolve(), names.index(name), name])
    return path


if __name__ == "__main__":
    main()
