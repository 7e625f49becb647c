"""What several verbs share: the device, the workers, opening a backbone."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from vitrail.backbones import Backbone, load


@dataclass
class Model:
    """Which backbone, with which weights."""

    backbone: Annotated[
        str, tyro.conf.arg(help='"toy/shapes", "timm/NAME", "open_clip/NAME@TAG", "hf/NAME" or a folder')
    ]
    weights: Annotated[Path | None, tyro.conf.arg(help="a local safetensors file instead of the hub's")] = None
    image_px: Annotated[int | None, tyro.conf.arg(help="another input size than the model's own")] = None

    def load(self, device: str) -> Backbone:
        return load(self.backbone, weights=self.weights, image_px=self.image_px, device=pick_device(device))


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises ValueError for a device that torch does not have here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but this torch sees no GPU. Use --device cpu.")
    return chosen


def pick_workers(workers: int | None) -> int:
    """One core is left to the model; 8 processes feed any of them."""
    return min(8, max(0, (os.cpu_count() or 1) - 1)) if workers is None else workers
