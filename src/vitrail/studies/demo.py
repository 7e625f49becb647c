"""The main job on the built-in world with the built-in model: what `make demo` runs."""

from pathlib import Path
from typing import Any

import torch

from vitrail.backbones import load
from vitrail.images import open_images
from vitrail.metrics.heads import own_head
from vitrail.progress import SILENT, Progress
from vitrail.studies.first_look import CoderPlan, first_look
from vitrail.training import TrainConfig

POINT = "blocks.2.hook_resid_post"
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
    "A vision transformer trained on a rendered world, taken apart. Every picture is drawn by a program, so what is on "
    "it is known. The model learnt to name shape and texture; nothing told the coders of either.",
)


def demo(
    out: Path,
    *,
    n_images: int = 6000,
    n_eval: int = 1000,
    device: torch.device | str = "cpu",
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Everything into `out`; returns the table's rows."""
    backbone = load("toy/shapes", device=device)
    return first_look(
        backbone,
        out,
        train_images=open_images(f"world:shapes?n={n_images}&split=train&seed=1"),
        held_out_images=open_images("world:shapes?n=400&split=val"),
        eval_images=open_images(f"world:shapes?n={n_eval}&split=test"),
        point=POINT,
        plans=PLANS,
        config=CONFIG,
        head=own_head(backbone),
        title="vitrail demo: a small vision transformer on the world of shapes",
        notes=NOTES,
        n_workers=n_workers,
        progress=progress,
    )
