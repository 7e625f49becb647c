"""ViSAEBench's study of real backbones on real photographs: what docs/real-study.md reports.

    python scripts/real_study.py OUT                       writes OUT/study.json, and the weights it names
    vitrail study run OUT/study.json --out OUT/study       runs it; killed and run again, it goes on

Reads $VITRAIL_SHARED/data (default ../shared): the image tower of OpenAI's CLIP ViT-B/16, DINOv2 ViT-S/14 with
registers, DeiT-Tiny, and a DeiT-Tiny that was never trained, at their last blocks and, with one coder, three blocks
before. Pictures: Tiny-ImageNet (200 classes; a third of them to learn from, half to measure), ten textures, and COCO
pictures with masks. Nothing of it ships with vitrail.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from real_first_look import CLIP_CONFIG, SHARED, dequantised

LAST, EARLIER = "blocks.11.hook_resid_post", "blocks.8.hook_resid_post"
REPEATED = "batch_topk-4x-k32"  # with three seeds, and with controls
COMPARED = "batch_topk-4x-k64"  # at both blocks


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out, shared = Path(sys.argv[1]), SHARED.resolve()
    if not shared.is_dir():
        sys.exit(f"{shared} is not here: set VITRAIL_SHARED.")
    path = out / "study.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan(out.resolve(), shared), indent=1))
    print(path)


def plan(out: Path, shared: Path) -> dict[str, Any]:
    clip = out / "weights" / "clip-vit-base-patch16"
    clip.mkdir(parents=True, exist_ok=True)
    clip = clip.resolve()
    (clip / "config.json").write_text(json.dumps(CLIP_CONFIG))
    dequantised("clip_vit_b16_vision", out / "weights", clip / "model.safetensors")
    dinov2 = dequantised("vit_small_patch14_reg4_dinov2", out / "weights")
    deit = shared / "weights/deit_tiny_patch16_224_in1k.safetensors"
    models: dict[str, dict[str, Any]] = {
        "deit": {"name": "timm/deit_tiny_patch16_224", "weights": str(deit), "evaluator": "clip"},
        "random": {"name": "timm/deit_tiny_patch16_224", "random": 0, "evaluator": "clip"},
        "dinov2": {
            "name": "timm/vit_small_patch14_reg4_dinov2",
            "weights": str(dinov2),
            "image_px": 224,
            "evaluator": "clip",
        },
        "clip": {"name": f"hf/{clip}", "evaluator": "dinov2"},
    }
    backbones = []
    for label, model in models.items():
        backbones.append({**model, "label": label, "point": LAST})
        backbones.append({**model, "label": f"{label}@8", "point": EARLIER, "role": "layer", "coders": [COMPARED]})
    coders: list[dict[str, Any]] = [
        {
            "name": f"batch_topk-{expansion}x-k{k}",
            "architecture": "batch_topk",
            "arguments": {"expansion": expansion, "k": k},
        }
        for expansion in (4, 8)
        for k in (32, 64)
    ]
    coders[0]["seeds"] = [0, 1, 2]
    coders.append(
        {
            "name": "jump_relu-4x-l0_32",
            "architecture": "jump_relu",
            "arguments": {"expansion": 4, "target_l0": 32},
        }
    )
    coders += [{"name": name, "architecture": name, "control_of": REPEATED} for name in ("untrained", "pca_all")]
    tiny = shared / "tiny_imagenet"
    return {
        "title": "Four backbones on Tiny-ImageNet, textures and COCO pictures",
        "backbones": backbones,
        "coders": coders,
        "seeds": [0],
        "images": {
            "train": f"{tiny}/*-000.tar@0:0.35",
            "test": f"{tiny}/*-000.tar@0.5:1",
            "textures": f"{shared}/dtd10",
            "scenes": f"{shared}/coco_masks/images",
        },
        "masks": {"scenes": f"{shared}/coco_masks/masks"},
        "common_evaluator": "clip",
        "training": {
            "epochs": 3,
            "compute_dtype": "bfloat16",
            "lr": 1e-3,
            "warmup_steps": 30,
            "dead_window_rows": 150_000,
        },
        "options": {
            "n_bootstrap": 300,
            "sparse_probing": {"ks": [1, 2, 4, 8, 16, 32, 64, 128]},
            "linear": {"tolerance": 1e-5},
            "wnids": f"{tiny}/classes.json",
            "segmentation": {"max_patches": 3000, "tolerance": 1e-4},
        },
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
