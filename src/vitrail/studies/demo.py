"""The main job on the built-in world with the built-in model: what `make demo` runs."""

from pathlib import Path
from typing import Any

import torch

from vitrail.backbones import load
from vitrail.backbones.text import OPENAI_SIMPLE
from vitrail.images import open_images
from vitrail.metrics.heads import zero_shot_head
from vitrail.progress import SILENT, Progress
from vitrail.studies.first_look import CoderPlan, first_look
from vitrail.training import TrainConfig

POINT = "blocks.3.hook_resid_post"
D_SAE = 512
PLANS = (
    CoderPlan("topk", "topk", {"d_sae": D_SAE, "k": 16}),
    CoderPlan("batch_topk", "batch_topk", {"d_sae": D_SAE, "k": 16}),
    CoderPlan(
        "matryoshka",
        "matryoshka",
        {"d_sae": D_SAE, "ks": (8, 16, 32, 64, 128), "inference_k": 16, "weighting": "reverse"},
    ),
)
CONFIG = TrainConfig(epochs=4, lr=2e-3, warmup_steps=50, dead_window_rows=30_000, checkpoint_every=100, log_every=10)
NOTES = (
    "A small CLIP that learnt, from pictures and sentences, which words are true of a picture, taken apart. Every "
    "picture is drawn by a program, so what is on it is known, down to the pixel; nothing told the coders. Under each "
    "latent stands the concept that it fits best, chosen on some pictures and scored on others.",
)


def demo(
    out: Path,
    *,
    n_images: int = 6000,
    n_eval: int = 1000,
    n_truth: int = 480,
    device: torch.device | str = "cpu",
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Everything into `out`; returns the table's rows."""
    backbone = load("toy/clip", device=device)
    return first_look(
        backbone,
        out,
        train_images=open_images(f"world:shapes?n={n_images}&split=train&seed=1"),
        held_out_images=open_images("world:shapes?n=400&split=val"),
        eval_images=open_images(f"world:shapes?n={n_eval}&split=test"),
        point=POINT,
        plans=PLANS,
        config=CONFIG,
        head=zero_shot_head(backbone, backbone.class_names, OPENAI_SIMPLE),
        truth=(
            open_images(f"world:shapes?n={n_truth}&split=val&seed=1"),
            open_images(f"world:shapes?n={n_truth}&split=test"),
        ),
        title="vitrail demo: a small CLIP on the world of shapes",
        notes=NOTES,
        n_workers=n_workers,
        progress=progress,
    )
